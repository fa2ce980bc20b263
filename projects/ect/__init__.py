"""ECT: Consistency Models Made Easy (ICLR 2025), arXiv 2406.14548.

Family: Diffusion and one-step generation.
"""

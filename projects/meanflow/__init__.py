"""MeanFlow: Mean Flows for One-step Generative Modeling (NeurIPS 2025), arXiv 2505.13447.

Family: Diffusion and one-step generation.
"""

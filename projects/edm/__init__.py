"""EDM: Elucidating the Design Space of Diffusion-Based Generative Models (NeurIPS 2022), arXiv 2206.00364.

Family: Diffusion and one-step generation.
"""

"""pMF: One-step Latent-free Image Generation with Pixel Mean Flows (preprint 2026), arXiv 2601.22158.

Family: Diffusion and one-step generation.
"""

"""iMF: Improved Mean Flows: On the Challenges of Fastforward Generative Models (CVPR 2026), arXiv 2512.02012.

Family: Diffusion and one-step generation.
"""

"""Is Attention Better Than Matrix Decomposition? (Hamburger), ICLR 2021, arXiv 2109.04553."""

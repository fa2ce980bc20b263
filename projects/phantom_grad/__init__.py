"""On Training Implicit Models (NeurIPS 2021, arXiv 2111.05177)."""

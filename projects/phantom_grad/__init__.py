"""Phantom gradient: On Training Implicit Models (NeurIPS 2021), arXiv 2111.05177.

Family: Equilibrium models.
"""

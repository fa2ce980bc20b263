"""TorchDEQ: A Library for Deep Equilibrium Models (preprint 2023), arXiv 2310.18605.

Family: Equilibrium models.
"""

"""TorchDEQ: A Library for Deep Equilibrium Models (2023), arXiv 2310.18605: the applications of its zoo."""

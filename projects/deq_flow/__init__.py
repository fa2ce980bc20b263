"""DEQ-Flow: Deep Equilibrium Optical Flow Estimation (CVPR 2022), arXiv 2204.08442.

Family: Equilibrium models.
"""

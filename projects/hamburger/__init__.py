"""Hamburger: Is Attention Better Than Matrix Decomposition? (ICLR 2021), arXiv 2109.04553.

Family: Attention and decomposition.
"""

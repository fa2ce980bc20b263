"""pMF: One-step Latent-free Image Generation with Pixel Mean Flows (2026), arXiv 2601.22158."""

"""Reproducibility package for "Efficient Diffusion Training via Min-SNR Weighting Strategy"."""

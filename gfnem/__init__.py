"""Latent variable models with discrete, compositional latents, trained by GFlowNet-EM."""

__version__ = "0.1.0"

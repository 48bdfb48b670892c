"""Vectorized-timestep video diffusion: one noise level per latent frame."""

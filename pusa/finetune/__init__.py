"""Stage 3: latents -> a transformer that takes one noise level per latent frame. Read stage.py first."""

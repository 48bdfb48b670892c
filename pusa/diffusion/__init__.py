"""The idea, to be read first: levels, the denoising loop, windows, latent spaces, noise schedules."""

"""The idea, to be read first: levels, the denoising loop, windows, latent spaces and noise schedules."""

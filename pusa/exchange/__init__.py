"""Import and export latents in the layout of the published data set: two torch files for each clip."""

"""Import and export latents in the layouts of the published data sets: two torch files a clip, or one."""

"""Latents in the layout of the published data set: torch files, two for each clip, into a table and back."""

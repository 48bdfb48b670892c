"""Stage 2: clips -> latents and text features, in a latents table. Read stage.py first."""

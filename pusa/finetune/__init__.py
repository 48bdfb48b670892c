"""Fine-tune a base model on latents. Read stage.py first."""

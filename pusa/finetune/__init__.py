"""What the fine-tune's loop leans on."""

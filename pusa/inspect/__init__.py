"""What a table holds, told in numbers, as a page with pictures, and as what its latents decode to."""

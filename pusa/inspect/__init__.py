"""Report what a table holds: in numbers, as a page with pictures, and by decoding its latents."""

"""The built-in tiny family: drawn clips, and how the models shipped in pusa/builtin were made from them."""

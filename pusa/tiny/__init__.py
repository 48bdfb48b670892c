"""Draw the clips of the tiny models, and make the models that are shipped in pusa/builtin from them."""

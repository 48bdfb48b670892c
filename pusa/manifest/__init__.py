"""Manifests: their models, how they are read, and how globs and sweeps expand."""

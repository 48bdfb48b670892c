"""Where clips come from: the list of sources, the verdict on each, what is remembered of it, and which are doubles."""

"""Stage 1: list the sources, judge each by decoding it, decide what becomes of it, write the clips table."""

"""Measure what a fine-tune adds to its base, task by task, on clips that no training saw."""

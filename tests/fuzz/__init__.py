"""Feed hostile input, made by hypothesis, to everything that reads what strangers wrote.

Only Pusa's own errors may come out. `infra/test` spends about a minute on it, and `infra/test --all`, which sets
PUSA_FUZZ_TIMES, up to an hour.
"""

import os

TIMES = int(os.environ.get("PUSA_FUZZ_TIMES", "1"))


def examples(count: int) -> int:
    """Return how many examples a test tries: `count`, or many times more in a long run."""
    return count * TIMES

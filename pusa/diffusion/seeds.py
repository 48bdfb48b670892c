"""Make the generators of noise from seeds, so that no two seeds that a manifest allows give the same noise."""

from typing import Any

import numpy as np
import torch
from torch import Generator

from pusa.system.files import derived_seed

# Where torch's saved state of a CPU generator holds the 624 words of the Mersenne Twister, each in 8 bytes.
WORDS = slice(24, 24 + 624 * 8)


def seeded(seed: int) -> Generator:
    """Return a CPU generator for a seed that a user chose, from 0 to 2**64 - 1.

    torch looks only at the lower 32 bits of a seed. So from 2**32 on, the generator starts from the state that NumPy's
    Mersenne Twister has for the seed. NumPy guarantees that this state never changes, and `SeedSequence`, which fills
    it, maps different seeds to different states. Smaller seeds give what torch gives.

    Raises:
        ValueError: the seed is outside this range.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"the seed is {seed}; expected a number from 0 to 2**64 - 1")
    generator = Generator().manual_seed(seed)
    if seed >= 2**32:
        words = np.random.MT19937(np.random.SeedSequence(seed)).state["state"]["key"].astype(np.int64)
        state = generator.get_state()
        state[WORDS] = torch.from_numpy(words).view(torch.uint8)
        generator.set_state(state)
    return generator


def derived(*parts: Any) -> Generator:
    """Return a CPU generator for one of the many draws of a run, from a hash of a seed and of what is drawn.

    torch takes 32 bits of the hash. Two draws may therefore share their noise by chance; two whole runs cannot.
    """
    return Generator().manual_seed(derived_seed(*parts))

"""Random numbers of the data apart from those of the model, so that dropout does not move what collators draw.

They follow from seeds that all ranks of a sequence share, and from nothing that was drawn before: so they are equal on
these ranks, and the same again when a run goes on in the middle of an epoch.
"""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

States = tuple[Any, Any, torch.Tensor]


def seed_draws(*numbers: int) -> None:
    """Seed Python's, NumPy's and torch's generators of the host by a hash of the numbers. Devices keep theirs."""
    seed = int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "big") >> 1
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 -- the generator that collators draw from
    torch.default_generator.manual_seed(seed)


@contextmanager
def set_aside() -> Iterator[None]:
    """Whatever is drawn or seeded inside leaves the generators outside as they were."""
    states = _states()
    try:
        yield
    finally:
        _restore(states)


class Stream:
    """A stream of random numbers of its own: `with stream:` goes on in it, and leaves it again."""

    def __init__(self, *seed: int) -> None:
        with set_aside():
            seed_draws(*seed)
            self._inside = _states()

    def __enter__(self) -> None:
        self._outside = _states()
        _restore(self._inside)

    def __exit__(self, *error: object) -> None:
        self._inside = _states()
        _restore(self._outside)


def _states() -> States:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002


def _restore(states: States) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    torch.set_rng_state(states[2])

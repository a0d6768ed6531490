"""Running what the caller's autograd must not see."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import TypeVar

import torch

T = TypeVar("T")


def in_a_thread(test: Callable[[], T]) -> T:
    """What a test finds, whatever autograd's hooks and modes, autocast and gradients are here.

    A self-test runs at a kernel's first use, that is inside of a layer's first forward pass. Checkpointing counts the
    tensors that are saved there: a test that saves some would be taken for a part of the layer, which is then computed
    again in the middle of the test. All of that belongs to a thread, and a new one has none of it.
    """
    device = torch.cuda.current_device() if torch.cuda.is_available() and torch.cuda.is_initialized() else None

    def alone() -> T:
        with nullcontext() if device is None else torch.cuda.device(device):
            return test()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(alone).result()

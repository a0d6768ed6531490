"""Autocast and random states of a piece of code, for when it is run again."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Modes:
    """As they are now.

    Arguments:
        device: where the code computes.
    """

    def __init__(self, device: torch.device) -> None:
        self.kind = device.type
        self.autocast = torch.get_autocast_dtype(self.kind), torch.is_autocast_enabled(self.kind)
        self.cpu = torch.get_rng_state()
        self.devices: dict[torch.device, Tensor] = {}
        if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            self.devices[device] = torch.cuda.get_rng_state(device)

    @contextmanager
    def again(self) -> Iterator[None]:
        """As it was, and after that what was before."""
        with torch.random.fork_rng(list(self.devices)), torch.autocast(self.kind, *self.autocast):
            torch.set_rng_state(self.cpu)
            for device, state in self.devices.items():
                torch.cuda.set_rng_state(state, device)
            yield

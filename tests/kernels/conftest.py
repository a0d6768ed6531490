"""Fixtures of the tests of kernels."""

from collections.abc import Callable

import pytest
import torch


@pytest.fixture
def gpu_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """`gpu_of(9, 0)`: from now on the only device has this compute capability."""

    def pretend(*capability: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)

    return pretend

"""What torch's flash kernel is told."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ringattn import Layout, Mask, MeshShape, parallel_attention
from ringattn.kernels import selftest
from ringattn.kernels.backends import torch_flash
from ringattn.kernels.backends.reference import Reference
from tests.small_tensors import DOCS, tensors


@pytest.mark.parametrize(
    ("mask", "emitted"),
    [
        (Mask(causal=False), (False, -1, -1)),
        (Mask(), (True, -1, 0)),
        (Mask(window=(4, -1)), (True, 4, 0)),
        (Mask(window=(4, 9)), (True, 4, 0)),
        (Mask(causal=False, window=(4, 2)), (False, 4, 2)),
        (Mask(window=[4, 0]), (True, 4, 0)),  # type: ignore[arg-type]
    ],
    ids=str,
)
def test_both_sides_and_the_corner_are_told_to_torchs_kernel(
    monkeypatch: pytest.MonkeyPatch, fresh_caches: None, mask: Mask, emitted: tuple[bool, int, int]
) -> None:
    """Both sides, always, and whether the corner is causal; of the band that the planner made of the mask."""
    torch_flash._one_split()
    told: list[tuple[bool, int, int]] = []

    def forward(q: Tensor, *args: Any, scale: float, window_size_left: int, window_size_right: int, **_: Any) -> Any:
        told.append((args[7], window_size_left, window_size_right))
        return torch.zeros_like(q), torch.zeros(q.shape[1], q.shape[0])

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", forward)
    monkeypatch.setattr(torch_flash.TorchFlash, "capability", Reference.capability)
    monkeypatch.setattr(selftest, "failure", lambda backend, spec: None)
    parallel_attention(*tensors(), Layout(DOCS, MeshShape()), mask=mask, backend="torch")
    assert set(told) == {emitted}

"""The calls that plans of trees and blocks make: what kinds there are, and each kind on every kernel.

Here adapters are given fakes of their packages; on a GPU the kernels themselves compute each kind of call.
"""

from collections.abc import Iterator
from functools import cache
from unittest import mock

import pytest
import torch

from ringattn import Documents, Mask
from ringattn.kernels.backends import fa3
from ringattn.kernels.backends.reference import Reference
from ringattn.kernels.registry import backends, builtin, refusal
from ringattn.kernels.spec import Backend, Call, CallSpec, Options
from ringattn.parallel.schedules import demand
from tests.kernels.backends import fakes
from tests.kernels.backends.test_conformance import SLACK, TOLERANCE, both_ways
from tests.kernels.backends.test_packages import Operators, check, fake_fa2, fake_torch_flash, record
from tests.parallel.planning.brute_force import plans_of

__all__ = ["fake_fa2", "fake_torch_flash", "record"]  # fixtures
pytestmark = pytest.mark.usefixtures("fresh_caches")

# A prompt with completions, one of which branches again; branches of one token; images; a plain document.
DOCS = (
    Documents.from_tree([150, 70, 33, 41, 129], [-1, 0, 1, 1, 0], blocks=[(20, 60), (160, 200)]),
    Documents.from_tree([40, 1, 1, 1, 1, 17, 5], [-1, 0, 0, 0, 0, -1, -1]),
    Documents([300, 140], blocks=[(0, 90), (120, 121 + 64), (200, 300), (300, 330)]),
)
MASKS = (Mask(), Mask(window=(30, 0)), Mask(window=(30, 0), blocks="clipped"))
Kind = tuple[str, ...]


def kind_of(call: Call) -> Kind:
    """What a kernel branches on."""
    sides = tuple("open" if side < 0 else "diagonal" if side == 0 else "shifted" for side in (call.left, call.right))
    lengths = set(zip(call.q_lens, call.k_lens, strict=True))
    facts = {
        "keys between": not call.dense_keys,
        "without keys": any(m == 0 for _, m in lengths),
        "more keys": any(m > n for n, m in lengths),
        "more queries": any(n > m > 0 for n, m in lengths),
        "single queries": call.max_q == 1 and len(call.blocks) > 1,
    }
    return (*sides, *(name for name, there in facts.items() if there))


@cache
def planned_calls() -> dict[Kind, list[Call]]:
    """Of all ranks, schedules and layouts: of each kind the smallest and the largest call."""
    found: dict[Kind, set[Call]] = {}
    for docs in DOCS:
        for mask in MASKS:
            for ring, scheme, repeated in ((1, "auto", 0), (2, "gather", 0), (4, "joint", 9999), (4, "ring", 0)):
                with mock.patch.object(demand, "REPEATED", repeated):
                    for _, plan in plans_of(docs, mask, ring, "balanced", scheme, None):
                        for call in (call for stage in plan.stages for call in stage.calls):
                            found.setdefault(kind_of(call), set()).add(call)
    size = {kind: sorted(calls, key=lambda call: (sum(call.q_lens), sum(call.k_lens))) for kind, calls in found.items()}
    return {kind: list({calls[0]: 0, calls[-1]: 0}) for kind, calls in size.items()}


def smallest_calls() -> Iterator[Call]:
    return (calls[0] for calls in planned_calls().values())


def test_plans_make_every_kind_of_call() -> None:
    """Else what follows would say nothing of the kinds that are missing."""
    kinds = set(planned_calls())
    bands = {kind[:2] for kind in kinds}
    # Causal; whole ancestors; the upper triangle of a block; a window; what a block has left of its window, ...
    assert bands >= {("open", "diagonal"), ("open", "open"), ("diagonal", "open"), ("shifted", "diagonal")}
    assert {("open", "shifted"), ("shifted", "open"), ("shifted", "shifted")} & bands
    for band in (("open", "diagonal"), ("open", "open"), ("diagonal", "open")):
        told = {fact for kind in kinds if kind[:2] == band for fact in kind[2:]}
        assert "keys between" in told, band
    assert {fact for kind in kinds for fact in kind[2:]} == {
        "keys between", "without keys", "more keys", "more queries", "single queries"
    }  # fmt: skip


def test_fa2_computes_them(fake_fa2: Backend) -> None:
    for call in smallest_calls():
        check(fake_fa2, call)


def test_torchs_kernel_computes_them(fake_torch_flash: Backend) -> None:
    for call in smallest_calls():
        check(fake_torch_flash, call)


def test_fa3_computes_them(record: fakes.Record) -> None:
    with Operators(record, "out", "is_causal"):
        for call in smallest_calls():
            check(fa3.FlashAttention3(), call)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(2, 2), (8, 2), (6, 1)])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("name", [backend.name for backend in builtin() if "cuda" in backend.capability.devices])
def test_kernels_compute_them(name: str, head_dim: int, heads: tuple[int, int]) -> None:
    """Forward and backward in bfloat16 against float64, into memory that held something else."""
    backend, dtype = backends()[name], torch.bfloat16
    reason = backend.missing() or refusal(backend, CallSpec("cuda", dtype, head_dim, head_dim, *heads, window=True))
    if reason is not None:
        pytest.skip(f"{name} {reason}")
    wrong = []
    for kind, calls in planned_calls().items():
        for call in calls:
            wrong += [(kind, call, *one) for one in differences(backend, call, head_dim, heads, dtype)]
    assert not wrong


def differences(
    backend: Backend, call: Call, head_dim: int, heads: tuple[int, int], dtype: torch.dtype, device: str = "cuda"
) -> list[tuple[str, float]]:
    """Results that differ from the reference's by more than rounding: name and error."""
    generator, found = torch.Generator().manual_seed(call.q[1]), []
    rows = {
        "q": (call.q[1], heads[0]),
        "k": (call.k[1], heads[1]),
        "v": (call.k[1], heads[1]),
        "dout": (call.q[1], heads[0]),
    }
    x = {key: torch.randn(*shape, head_dim, generator=generator).to(device, dtype) for key, shape in rows.items()}
    options = Options(head_dim**-0.5)
    got = both_ways(backend, x, call, options)
    expected = both_ways(Reference(), {key: tensor.double() for key, tensor in x.items()}, call, options)
    for key, reference in expected.items():
        finite = ~reference.isinf()
        # Of few keys a gradient of queries is the difference of rounded numbers near 1.
        slack = SLACK[dtype] * int(finite.sum()) ** 0.5 if key in ("lse", "dq", "dk") else 0.0
        error = float((got[key].double() - reference)[finite].norm())
        limit = TOLERANCE[dtype] * float(reference[finite].norm()) + slack
        if not torch.equal(got[key].isinf(), reference.isinf()) or not error <= limit:
            found.append((key, error))
    return found


def test_the_judge_of_kernels_sees_a_band_that_is_off_by_one() -> None:
    """On tensors of the CPU, so that what the GPUs are asked is known to be able to fail."""

    class Shifted(Reference):
        def forward(self, q, k, v, call, options, out):  # type: ignore[no-untyped-def]
            return super().forward(q, k, v, Call(call.blocks, call.left, call.right + (call.right >= 0)), options, out)

    (call, *_) = (call for call in smallest_calls() if call.right == 0 and call.left < 0)
    assert not differences(Reference(), call, 64, (4, 2), torch.bfloat16, "cpu")
    assert {name for name, _ in differences(Shifted(), call, 64, (4, 2), torch.bfloat16, "cpu")} >= {"out"}

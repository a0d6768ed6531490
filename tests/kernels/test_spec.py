"""What a call knows of itself, against the definition of its band; what backends declare and refuse."""

import itertools
from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch

from ringattn.kernels import registry
from ringattn.kernels.backends.fa2 import FlashAttention2
from ringattn.kernels.backends.npu import NpuFusion
from ringattn.kernels.backends.reference import Reference
from ringattn.kernels.backends.xpu import XpuFlash
from ringattn.kernels.spec import Backend, Block, Call, CallSpec, Capability, Options
from tests.kernels.fake_backends import FEATURES, SPEC


@pytest.mark.parametrize("band", [(-1, -1), (-1, 0), (2, 0), (0, 0), (1, 2), (-1, 1)])
def test_keyless_rows_are_those_whose_softmax_is_empty(band: tuple[int, int]) -> None:
    for n, m in itertools.product(range(5), repeat=2):
        call = Call((Block((0, 2), (0, 2)), Block((2, 2 + n), (2, 2 + m))), *band)
        q, k = torch.zeros(2 + n, 1, 4), torch.zeros(2 + m, 1, 4)
        lse = Reference().forward(q, k, k, call, Options(1.0), torch.empty_like(q))
        assert call.keyless_rows == bool((lse == float("-inf")).any()), (n, m)


def test_every_feature_of_a_call_is_tried() -> None:
    """One that is added to calls and capabilities belongs to the list of the tests."""
    everything = {name: value for changes in FEATURES.values() for name, value in changes.items()}
    assert set(replace(SPEC, **everything).features) == set(FEATURES)
    declared = {field.name for field in fields(Capability) if isinstance(field.default, bool)}
    assert declared - {"deterministic", "adds"} == set(FEATURES)  # these two are asked for otherwise


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("backend", registry.builtin(), ids=lambda backend: backend.name)
def test_a_backend_takes_the_features_that_it_declares(
    gpu_of: Callable[[int, int], None], backend: Backend, feature: str
) -> None:
    """The whole matrix, also of backends that are not installed; what is refused is named."""
    declared = backend.capability
    if declared.compute_capability is not None:
        gpu_of(*declared.compute_capability[0])
    plain = CallSpec((declared.devices or ("cpu",))[0], (declared.dtypes or (torch.bfloat16,))[0], 64, 64, 4, 2)
    assert declared.refusal(plain) is None
    reason = declared.refusal(replace(plain, **FEATURES[feature]))
    assert (reason is None) == getattr(declared, feature)
    assert reason is None or feature.replace("_", " ") in reason


@pytest.mark.parametrize(
    ("name", "capability", "accepted"),
    [
        ("fa4", (8, 9), False), ("fa4", (9, 0), True), ("fa4", (10, 0), True),
        ("fa3", (8, 0), False), ("fa3", (9, 0), True), ("fa3", (10, 0), False),
        ("fa2", (7, 5), False), ("fa2", (8, 0), True), ("fa2", (12, 0), True),
        ("torch", (7, 5), False), ("torch", (8, 6), True), ("flex", (7, 5), False), ("flex", (8, 0), True),
    ],
)  # fmt: skip
def test_a_kernel_refuses_devices_that_it_has_no_code_for(
    gpu_of: Callable[[int, int], None], name: str, capability: tuple[int, int], accepted: bool
) -> None:
    gpu_of(*capability)
    reason = registry.backends()[name].capability.refusal(CallSpec("cuda", torch.bfloat16, 64, 64, 4, 2))
    assert (reason is None) == accepted
    if reason is not None:
        found = ".".join(map(str, capability))
        assert reason.startswith("needs compute capability ")
        assert reason.endswith(f"got {found}")


@pytest.mark.parametrize(("name", "most"), [("fa4", 256), ("fa3", 256), ("fa2", 256), ("torch", 256), ("flex", None)])
def test_a_kernel_refuses_larger_head_dims_than_it_takes(
    gpu_of: Callable[[int, int], None], name: str, most: int | None
) -> None:
    gpu_of(9, 0)
    declared = registry.backends()[name].capability
    for dim in (8, 64, 256, 264, 512):
        reason = declared.refusal(CallSpec("cuda", torch.bfloat16, dim, dim, 4, 2))
        assert reason == (None if most is None or dim <= most else f"takes head dims up to {most}, got {dim}")


@pytest.mark.parametrize("backend", [NpuFusion(), XpuFlash()], ids=lambda backend: backend.name)
@pytest.mark.parametrize(
    ("change", "named"),
    [({"softcap": 1.0}, "softcap"), ({"dropout_p": 0.1}, "dropout"), ({"value_dim": 32}, "unequal head dims")],
)
def test_npu_and_xpu_refuse_by_name(backend: Backend, change: dict[str, object], named: str) -> None:
    asked = {"device": backend.name, "dtype": torch.bfloat16, "head_dim": 64, "value_dim": 64, **change}
    spec = CallSpec(query_heads=4, key_heads=2, **asked)
    assert named in backend.capability.refusal(spec)


def test_xpu_has_no_window() -> None:
    spec = CallSpec("xpu", torch.bfloat16, 64, 64, 4, 2, window=True)
    assert XpuFlash().capability.refusal(spec) == "has no window"


def test_a_kernel_that_draws_its_own_dropout_refuses(gpu_of: Callable[[int, int], None]) -> None:
    """What it drops would depend on how the sequence is split."""
    gpu_of(8, 0)
    spec = CallSpec("cuda", torch.bfloat16, 64, 64, 4, 2, dropout_p=0.1)
    assert "depends on how the sequence is split" in (FlashAttention2().capability.refusal(spec) or "")

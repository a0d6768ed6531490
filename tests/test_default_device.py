"""What is made on the host is made there, whatever `torch.set_default_device` says: here the meta device, whose tensors
hold nothing, and so fail wherever one is read."""

from typing import Any

import pytest
import torch

from ringattn import Documents, Layout, Mask, MeshShape, parallel_attention
from ringattn.kernels import selftest
from ringattn.kernels.backends import flex
from ringattn.kernels.registry import backends
from ringattn.kernels.spec import Block, Call, CallSpec
from tests.caches import clear_caches

LENGTHS = [20, 5, 7]


def attended(backend: str, x: torch.Tensor, compiled: bool) -> list[torch.Tensor]:
    layout = Layout(Documents(LENGTHS), MeshShape())
    q, k, v = (layout.shard(x).clone().requires_grad_() for _ in range(3))
    torch._dynamo.reset()
    run = torch.compile(parallel_attention, backend="aot_eager", fullgraph=True) if compiled else parallel_attention
    out = run(q, k, v, layout, mask=Mask(window=(9, 0)), backend=backend)
    out.square().sum().backward()
    return [
        layout.unshard(out.detach()),
        layout.position_ids("cpu"),
        *(t.grad for t in (q, k, v) if t.grad is not None),
    ]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_attention_and_its_layout_do_not_take_the_default_device(
    fresh_caches: None, backend: str, compiled: bool
) -> None:
    x = torch.randn(32, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = attended(backend, x, compiled)
    clear_caches()
    with torch.device("meta"):
        found = attended(backend, x, compiled)
    assert len(found) == len(expected) == 5
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def host_tables() -> list[torch.Tensor]:
    call = Call((Block((0, 5), (0, 5)), Block((5, 9), (7, 12))), 3, 0)
    device = torch.device("cpu")
    layout = Layout(Documents([9, 0, 4]), MeshShape(1, 2))
    return [
        *call.tensors(device),
        call.packed_key_rows(device),
        *flex.row_bounds(call),
        layout.indices(1),
        layout.position_ids(),
        Documents([3, 2]).dense(),
        Mask(window=(1, 1)).dense(4),
    ]


def test_tables_of_calls_and_layouts_are_made_on_the_host() -> None:
    expected = host_tables()
    with torch.device("meta"):
        found = host_tables()
    assert all(x.device.type == "cpu" for x in found)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_self_tests_run_on_the_device_that_they_are_for(fresh_caches: None) -> None:
    with torch.device("meta"):
        assert selftest.failure(backends()["cpu"], CallSpec("cpu", torch.float32, 8, 8, 2, 1)) is None


@pytest.mark.parametrize("name", ["lengths", "cu_seqlens", "position_ids", "segment_ids"])
def test_documents_are_read_on_the_host(name: str) -> None:
    make: dict[str, Any] = {
        "lengths": lambda: Documents([2, 3]),
        "cu_seqlens": lambda: Documents.from_cu_seqlens([0, 2, 5]),
        "position_ids": lambda: Documents.from_position_ids([[0, 1, 0, 1, 2]]),
        "segment_ids": lambda: Documents.from_segment_ids([[0, 0, 1, 1, 1]]),
    }
    with torch.device("meta"):
        assert make[name]().lengths == (2, 3)


def test_batches_are_made_on_the_host() -> None:
    pytest.importorskip("transformers")
    from ringattn.hf import shard_batch

    ids = torch.arange(3, 15).view(2, 6)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])

    def sharded() -> dict[str, Any]:
        batch = {"input_ids": ids, "labels": ids, "attention_mask": mask}
        return shard_batch(batch, None, MeshShape(1, 2))  # type: ignore[arg-type]

    expected = sharded()
    with torch.device("meta"):
        found = sharded()
    for name in ("input_ids", "labels", "shift_labels", "position_ids", "num_items_in_batch"):
        assert torch.equal(found[name], expected[name]), name

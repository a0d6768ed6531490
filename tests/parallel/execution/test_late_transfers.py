"""Transfers that come late: nothing is read before it was waited for, no buffer is filled while it is being sent."""

import pytest
import torch

from ringattn import Documents, Layout, Mask, SequenceMesh
from ringattn.parallel.execution.executor import run
from ringattn.preparation import prepare
from ringattn.settings import AttentionOptions
from tests.dense import Case, dense_attention, relative_error
from tests.parallel.execution.late_transport import Late, late
from tests.parallel.ranks import free_mesh, mesh_of
from tests.pool import Pools

DOCS = Documents([700, 33, 1, 0, 500, 120, 64])
SMALL = Documents([40, 5, 1, 0, 23])
MESHES = [(2, 1, "gather"), (2, 1, "ring"), (1, 2, "ulysses"), (4, 1, "ring"), (4, 1, "gather"), (2, 2, "hybrid")]
MESHES += [(4, 1, "joint")]
LAYERS = 3  # attentions in flight, one after another, before anybody waits for the device


def errors(case: Case, ring: int, ulysses: int, scheme: str, device: str, transport: str) -> dict[str, float]:
    """Of several attentions, forward and then backward in reverse order, as the layers of a model go."""
    return errors_on(Layout(case.docs, mesh_of(ring, ulysses, device, transport), "zigzag"), case, scheme, device)


def parted_errors(case: Case, ranks: int, device: str, transport: str) -> dict[str, float]:
    """Of a layout that exchanges the longest documents and leaves the others on the ring axis, all cut."""
    order = sorted(range(len(case.docs)), key=lambda number: -case.docs.lengths[number])
    mesh = free_mesh(ranks, device, transport)
    parts = [((1, ranks), order[:1]), ((ranks, 1), order[1:])]
    return errors_on(Layout(case.docs, mesh, "zigzag", parts=parts), case, "auto", device)


def errors_on(layout: Layout, case: Case, scheme: str, device: str) -> dict[str, float]:
    mesh = layout.mesh
    assert isinstance(mesh, SequenceMesh)
    x = {name: tensor.to(mesh.device) for name, tensor in case.tensors().items()}
    options = AttentionOptions(mask=case.mask, scheme=scheme, return_lse=True, **case.options)
    layers = []
    for _ in range(LAYERS):
        local = [layout.shard(x[name]).clone().requires_grad_() for name in ("q", "k", "v")]
        jobs = late(prepare(*local, None, layout, options))
        out, lse = run(jobs, *local, None)
        layers.append((jobs, local, out, lse))
    for _, local, out, _ in reversed(layers):
        for leaf, grad in zip(local, torch.autograd.grad(out, local, layout.shard(x["dout"])), strict=True):
            leaf.grad = grad
    worst: dict[str, float] = {}
    for jobs, local, out, lse in layers:
        for job in jobs:
            assert sum(axis.exchanges for axis in (job.ring, job.ulysses) if isinstance(axis, Late)) >= 2
        found = {"out": layout.unshard(out.detach()), "lse": layout.unshard(lse, dim=1)}
        found |= {f"d{name}": layout.unshard(leaf.grad) for name, leaf in zip("qkv", local, strict=True)}
        for name, expected in dense_attention(case, device).items():
            worst[name] = max(worst.get(name, 0.0), relative_error(found[name], expected))
    return worst


@pytest.mark.parametrize(("ring", "ulysses", "scheme"), MESHES)
def test_late_transfers_change_nothing(pool: Pools, ring: int, ulysses: int, scheme: str) -> None:
    for mask in (Mask(), Mask(causal=False, window=(9, 4))):
        case = Case(SMALL, mask, (4, 2), (8, 8), torch.float64)
        for found in pool(ring * ulysses).run(errors, case, ring, ulysses, scheme, "cpu", "auto"):
            assert max(found.values()) <= 1e-12, found


@pytest.mark.gpu(2)
@pytest.mark.parametrize("transport", ["collective", "copy"])
@pytest.mark.parametrize(("ring", "ulysses", "scheme"), MESHES[:3])
def test_late_transfers_on_devices(pool: Pools, ring: int, ulysses: int, scheme: str, transport: str) -> None:
    case = Case(DOCS, Mask(), (4, 2), (64, 64), torch.bfloat16)
    for found in pool(2, "cuda").run(errors, case, ring, ulysses, scheme, "cuda", transport, timeout=300):
        assert max(found.values()) <= 5e-3, found  # no NaN either


@pytest.mark.parametrize("ranks", [2, 4])
def test_late_transfers_of_parts(pool: Pools, ranks: int) -> None:
    case = Case(SMALL, Mask(), (4, 2), (8, 8), torch.float64)
    for found in pool(ranks).run(parted_errors, case, ranks, "cpu", "auto"):
        assert max(found.values()) <= 1e-12, found


@pytest.mark.gpu(2)
@pytest.mark.parametrize("transport", ["collective", "copy"])
def test_late_transfers_of_parts_on_devices(pool: Pools, transport: str) -> None:
    case = Case(DOCS, Mask(), (4, 2), (64, 64), torch.bfloat16)
    for found in pool(2, "cuda").run(parted_errors, case, 2, "cuda", transport, timeout=300):
        assert max(found.values()) <= 5e-3, found

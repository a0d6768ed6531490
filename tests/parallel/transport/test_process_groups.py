"""Meshes of one process share their groups, give them back, and say so to whoever goes on using them."""

import contextlib
import gc
import os
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ringattn import Documents, Layout, ParallelAttention, SequenceMesh, init_mesh, parallel_attention
from ringattn.parallel.machine.shipped import SHIPPED
from tests.parallel.machine.test_calibrate import TINY
from tests.pool import Pool, Pools

KINDS: list[dict[str, Any]] = [
    {"ring": 2},
    {"ulysses": 2},
    {"sequence": 2},
    {"ring": 2, "transport": "collective"},
    {"ring": 2, "captured": True},
]


def opened() -> tuple[int, int]:
    """File handles and threads of this process."""
    gc.collect()
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def attended(mesh: SequenceMesh) -> torch.Tensor:
    """The whole output and the key gradients of an attention, on every rank."""
    layout = Layout(Documents([20, 5, 7]), mesh)
    x = torch.randn(32, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(mesh.device)
    q, k, v = (layout.shard(x).clone().requires_grad_() for _ in range(3))
    out = parallel_attention(q, k, v, layout)
    out.square().sum().backward()
    assert k.grad is not None
    return layout.unshard(torch.stack([out.detach(), k.grad], 1))


def counted(data: int, close: bool) -> list[tuple[int, int]]:
    """What is open after 5 meshes of all kinds, and after 25 and 50, which are used and then dropped or closed."""
    found = []
    for number in range(1, 51):
        mesh = init_mesh(device_type="cpu", **KINDS[number % len(KINDS)] | {"data": data})
        if number % 5 == 0:
            attended(mesh)
        if close:
            mesh.close()
        del mesh
        if number in (5, 25, 50):
            found.append(opened())
    return found


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("close", [False, True])
def test_fifty_meshes_open_no_more_than_five(pool: Pools, world_size: int, close: bool) -> None:
    for first, *others in pool(world_size).run(counted, world_size // 2, close):
        assert others == [first, first]


def closed_leaves_nothing() -> tuple[tuple[int, int], tuple[int, int]]:
    meshes = [init_mesh(device_type="cpu", **kind) for kind in KINDS]
    for mesh in meshes:
        mesh.close()
    before = opened()
    with init_mesh(data=2, device_type="cpu") as mesh, init_mesh(ulysses=2, device_type="cpu") as other:
        assert dist.get_world_size(mesh.sequence_group) == 1
        assert dist.get_world_size(other.ulysses_group) == 2
    del mesh, other
    return before, opened()


def test_closed_meshes_leave_nothing_open() -> None:
    own = Pool(2)
    try:
        for before, after in own.run(closed_leaves_nothing):
            assert before == after
    finally:
        own.close()


def calibrated() -> list[tuple[int, int]]:
    found = []
    for _ in range(3):
        TINY._links(SHIPPED["CPU"], 2, 2)
        found.append(opened())
    return found


def test_measuring_links_leaves_nothing_open(pool: Pools) -> None:
    for first, *others in pool(2).run(calibrated):
        assert others == [first, first]


def on_devices(transport: str) -> list[torch.Tensor]:
    found = []
    for _ in range(3):
        with init_mesh(ring=2, device_type="cuda", transport=transport) as mesh:
            found.append(attended(mesh).cpu())
        with pytest.raises(ValueError, match="mesh was closed"):
            attended(mesh)
    return found


@pytest.mark.gpu(2)
@pytest.mark.parametrize("transport", ["collective", "copy"])
def test_meshes_of_devices_are_opened_and_closed_again(pool: Pools, transport: str) -> None:
    for first, *others in pool(2, "cuda").run(on_devices, transport, timeout=300):
        assert all(torch.equal(first, other) for other in others)


def shared() -> None:
    meshes = [init_mesh(device_type="cpu", **kind) for kind in KINDS]
    ring, ulysses, free, collective, captured = meshes
    assert ring == collective == captured
    assert ring.ring_group is collective.ring_group is captured.ring_group is free.alternatives[0].ring_group
    assert free.alternatives[1].ulysses_group is ulysses.ulysses_group
    assert len({id(mesh.sequence_group) for mesh in (*meshes, *free.alternatives)}) == 1
    assert ring.device_mesh == collective.device_mesh
    assert (ring.ring_reason, collective.ring_reason) == ("cpu devices have no copy engine", "not asked for")
    expected = attended(ring)
    ring.close()
    collective.close()
    collective.close()  # without effect
    assert [mesh.closed for mesh in meshes] == [True, False, False, True, False]
    for mesh in (captured, free, ulysses):
        torch.testing.assert_close(attended(mesh), expected, rtol=1e-12, atol=1e-12)
        mesh.close()
    assert all(mesh.closed for mesh in (*meshes, *free.alternatives))
    with init_mesh(device_type="cpu") as again:
        torch.testing.assert_close(attended(again), expected, rtol=1e-12, atol=1e-12)


def test_groups_go_with_the_last_mesh_that_uses_them(pool: Pools) -> None:
    pool(2).run(shared)


def used_after(what: str) -> None:
    free = what == "alternatives"
    with init_mesh(device_type="cpu", **({"sequence": 2} if free else {"ring": 2})) as mesh:
        layout = Layout(Documents([12, 6]), mesh)
        attention = ParallelAttention(mesh)
        q, k, v = (torch.ones(layout.tokens(), 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
        out, whole = attention(q, k, v, layout), layout.unshard(q, grad="partial")
        if what == "compiled":
            torch._dynamo.reset()
            attention = torch.compile(attention, backend="aot_eager", fullgraph=True)
            out = attention(q, k, v, layout)
    {
        "forward": lambda: attention(q, k, v, layout),
        "compiled": lambda: attention(q, k, v, layout),
        "backward": lambda: out.sum().backward(),
        "a new layout": lambda: parallel_attention(q, k, v, Layout(Documents([12, 6]), mesh)),
        "alternatives": lambda: parallel_attention(q, k, v, Layout(Documents([12, 6]), mesh.alternatives[0])),
        "unshard": lambda: layout.unshard(q),
        "its gradient": lambda: whole.sum().backward(),
        "group": lambda: mesh.ring_group,
        "transport": lambda: mesh.ring_transport,
        "device mesh": lambda: mesh.device_mesh["ring"],
        "sequence mesh": lambda: mesh.sequence_mesh.get_group(),
    }[what]()


@pytest.mark.parametrize(
    "what",
    ["forward", "compiled", "backward", "a new layout", "alternatives", "unshard", "its gradient", "group", "transport",
     "device mesh", "sequence mesh"],
)  # fmt: skip
def test_a_closed_mesh_says_so(pool: Pools, what: str) -> None:
    with pytest.raises(ValueError, match="mesh was closed"):
        pool(2).run(used_after, what)


def destroyed_by_others() -> None:
    mesh = init_mesh(device_type="cpu", data=2)
    dist.destroy_process_group(mesh.ring_group)
    with init_mesh(device_type="cpu", data=2) as other:
        assert other.ring_group is not mesh.ring_group
        token = torch.ones(1)
        dist.all_reduce(token, group=other.ring_group)
        assert dist.get_rank(other.ring_group) == 0
    mesh.close()


def test_groups_that_somebody_destroyed_are_made_again(pool: Pools) -> None:
    pool(2).run(destroyed_by_others)


def closed_alone() -> None:
    mesh = init_mesh(device_type="cpu", ring=2)
    if mesh.sequence_rank == 0:
        mesh.close()
    try:
        init_mesh(device_type="cpu", ring=2)
    finally:
        mesh.close()


def test_a_mesh_that_some_ranks_closed_is_told_about_on_all(pool: Pools) -> None:
    with pytest.raises(ValueError, match="ranks have different meshes open"):
        pool(2).run(closed_alone)
    pool(2).run(destroyed_by_others)


def another_world() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    first = init_mesh(device_type="cpu", data=2)
    layout = Layout(Documents([20]), first)
    names = first.ring_group.group_name
    dist.destroy_process_group()
    assert first.closed
    store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=60))
    dist.init_process_group("gloo", store=dist.PrefixStore("again", store), rank=rank, world_size=size)
    x = torch.ones(20, 2, 8)
    with pytest.raises(ValueError, match="default process group that it was made on is gone"):
        parallel_attention(x, x, x, layout)
    with init_mesh(device_type="cpu", data=2) as second:
        assert second.ring_group is not first.ring_group, names
        attended(second)
        first.close()  # whatever it still refers to is not of this world
        attended(second)


def test_nothing_of_an_earlier_default_group_is_found() -> None:
    own = Pool(2)
    try:
        own.run(another_world)
    finally:
        own.close()


def test_a_process_alone_can_begin_again() -> None:
    """There all axes have the default group, which `close` leaves alone."""
    mine = dist.is_initialized()
    try:
        for _ in range(2):
            with init_mesh(device_type="cpu") as mesh:
                attended(mesh)
            assert dist.is_initialized()
            with contextlib.suppress(ValueError):
                attended(mesh)
                pytest.fail("a closed mesh was used")
            if not mine:
                dist.destroy_process_group()
    finally:
        if dist.is_initialized() and not mine:
            dist.destroy_process_group()

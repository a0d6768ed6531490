"""Process groups of meshes: opened once for every way to part the ranks, destroyed with the last mesh that uses them.

torch keeps a group, with its sockets and threads, until it is destroyed, and making one is collective: so equal meshes
share theirs, and every rank must find the same. torch itself has no public way to ask for a group by its ranks, hence
the table. It belongs to the default group and is weak on both sides: it keeps no group, and another default group
begins with an empty one. It changes only in `init_mesh` and `close`, which all ranks call in the same order.
"""

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

AXES = ("data", "ring", "ulysses")
CLOSED = "mesh was closed, or the default process group that it was made on is gone: make another one with init_mesh"
Key = tuple[str, tuple[int, ...]]  # device type; sizes of the axes, or of data and sequence


@dataclass
class Shared:
    """The groups of one way to part the ranks, and how many open meshes use them."""

    groups: tuple[ReferenceType[dist.ProcessGroup], ...]
    users: int = 0

    def alive(self) -> list[dist.ProcessGroup]:
        """The groups, or none if one was destroyed by somebody else."""
        found = [group() for group in self.groups]
        groups = [group for group in found if group is not None and _registered(group)]
        return groups if len(groups) == len(found) else []


_open: WeakKeyDictionary[dist.ProcessGroup, dict[Key, Shared]] = WeakKeyDictionary()


class Lease:
    """What one `init_mesh` holds, for the mesh that it returns and for its alternatives."""

    def __init__(self) -> None:
        self._closed = False
        self._default: ReferenceType[dist.ProcessGroup] | None = None
        self._held: list[tuple[Key, Shared]] = []
        self._holders: list[ReferenceType[Any]] = []

    @property
    def closed(self) -> bool:
        """By `close`, or because the default group was destroyed."""
        return self._closed or (self._default is not None and self._default() is not dist.group.WORLD)

    def holds(self, connections: Any) -> None:
        """`connections.forget()` is called when the lease is closed, if they are still there."""
        self._holders.append(ref(connections))

    def axes(self, device_type: str, sizes: tuple[int, int, int]) -> DeviceMesh:
        """The mesh of these axes. Collective; initialises the default group if there is none."""
        groups = self._take(
            (device_type, sizes), lambda: init_device_mesh(device_type, sizes, mesh_dim_names=AXES).get_all_groups()
        )
        ranks = torch.arange(prod(sizes), device="cpu").view(sizes)
        return DeviceMesh.from_group(groups, device_type, mesh=ranks, mesh_dim_names=AXES)

    def sequence(self, mesh: DeviceMesh) -> DeviceMesh:
        """The ranks of both sequence axes of a mesh of `axes`, in one. Collective."""
        data, ring, ulysses = mesh.shape
        (group,) = self._take(
            (mesh.device_type, (data, ring * ulysses)),
            lambda: [mesh["ring", "ulysses"]._flatten("sequence").get_group()],
        )
        return DeviceMesh.from_group(group, mesh.device_type, mesh_dim_names=("sequence",))

    def _take(self, key: Key, make: Callable[[], Sequence[dist.ProcessGroup]]) -> list[dist.ProcessGroup]:
        shared = _table().get(key)
        groups = shared.alive() if shared is not None else []
        if shared is None or not groups:
            groups = list(make())
            shared = _table()[key] = Shared(tuple(map(ref, groups)))
        shared.users += 1
        self._default = ref(_default())
        self._held.append((key, shared))
        return groups

    def close(self) -> None:
        """Destroys the groups that no other lease holds. Without effect the second time."""
        if self._closed:
            return
        self._closed = True
        for holder in self._holders:
            if (found := holder()) is not None:
                found.forget()
        table = _table()
        for key, shared in self._held:
            shared.users -= 1
            if not shared.users:
                destroy(group for reference in shared.groups if (group := reference()) is not None)
                if table.get(key) is shared:
                    del table[key]


def destroy(groups: Iterable[dist.ProcessGroup]) -> None:
    """Destroys groups, but for the default one and those that somebody else has destroyed. Collective."""
    for group in groups:
        if _registered(group) and group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def check_alike(device: Callable[[], torch.device]) -> None:
    """Raises ValueError on every rank where ranks have different meshes open: they would wait for each other.

    Collective, but for the first mesh of a default group, before which this process has chosen no device perhaps.
    """
    if not dist.is_initialized() or dist.group.WORLD not in _open or dist.get_world_size() == 1:
        return
    mine = zlib.crc32(repr(sorted((key, shared.users) for key, shared in _table().items())).encode())
    bounds = torch.tensor([mine, -mine], device=device())
    dist.all_reduce(bounds, dist.ReduceOp.MAX)
    if bounds[0] != -bounds[1]:
        raise ValueError(
            "ranks have different meshes open: init_mesh and close are collective, every rank calls them in one order"
        )


def _table() -> dict[Key, Shared]:
    """What is open on the default group; a table that is kept nowhere if there is none."""
    return _open.setdefault(_default(), {}) if dist.is_initialized() else {}


def _default() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def _registered(group: dist.ProcessGroup) -> bool:
    try:
        return dist.get_rank(group) >= 0
    except (RuntimeError, ValueError):
        return False

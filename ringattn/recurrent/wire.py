"""What recurrences ask of the network: to gather something small from all ranks, and to exchange rows unevenly."""

from collections.abc import Sequence
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from ringattn.parallel.mesh.mesh import SequenceMesh
from ringattn.parallel.mesh.shape import MeshShape
from ringattn.whereabouts import comes_to


class Wire(Protocol):
    """Both calls are collective over the sequence ranks, in one order on all of them."""

    def gather(self, x: Tensor) -> Tensor:
        """Every rank's x (n, ...), of one shape: (ranks, n, ...)."""

    def exchange(self, send: Tensor, sends: Sequence[int], receives: Sequence[int]) -> Tensor:
        """Rows for every rank, end to end, (sum of sends, ...) -> every rank's rows for this one (sum of receives,
        ...)."""


class GroupWire:
    """By the collectives of a process group: gloo or NCCL."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def gather(self, x: Tensor) -> Tensor:
        comes_to("states")
        x = x.contiguous()
        rows = x.new_empty(dist.get_world_size(self.group), *x.shape)
        dist.all_gather(list(rows.unbind()), x, group=self.group)
        return rows

    def exchange(self, send: Tensor, sends: Sequence[int], receives: Sequence[int]) -> Tensor:
        comes_to("rows of a recurrence")
        received = send.new_empty(sum(receives), *send.shape[1:])
        dist.all_to_all_single(received, send.contiguous(), list(receives), list(sends), group=self.group)
        return received


class OneRank:
    """The network of a single rank: what it sends it has."""

    def gather(self, x: Tensor) -> Tensor:
        return x[None]

    def exchange(self, send: Tensor, sends: Sequence[int], receives: Sequence[int]) -> Tensor:
        return send


def wire_of(mesh: MeshShape) -> Wire:
    """The network between the sequence ranks of a mesh. Raises ValueError for several ranks without processes."""
    if mesh.sequence_size == 1:
        return OneRank()
    if not isinstance(mesh, SequenceMesh):
        raise ValueError(
            f"layout must be on a mesh of running processes (init_mesh), got {mesh}, which can only be planned for"
        )
    return GroupWire(mesh.sequence_group)

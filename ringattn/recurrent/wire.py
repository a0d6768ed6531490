"""What recurrences ask of the network, and images too: to exchange rows unevenly, and to compute something else
meanwhile."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ringattn.parallel.mesh.mesh import SequenceMesh
from ringattn.parallel.mesh.shape import MeshShape
from ringattn.whereabouts import comes_to


class Arriving(Protocol):
    """Rows under way."""

    def wait(self) -> Tensor:
        """They are there, for what this thread computes next. To be called once, on every rank."""


class Wire(Protocol):
    """Both calls are collective over the sequence ranks, in one order on all of them."""

    def start(self, send: Tensor, sends: Sequence[int], receives: Sequence[int]) -> Arriving:
        """Rows for every rank, end to end, (sum of sends, ...) -> every rank's rows for this one (sum of receives,
        ...), which arrive while something else is computed."""

    def exchange(self, send: Tensor, sends: Sequence[int], receives: Sequence[int]) -> Tensor:
        """The same, waited for."""


class GroupWire:
    """By the collectives of a process group: gloo or NCCL.

    Arguments:
        rows: what the rows of `exchange` are to who watches this rank, one of `whereabouts.TRANSFERS`.
    """

    def __init__(self, group: dist.ProcessGroup, rows: str) -> None:
        self.group, self.rows = group, rows

    def start(self, send: Tensor, sends: Sequence[int], receives: Sequence[int]) -> Arriving:
        send = send.contiguous()
        received = send.new_empty(sum(receives), *send.shape[1:])
        work = dist.all_to_all_single(received, send, list(receives), list(sends), group=self.group, async_op=True)
        return _Work(send, received, work)

    def exchange(self, send: Tensor, sends: Sequence[int], receives: Sequence[int]) -> Tensor:
        comes_to(self.rows)
        received = send.new_empty(sum(receives), *send.shape[1:])
        dist.all_to_all_single(received, send.contiguous(), list(receives), list(sends), group=self.group)
        return received


@dataclass(frozen=True)
class _Work:
    """A collective under way; what is sent stays until it has left."""

    send: Tensor
    received: Tensor
    work: dist.Work

    def wait(self) -> Tensor:
        comes_to("states")
        self.work.wait()
        return self.received


@dataclass(frozen=True)
class Here:
    """Rows that are there already."""

    rows: Tensor

    def wait(self) -> Tensor:
        return self.rows


class OneRank:
    """The network of a single rank: what it sends it has."""

    def start(self, send: Tensor, sends: Sequence[int], receives: Sequence[int]) -> Arriving:
        return Here(send)

    def exchange(self, send: Tensor, sends: Sequence[int], receives: Sequence[int]) -> Tensor:
        return send


def wire_of(mesh: MeshShape, rows: str = "rows of a recurrence") -> Wire:
    """The network between the sequence ranks of a mesh. Raises ValueError for several ranks without processes.

    Arguments:
        rows: as of `GroupWire`.
    """
    if mesh.sequence_size == 1:
        return OneRank()
    if not isinstance(mesh, SequenceMesh):
        raise ValueError(
            f"layout must be on a mesh of running processes (init_mesh), got {mesh}, which can only be planned for"
        )
    return GroupWire(mesh.sequence_group, rows)


def exchanged(x: Tensor, sends: Sequence[int], receives: Sequence[int], wire: Wire) -> Tensor:
    """`Wire.exchange` of rows, (sum of sends, ...) -> (sum of receives, ...), whose gradients go back. Collective in
    both directions."""
    found: Tensor = _Exchanged.apply(x, sends, receives, wire)
    return found


class _Exchanged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sends: Sequence[int], receives: Sequence[int], wire: Wire) -> Tensor:
        ctx.rest = sends, receives, wire
        received = wire.exchange(x, sends, receives)
        return received.view_as(received)  # a function may not return what it was given

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        sends, receives, wire = ctx.rest
        return wire.exchange(grads[0], receives, sends), None, None, None

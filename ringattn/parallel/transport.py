"""Moving tensors between the ranks of one mesh axis: post, then wait once. Buffers belong to the caller.

`x[list]` style staging, message order and sizes are the plan's business; a transport only moves what it is given.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist


class Pending(Protocol):
    """A transfer under way. `wait` may be called once, on the stream that will use the data."""

    def wait(self) -> None: ...


class Transport(Protocol):
    """What the executor asks of a transport. Peers are ranks of the axis; tensors are contiguous.

    `post` pairs up by order: the i-th tensor sent to a peer fills the i-th that the peer receives from here.
    """

    def post(
        self, sends: Sequence[tuple[int, torch.Tensor]], receives: Sequence[tuple[int, torch.Tensor]]
    ) -> Pending: ...

    def exchange(
        self, send: torch.Tensor, receive: torch.Tensor, send_sizes: list[int], receive_sizes: list[int]
    ) -> Pending: ...


class _Works:
    """Owns the works of one post and the tensors they read, until the wait."""

    def __init__(self, works: Sequence[dist.Work | None], tensors: Sequence[torch.Tensor]) -> None:
        self._works: list[dist.Work] | None = [work for work in works if work is not None]
        self._tensors = list(tensors)

    def wait(self) -> None:
        # gloo hangs when a point-to-point work is waited for twice.
        assert self._works is not None, "a transfer is waited for once"
        for work in self._works:
            work.wait()
        self._works = None
        self._tensors.clear()


class GroupTransport:
    """torch.distributed collectives and point-to-point of one process group: gloo and NCCL."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def post(self, sends: Sequence[tuple[int, torch.Tensor]], receives: Sequence[tuple[int, torch.Tensor]]) -> Pending:
        ops = [self._op(dist.isend, tensor, peer) for peer, tensor in sends if tensor.numel()]
        ops += [self._op(dist.irecv, tensor, peer) for peer, tensor in receives if tensor.numel()]
        works = dist.batch_isend_irecv(ops) if ops else []
        return _Works(works, [tensor for _, tensor in [*sends, *receives]])

    def _op(self, op: Callable[..., Any], tensor: torch.Tensor, peer: int) -> dist.P2POp:
        return dist.P2POp(op, tensor, group=self.group, group_peer=peer)

    def exchange(
        self, send: torch.Tensor, receive: torch.Tensor, send_sizes: list[int], receive_sizes: list[int]
    ) -> Pending:
        work = dist.all_to_all_single(receive, send, receive_sizes, send_sizes, group=self.group, async_op=True)
        return _Works([work], [send, receive])

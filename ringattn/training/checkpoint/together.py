"""Ranks that agree about a save, in a process group of their own: beside the training, which goes on meanwhile."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from ringattn.training.checkpoint.marker import BadCheckpoint
from ringattn.training.failures import FailedTogether

T = TypeVar("T")
_SHOWN = 3  # ranks whose reasons are said


class SaveFailed(FailedTogether):
    """A save failed on some rank, and so on all of them; the message names the ranks and their reasons."""

    restart = False  # whoever fills a disk has to make room first


class Together:
    """Does things on every rank that count only if all of them could. Making one is collective, and so are calls.

    It has a gloo group of its own, so that a thread may use it while the training uses others. One thread at a time.
    """

    def __init__(self) -> None:
        self._group: Any = dist.new_group(backend="gloo")
        self.rank, self.count = dist.get_rank(), dist.get_world_size()

    def __call__(self, do: Callable[[], T]) -> list[T]:
        """What `do` returns, by rank.

        Raises SaveFailed on every rank if a disk, or a file on it, failed on one. Whatever else a rank raises passes on
        that rank, and is a SaveFailed on the others.
        """
        mine: Any = None
        other: Exception | None = None
        reason = ""
        try:
            mine = do()
        except (OSError, BadCheckpoint, MemoryError) as error:
            reason = described(error)
        except Exception as error:
            reason, other = f"{type(error).__name__}: {error}", error
        told = self.gather((mine, reason))
        if other is not None:
            raise other
        reasons = [f"rank {rank}: {why}" for rank, (_, why) in enumerate(told) if why]
        if reasons:
            more = f"; and {len(reasons) - _SHOWN} more ranks" if len(reasons) > _SHOWN else ""
            raise SaveFailed("; ".join(reasons[:_SHOWN]) + more)
        return [value for value, _ in told]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, by rank."""
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self._group)
        return values

    def send(self, tensor: Tensor, rank: int) -> dist.Work:
        """Begins to send a tensor of the host, which stays as it is until the work is done, to a rank that takes it."""
        work = dist.isend(tensor, rank, group=self._group)
        assert work is not None
        return work

    def take(self, tensor: Tensor, rank: int) -> dist.Work:
        """Begins to take what a rank sends."""
        work = dist.irecv(tensor, rank, group=self._group)
        assert work is not None
        return work

    def close(self) -> None:
        """Ends the group."""
        dist.destroy_process_group(self._group)


def described(error: BaseException) -> str:
    """What a disk or a file had to say, in a line."""
    if not isinstance(error, OSError):
        return str(error) or type(error).__name__
    said = error.strerror or str(error)
    return f"{said}: {error.filename}" if error.filename else said

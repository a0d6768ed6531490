"""What a machine has, and whether a plan fits it."""

from dataclasses import dataclass

from ringattn.memory.planning.alive import Alive

GIB = 2**30
OUTSIDE = 3 * 2**29  # bytes: a CUDA context, loaded kernels and NCCL's buffers, beside torch's allocator
PROCESS = 4 * GIB  # host memory of a rank's process beside what is planned: libraries, data, staging


@dataclass(frozen=True)
class Limits:
    """What a machine has.

    Arguments:
        gpu: bytes of one GPU.
        host: bytes of one host, for all its ranks; None: as much as is wanted.
        ranks_per_host: that share it.
        margin: share of either that stays free: the allocator cannot use every gap, and a plan may be off by 5 %.
        outside: bytes on a GPU that are not of torch's allocator.
    """

    gpu: float
    host: float | None = None
    ranks_per_host: int = 8
    margin: float = 0.05
    outside: float = OUTSIDE

    def __post_init__(self) -> None:
        if not self.gpu > 0:
            raise ValueError(f"gpu must be bytes > 0, got {self.gpu!r}")
        if self.host is not None and not self.host > 0:
            raise ValueError(f"host must be bytes > 0 or None, got {self.host!r}")
        if not 0 <= self.margin < 1:
            raise ValueError(f"margin must be a share from 0 to 1, got {self.margin!r}")

    @property
    def device_room(self) -> float:
        """Bytes that torch's allocator may have on a GPU."""
        return self.gpu * (1 - self.margin) - self.outside

    def host_room(self, ranks: int) -> float:
        """Bytes of pinned memory that one of so many ranks may have."""
        if self.host is None:
            return float("inf")
        return max(0.0, self.host * (1 - self.margin) / min(ranks, self.ranks_per_host) - PROCESS)

    def lacking(self, alive: Alive) -> str:
        """What does not fit, in words; "" if all does."""
        device, room = alive.peak().total + alive.outside, self.device_room
        host, host_room = sum(alive.host.values()), self.host_room(alive.run.ranks)
        told = []
        if device > room:
            told.append(f"{device / GIB:.1f} GiB of GPU memory, {max(0.0, room) / GIB:.1f} are there")
        if host > host_room:
            told.append(f"{host / GIB:.1f} GiB of host memory, {host_room / GIB:.1f} are there for a rank")
        return "; ".join(told)

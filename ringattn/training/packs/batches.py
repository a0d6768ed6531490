"""Global batches: which packs a data-parallel replica computes in a step, prefetched by a thread."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from ringattn.training.packs.packers import AnyPacker, Saved
from ringattn.training.packs.packing import PackPlan, counted
from ringattn.training.packs.sharing import AnyPack, read

T = TypeVar("T")


@dataclass(frozen=True)
class Counts:
    """What a step asks about the packs of all replicas, counted where batches are made.

    Counted in the step, a device would wait for milliseconds where there are thousands of documents, and the host would
    look at all of them again in each micro-step.

    Arguments:
        targets: target tokens of each pack.
        tokens: of all packs, without padding.
        lengths: of all documents.
        digest: of what the packs hold, the same in every process: 0 to below 2^64.
    """

    targets: tuple[int, ...]
    tokens: int
    lengths: list[int]
    digest: int

    @classmethod
    def of(cls, plans: Sequence[PackPlan]) -> "Counts":
        """Of a global batch."""
        targets = tuple(plan.targets for plan in plans)
        # Of integers alone: Python's hash of a text, or before 3.12 of None, is another one in each process.
        packs = tuple((plan.segments, plan.seq_len, count) for plan, count in zip(plans, targets, strict=True))
        lengths = [length for plan in plans for length in plan.docs.lengths]
        return cls(targets, sum(plan.tokens for plan in plans), lengths, hash(packs) % 2**64)


@dataclass(frozen=True)
class Batch(Generic[T]):
    """One optimiser step of one replica, with the integers of the whole global batch.

    Arguments:
        micro: this replica's packs, one per micro-step, after `prepare`.
        plans: the packs of all replicas, in the packer's order.
        position: of the stream after this batch: a checkpoint written after this step stores it.
        epoch: passes over the corpus after this batch, as in 1.25.
        counts: of `plans`.
    """

    micro: tuple[T, ...]
    plans: tuple[PackPlan, ...]
    position: Saved
    epoch: float
    counts: Counts

    @property
    def targets(self) -> int:
        """Target tokens of the global batch: what the loss is divided by, on every rank alike."""
        return sum(self.counts.targets)

    def targets_of(self, replica: int, replicas: int) -> int:
        """Target tokens of one replica's packs."""
        return sum(self.counts.targets[replica::replicas])

    @property
    def tokens(self) -> int:
        """Tokens of the global batch, without padding."""
        return self.counts.tokens

    @property
    def lengths(self) -> list[int]:
        """Lengths of all documents of the global batch."""
        return self.counts.lengths


def batches(
    packer: AnyPacker,
    packs_per_step: int,
    replica: int,
    replicas: int,
    prepare: Callable[[AnyPack], T],
    share: bool = False,
) -> Iterator[Batch[T]]:
    """Endless batches of `packs_per_step` packs; replica d computes pack m * replicas + d in micro-step m.

    So the packs of a step, and with them the loss curve, depend neither on the number of replicas nor on the sequence
    size. Raises ValueError if `packs_per_step` is no multiple of `replicas`.

    Arguments:
        share: common prefixes of a pack's documents are computed once.
    """
    if packs_per_step % replicas:
        raise ValueError(f"packs_per_step {packs_per_step} is no multiple of the {replicas} data-parallel replicas")
    while True:
        planned = (replace(plan, shared=share) for plan in packer.step(packs_per_step))
        plans = tuple(counted(plan, packer.corpus) for plan in planned)
        mine = tuple(prepare(read(plan, packer.corpus)) for plan in plans[replica::replicas])
        yield Batch(mine, plans, packer.position, packer.epoch, Counts.of(plans))


class Prefetcher(Generic[T]):
    """Runs an iterator in a thread, `depth` items ahead; an error in it is raised where the item would have come.

    Use it as a context manager: leaving it ends the thread.
    """

    def __init__(self, source: Iterator[T], depth: int = 2) -> None:
        self._queue: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(source,), name="prefetch", daemon=True)
        self._thread.start()

    def _work(self, source: Iterator[T]) -> None:
        try:
            for item in source:
                if not self._put((item, None)):
                    return
        except BaseException as error:
            self._put((None, error))
        else:
            self._put((None, StopIteration()))

    def _put(self, entry: tuple[T | None, BaseException | None]) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(entry, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def __iter__(self) -> "Prefetcher[T]":
        return self

    def __next__(self) -> T:
        item, error = self._queue.get()
        if error is not None:
            self._put((None, error))  # asked again, it says the same
            raise error
        assert item is not None
        return item

    def __enter__(self) -> "Prefetcher[T]":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=10)

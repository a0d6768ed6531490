"""Data loaders whose batches are dealt to replicas: every rank of a replica gets the same, every row is read once.

Of D replicas with b rows a batch, round i takes the batches i·D to i·D + D - 1 of the stream that one process reads, or
the next D·b rows of a data set without indices: together the batch that one process of D·b rows would take. The last
round may be short; nothing is read twice to fill it.
"""

from collections.abc import Iterator
from functools import partial
from itertools import count, islice
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, get_worker_info
from transformers.trainer_utils import seed_worker

from ringattn.hf.trainer.randomness import Stream, seed_draws, set_aside
from ringattn.parallel.mesh.mesh import SequenceMesh

# How classes that deal rows themselves name the number of those that they deal to, and which one they are for.
SHARES = (("num_replicas", "rank"), ("num_processes", "process_index"), ("dp_size", "rank"))
KEPT = ("num_workers", "collate_fn", "pin_memory", "timeout", "multiprocessing_context", "prefetch_factor",
        "persistent_workers", "in_order")  # fmt: skip


def with_loaders_kept(accelerator: Any, make: Any, *args: Any) -> Any:
    """The data loader that `make(*args)` returns, as it is before Accelerate deals it to all ranks."""
    prepare = accelerator.prepare

    def keep(first: Any, *rest: Any, **keywords: Any) -> Any:
        return first if not rest and isinstance(first, DataLoader) else prepare(first, *rest, **keywords)

    def keep_loader(loader: DataLoader, *_: Any, **__: Any) -> DataLoader:
        return loader

    accelerator.prepare, accelerator.prepare_data_loader = keep, keep_loader
    try:
        return make(*args)
    finally:
        del accelerator.prepare, accelerator.prepare_data_loader


def deal(loader: DataLoader, mesh: SequenceMesh, seed: int, seedable: bool = True) -> DataLoader:
    """The loader of this rank's replica.

    Arguments:
        loader: the loader of the whole data set, the same on every rank. If its sampler deals rows by itself it must
            deal them to replicas: `num_replicas=mesh.data, rank=mesh.data_rank`.
        seed: of everything that is drawn for data. A collator draws anew for every batch, the same on all ranks of
            the replica and whenever this batch is read again.
        seedable: shuffle as Accelerate does for any number of processes, rather than as torch does.

    Raises ValueError if the sampler or the data set deals rows to others than the replicas.
    """
    from accelerate.data_loader import DataLoaderShard, SeedableRandomSampler

    if not isinstance(loader, DataLoader):
        raise ValueError(f"the data loader must be a torch.utils.data.DataLoader, got {type(loader).__name__}")
    options = {name: getattr(loader, name) for name in KEPT}
    options["worker_init_fn"] = _of_replica(loader.worker_init_fn, mesh)
    place = Place(mesh, seed, dealt=already_dealt(loader, mesh))
    if isinstance(loader.dataset, IterableDataset):
        rows = ReplicaRows(loader.dataset, loader.batch_size or 1, loader.drop_last, place)
        return DataLoaderShard(rows, batch_size=loader.batch_size, generator=place.generator, **options)
    batches: Any = loader.batch_sampler
    if batches is None:
        raise ValueError("the data loader must have batches, got batch_size=None for a data set with indices")
    sampler = getattr(batches, "sampler", None)
    if seedable and isinstance(sampler, RandomSampler):
        batches.sampler = SeedableRandomSampler(
            sampler.data_source, sampler.replacement, sampler._num_samples, torch.Generator(), data_seed=seed
        )
    if hasattr(batches, "dp_size"):
        batches = rebalanced(batches, mesh)
    return DataLoaderShard(
        loader.dataset, batch_sampler=ReplicaBatches(batches, place), generator=place.generator, **options
    )


def already_dealt(loader: DataLoader, mesh: SequenceMesh) -> bool:
    """Whether the loader's sampler or data set gives this replica its own rows. Raises ValueError if another's."""
    batches = loader.batch_sampler
    inner = (getattr(batches, name, None) for name in ("sampler", "batch_sampler"))
    parts = [batches, loader.sampler, loader.dataset, *inner]
    found = [(part, share) for part in parts if (share := _share(part)) is not None]
    for part, (number, index) in found:
        if hasattr(part, "dp_size"):
            return True  # made again for the replicas, see `rebalanced`
        if number > 1 and (number, index) != (mesh.data, mesh.data_rank):
            raise ValueError(
                f"{type(part).__name__} deals rows to {number} ranks of which this is {index}, expected the replicas: "
                f"{mesh.data} of which this is {mesh.data_rank} (mesh.data, mesh.data_rank), or all rows on every rank"
            )
    return any(number > 1 for _, (number, _) in found)


def rebalanced(sampler: Any, mesh: SequenceMesh) -> Any:
    """transformers' BatchRebalanceSampler over the replicas, without the rows that it repeats in a short last step."""

    class Rebalanced(type(sampler)):  # type: ignore[misc]
        def __iter__(self) -> Iterator[list[int]]:
            self.read: set[int] = set()
            return super().__iter__()

        def _yield_global_batch(self, rows: list[int]) -> Iterator[list[int]]:
            parts = self._assign(rows, [self.lengths[row] for row in rows])
            left = {row for row in rows if row not in self.read}
            self.read |= left
            for part in range(self.grad_accum):
                for rank in range(self.dp_size):
                    taken = [row for row in parts[rank][part] if row in left]
                    left.difference_update(taken)
                    if taken and rank == self.rank:
                        yield taken

    size = sampler.effective_batch_size // sampler.dp_size * mesh.data
    return Rebalanced(
        sampler.lengths, size, mesh.data, sampler.grad_accum, rank=mesh.data_rank, shuffle=sampler.shuffle,
        seed=sampler.seed, drop_last=sampler.drop_last,
    )  # fmt: skip


class Place:
    """Which replica a loader is for, and the seeds of what it draws.

    Arguments:
        dealt: what the loader reads is this replica's alone.
    """

    def __init__(self, mesh: SequenceMesh, seed: int, dealt: bool) -> None:
        self.number, self.index = (1, 0) if dealt else (mesh.data, mesh.data_rank)
        self.seed, self.replica, self.epoch = seed, mesh.data_rank, 0
        self.generator = torch.Generator()  # seeds workers at the start of an epoch
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        with set_aside():
            seed_draws(self.seed, epoch, self.replica)
            self.generator.manual_seed(torch.default_generator.initial_seed())

    def order(self, *more: int) -> Stream:
        """What draws the order of rows, the same on all replicas."""
        return Stream(self.seed, self.epoch, *more)

    def begin_batch(self, number: int, *more: int) -> None:
        """What reads and collates a batch draws from here on: the same on all ranks of a replica."""
        seed_draws(self.seed, self.epoch, self.replica, number, *more)


class ReplicaBatches(BatchSampler):
    """Batches of indices of one replica.

    A loader without workers asks for the indices of a batch right before it reads the rows: there the draws of this
    batch begin.
    """

    def __init__(self, batches: Any, place: Place) -> None:
        self.batches, self.place = batches, place
        self.batch_size: Any = getattr(batches, "batch_size", None)
        self.drop_last = getattr(batches, "drop_last", False)

    def set_epoch(self, epoch: int) -> None:
        self.place.set_epoch(epoch)
        parts: list[Any] = [self.batches, getattr(self.batches, "sampler", None)]
        for part in parts:
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)

    def __len__(self) -> int:
        rounds, rest = divmod(len(self.batches), self.place.number)
        return rounds + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        place, order = self.place, self.place.order()
        with order:
            batches = iter(self.batches)
        for number in count():
            with order:
                taken = list(islice(batches, place.number))
            if not taken or (self.drop_last and len(taken) < place.number):
                return
            if place.index < len(taken):
                place.begin_batch(number)
                yield taken[place.index]


class ReplicaRows(IterableDataset):
    """Rows of one replica from a data set without indices; b of them make a batch."""

    def __init__(self, rows: IterableDataset, b: int, drop_last: bool, place: Place) -> None:
        self.rows, self.b, self.drop_last, self.place = rows, b, drop_last, place

    def set_epoch(self, epoch: int) -> None:
        self.place.set_epoch(epoch)
        generator = getattr(self.rows, "generator", None)
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)
        elif self.place.number > 1 and isinstance(generator, torch.Generator):
            generator.manual_seed(epoch)  # as Accelerate does for several processes

    def __len__(self) -> int:
        rounds, rest = divmod(len(self.rows), self.b * self.place.number)  # type: ignore[arg-type]
        return self.b * (rounds + (rest > 0 and not self.drop_last))

    def __iter__(self) -> Iterator[Any]:
        place, worker = self.place, get_worker_info()
        more = () if worker is None else (worker.id,)
        order = place.order(*more)
        with order:
            rows = iter(self.rows)
        for number in count():
            with order:
                taken = list(islice(rows, self.b * place.number))
            if not taken or (self.drop_last and len(taken) < self.b * place.number):
                return
            if mine := taken[self.b * place.index : self.b * (place.index + 1)]:
                place.begin_batch(number, *more)
                yield from mine


def _share(part: Any) -> tuple[int, int] | None:
    """To how many ranks a sampler or data set deals its rows, and which of them this one is for."""
    part = getattr(part, "_distributed", None) or part  # a streaming data set of the library datasets
    for number, index in (*SHARES, ("world_size", "rank")):
        share = getattr(part, number, None), getattr(part, index, None)
        if all(isinstance(x, int) for x in share):
            return share  # type: ignore[return-value]
    return None


def _of_replica(start_worker: Any, mesh: SequenceMesh) -> Any:
    """The stock seed of workers is one of the rank; ranks of a sequence must draw the same."""
    if isinstance(start_worker, partial) and start_worker.func is seed_worker:
        return partial(seed_worker, **(start_worker.keywords | {"rank": mesh.data_rank}))
    return start_worker

"""A data loader as all replicas see it: as many batches on each, and of one length."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from transformers.trainer_utils import has_length

from ringattn.hf.trainer.agreement import Batch, Check, in_step
from ringattn.parallel.mesh.mesh import SequenceMesh


class Lockstep:
    """Collective to make and to iterate over. Everything else is the loader's own.

    Arguments:
        seed: of the order of rows, which all ranks must share.
        check: raises ValueError for a batch that the model cannot take.

    Raises ValueError on every rank if ranks have other seeds, ranks of a sequence other numbers of batches, or
    replicas other numbers of batches of one data set.
    """

    def __init__(self, loader: DataLoader, mesh: SequenceMesh, seed: int, check: Check) -> None:
        self.loader, self.mesh, self.check = loader, mesh, check
        self.lengths = _agreed_lengths(loader, mesh, seed)

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self.loader)
        while found := in_step(batches, 1, self.mesh, self.check):
            yield found[0]

    def __len__(self) -> int:
        if self.lengths is None:
            raise TypeError("the data set has no length")
        return self.lengths

    def __getattr__(self, name: str) -> Any:
        if name in ("loader", "lengths"):  # not made yet
            raise AttributeError(name)
        return getattr(self.loader, name)


def _agreed_lengths(loader: DataLoader, mesh: SequenceMesh, seed: int) -> int | None:
    """Batches of the replica that has most; None without a length. Collective over all ranks."""
    told = torch.tensor([len(loader) if has_length(loader) else -1, seed], device=mesh.device)
    every = [torch.empty_like(told) for _ in range(dist.get_world_size())]
    dist.all_gather(every, told)
    lengths, seeds = zip(*(tuple(rank.tolist()) for rank in every), strict=True)
    if len(set(seeds)) > 1:
        raise ValueError(f"data_seed (or seed) must be the same on every rank, got {list(seeds)}")
    place = getattr(loader.dataset, "place", None) or getattr(loader.batch_sampler, "place", None)
    size = mesh.sequence_size * (1 if place is None else place.number)  # ranks that hold the same data set
    for start in range(0, len(lengths), size):
        if len(set(lengths[start : start + size])) > 1:
            raise ValueError(
                f"ranks must be given the same data set, rows are dealt to replicas here; got loaders of "
                f"{list(lengths)} batches"
            )
    return max(lengths) if max(lengths) >= 0 else None

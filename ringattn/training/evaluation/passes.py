"""One pass over documents in packs: every document once, dealt to the replicas, scored by the sequence ranks together.

Legend: T tokens of a pack, t of this rank.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from ringattn.documents import Documents
from ringattn.parallel.layout import Layout
from ringattn.parallel.mesh.mesh import SequenceMesh
from ringattn.training.evaluation.scoring import Scorer, TokenScores
from ringattn.training.packing import NO_TARGET

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ScoredPack:
    """A pack of documents as it is given to the model.

    Arguments:
        documents: numbers of its documents, in order.
        ids, targets: (T,) int64, targets shifted already, -100 for none.
        docs: where the documents are.
    """

    documents: tuple[int, ...]
    ids: Tensor
    targets: Tensor
    docs: Documents


@dataclass(frozen=True)
class LocalScores:
    """What this rank knows of a pack after it was scored: of each of its t tokens, all on the device.

    Arguments:
        pack: None for a replica that had none left, whose t tokens are padding.
        scores: of the targets.
        targets: (t,) int64.
    """

    pack: ScoredPack | None
    layout: Layout
    scores: TokenScores
    targets: Tensor

    @cached_property
    def positions(self) -> Tensor:
        """Of each token in its document, (t,) int64."""
        return self.layout.position_ids(self.targets.device)

    @cached_property
    def documents(self) -> Tensor:
        """Number of the document of each token, (t,) int64; of padding any."""
        if self.pack is None:
            return torch.zeros_like(self.targets)
        starts = torch.tensor(self.pack.docs.starts, device="cpu")
        place = torch.searchsorted(starts, self.layout.indices(), right=True) - 1
        numbers = torch.tensor(self.pack.documents, device="cpu")
        return numbers[place].to(self.targets.device)


def packs_of(lengths: Sequence[int], room: int) -> list[tuple[int, ...]]:
    """Which documents share a pack: in order, as many as have room; one longer than `room` has a pack of its own."""
    packs: list[tuple[int, ...]] = []
    current: list[int] = []
    taken = 0
    for number, length in enumerate(lengths):
        if current and taken + length > room:
            packs.append(tuple(current))
            current, taken = [], 0
        current.append(number)
        taken += length
    return [*packs, tuple(current)] if current else packs


def pack_documents(
    lengths: Sequence[int], read: Callable[[int], Ids], wanted: Callable[[int], slice], room: int
) -> Iterator[Callable[[], ScoredPack]]:
    """Packs of documents, each made when it is called for: a rank reads only those of its replica.

    Arguments:
        lengths: tokens of each document.
        read: the tokens of a document.
        wanted: which tokens of a document are targets: `slice(None)` is all but the first, which nothing precedes.
        room: tokens of a pack.
    """
    for numbers in packs_of(lengths, room):

        def make(numbers: tuple[int, ...] = numbers) -> ScoredPack:
            ids = [read(number) for number in numbers]
            targets = [_targets(tokens, wanted(number)) for number, tokens in zip(numbers, ids, strict=True)]
            return ScoredPack(
                numbers,
                torch.from_numpy(np.concatenate(ids)),
                torch.from_numpy(np.concatenate(targets)),
                Documents([len(tokens) for tokens in ids]),
            )

        yield make


def _targets(ids: Ids, wanted: slice) -> Ids:
    labels = np.full_like(ids, NO_TARGET)
    labels[wanted] = ids[wanted]
    return np.append(labels[1:], NO_TARGET) if len(ids) else labels


def scored(scorer: Scorer, packs: Iterator[Callable[[], ScoredPack]]) -> Iterator[LocalScores]:
    """Scores every pack once; replica d has pack d, d + data, ... Collective: as many turns on every rank.

    A replica that has none left takes part with padding, since an engine gathers weights from all ranks.
    """
    mesh = scorer.mesh
    made = [*packs]
    for first in range(0, len(made), mesh.data):
        number = first + mesh.data_rank
        pack = made[number]() if number < len(made) else None
        yield _score(scorer, pack)


def _score(scorer: Scorer, pack: ScoredPack | None) -> LocalScores:
    device = scorer.mesh.device
    if pack is None:
        layout = scorer.layout(Documents([], total=scorer.mesh.sequence_size))
        ids = torch.zeros(layout.tokens(), dtype=torch.int64)
        targets = torch.full_like(ids, NO_TARGET)
    else:
        layout = scorer.layout(pack.docs)
        ids, targets = layout.shard(pack.ids), layout.shard(pack.targets)
    return LocalScores(pack, layout, scorer(layout, ids, targets), targets.to(device))


@dataclass
class Totals:
    """Sums over tokens in bins (documents, positions), first of this rank and then of all.

    Arguments:
        logprob, chosen, count: (bins,) float64: sums of the log-probabilities of targets, of those that the model would
            have chosen, and of targets.
    """

    bins: int
    mesh: SequenceMesh
    sums: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.sums = torch.zeros(3, self.bins, dtype=torch.float64, device=self.mesh.device)

    def add(self, local: LocalScores, bins: Tensor) -> None:
        """Adds a pack's tokens, each to its bin (t,)."""
        there = (local.targets != NO_TARGET).double()
        for row, values in enumerate((local.scores.logprob.double(), local.scores.chosen.double(), there)):
            self.sums[row].index_add_(0, bins, values * there)

    def over_ranks(self) -> tuple[Any, Any, Any]:
        """(logprob, chosen, count) of all ranks, (bins,) float64 arrays. Collective; call it once."""
        dist.all_reduce(self.sums)
        logprob, chosen, count = self.sums.cpu().numpy()
        return logprob, chosen, count

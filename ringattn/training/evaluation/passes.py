"""One pass over documents in packs: every document once, dealt to the replicas, scored by the sequence ranks together.

Legend: T tokens of a pack, t of this rank.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
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
from ringattn.training.packs.packing import NO_TARGET

Ids = npt.NDArray[np.int64]


NO_BIN = -1


@dataclass(frozen=True)
class ScoredPack:
    """A pack of documents as it is given to the model.

    Arguments:
        documents: numbers of its documents, in order.
        ids, targets: (T,) int64, targets shifted already, -100 for none.
        bins: (T,) int64, where the score of each target is added; -1 where there is no target.
        docs: where the documents are.
    """

    documents: tuple[int, ...]
    ids: Tensor
    targets: Tensor
    bins: Tensor
    docs: Documents


@dataclass(frozen=True)
class LocalScores:
    """What this rank knows of a pack after it was scored: of each of its t tokens, all on the device.

    Arguments:
        pack: None for a replica that had none left, whose t tokens are padding.
        scores: of the targets.
        targets, bins: (t,) int64.
    """

    pack: ScoredPack | None
    layout: Layout
    scores: TokenScores
    targets: Tensor
    bins: Tensor

    @cached_property
    def positions(self) -> Tensor:
        """Of each token in its document, (t,) int64."""
        return self.layout.position_ids(self.targets.device)


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
    lengths: Sequence[int], read: Callable[[int], Ids], bins: Callable[[int], Ids], room: int
) -> Iterator[Callable[[], ScoredPack]]:
    """Packs of documents, each made when it is called for: a rank reads only those of its replica.

    Arguments:
        lengths: tokens of each document.
        read: the tokens of a document, (n,).
        bins: for each token of a document the bin of its score, (n,); -1 for one that is no target. The first token,
            which nothing precedes, never is.
        room: tokens of a pack.
    """

    def make(numbers: tuple[int, ...]) -> ScoredPack:
        parts = [(read(number), bins(number)) for number in numbers]
        shifted = [_shifted(ids, of) for ids, of in parts]
        ids, targets, marks = (
            torch.from_numpy(np.concatenate(one))
            for one in ([ids for ids, _ in parts], [one for one, _ in shifted], [one for _, one in shifted])
        )
        return ScoredPack(numbers, ids, targets, marks, Documents([len(ids) for ids, _ in parts]))

    return (partial(make, numbers) for numbers in packs_of(lengths, room))


def _shifted(ids: Ids, bins: Ids) -> tuple[Ids, Ids]:
    """Targets and bins of a document, each at the token before."""
    if not len(ids):
        return ids, bins
    wanted = bins[1:] != NO_BIN
    return np.append(np.where(wanted, ids[1:], NO_TARGET), NO_TARGET), np.append(bins[1:], NO_BIN)


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
        ids = torch.zeros(layout.tokens(), dtype=torch.int64, device="cpu")
        targets, bins = torch.full_like(ids, NO_TARGET), torch.full_like(ids, NO_BIN)
    else:
        layout = scorer.layout(pack.docs)
        ids, targets, bins = (layout.shard(x) for x in (pack.ids, pack.targets, pack.bins))
    return LocalScores(pack, layout, scorer(layout, ids, targets), targets.to(device), bins.to(device))


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

    def add(self, local: LocalScores, bins: Tensor | None = None) -> None:
        """Adds a pack's targets, each to its bin, or to those of `bins` (t,)."""
        there = local.targets != NO_TARGET
        at = (local.bins if bins is None else bins)[there]
        ones = torch.ones_like(at, dtype=torch.float64)
        for row, values in enumerate((local.scores.logprob[there].double(), local.scores.chosen[there].double(), ones)):
            self.sums[row].index_add_(0, at, values)

    def over_ranks(self) -> tuple[Any, Any, Any]:
        """(logprob, chosen, count) of all ranks, (bins,) float64 arrays. Collective; call it once."""
        dist.all_reduce(self.sums)
        logprob, chosen, count = self.sums.cpu().numpy()
        return logprob, chosen, count

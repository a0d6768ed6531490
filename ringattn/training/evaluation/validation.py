"""Validation during training: the mean loss over all targets of held-out sets, of any size, with nothing gathered."""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from ringattn.parallel.mesh.mesh import SequenceMesh
from ringattn.training.data.corpus import Corpus
from ringattn.training.evaluation.passes import NO_BIN, ScoredPack, Totals, scored
from ringattn.training.evaluation.scoring import Scorer
from ringattn.training.packs.packing import NO_TARGET, PackPlan, Segment, read_pack


class Validation:
    """The validation sets of a run, and when to look at them.

    Arguments:
        sets: by name.
        seq_len: tokens of a pack: longer documents are split, as in training.
        every: steps between two looks; 0: only after the last step.
        steps: of the run.
    """

    def __init__(
        self,
        sets: Mapping[str, Corpus],
        model: nn.Module,
        mesh: SequenceMesh,
        seq_len: int,
        every: int,
        steps: int,
        policy: str = "auto",
    ) -> None:
        self.sets, self.seq_len, self.every, self.steps = sets, seq_len, every, steps
        self._scorer = Scorer(model, mesh, policy) if sets else None

    def due(self, step: int) -> bool:
        """Whether it is their turn after so many steps."""
        return bool(self.sets) and (step == self.steps or (self.every > 0 and step % self.every == 0))

    def losses(self, step: int) -> dict[str, float] | None:
        """Mean loss of each set after `step` steps, the same on every rank; None if it is not their turn. Collective.

        Random states and the mode of the model are as they were afterwards.
        """
        if self._scorer is None or not self.due(step):
            return None
        try:
            return {name: mean_loss(self._scorer, corpus, self.seq_len) for name, corpus in self.sets.items()}
        finally:
            let_go(self._scorer.model)


def mean_loss(scorer: Scorer, corpus: Corpus, seq_len: int) -> float:
    """The mean over all targets of a corpus, in nats: all tokens that one of their document precedes. Collective.

    Each rank adds up the losses of its own tokens in float64; two numbers a rank are all that is sent.

    Arguments:
        seq_len: tokens of a pack; a longer document is split, and what follows does not see what came before.
    """
    totals = Totals(1, scorer.mesh)
    for local in scored(scorer, _packs(corpus, seq_len)):
        totals.add(local)
    logprob, _, count = totals.over_ranks()
    return -float(logprob[0]) / float(count[0]) if count[0] else math.nan


def plans(corpus: Corpus, seq_len: int) -> Iterator[PackPlan]:
    """Packs of `seq_len` tokens that hold every document once, in order, the last one padded."""
    segments: list[Segment] = []
    room = seq_len
    for document in range(len(corpus)):
        length, offset = corpus.length(document), 0
        while offset < length:
            stop = min(length, offset + room)
            segments.append(Segment(document, offset, stop, stop == length))
            room -= stop - offset
            offset = stop
            if room == 0:
                yield PackPlan(tuple(segments), seq_len)
                segments, room = [], seq_len
    if segments:
        yield PackPlan(tuple(segments), seq_len)


def _packs(corpus: Corpus, seq_len: int) -> Iterator[Callable[[], ScoredPack]]:
    def make(plan: PackPlan) -> ScoredPack:
        pack = read_pack(plan, corpus)
        bins = torch.where(pack.labels == NO_TARGET, NO_BIN, 0)
        return ScoredPack(tuple(one.document for one in plan.segments), pack.tokens, pack.labels, bins, pack.docs)

    return (partial(make, plan) for plan in plans(corpus, seq_len))


def let_go(model: nn.Module) -> None:
    """Lets weights go that FSDP2 gathered and would keep for a backward pass, which does not come: kept, they would be
    old ones if a checkpoint were loaded next."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()

"""What is measured with scores: right answers, loss by position, log-probabilities of texts. All are collective."""

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ringattn.hf.model import unwrapped
from ringattn.training.data.corpus import Corpus
from ringattn.training.evaluation.decoding import decode
from ringattn.training.evaluation.passes import (
    LocalScores,
    Totals,
    pack_documents,
    packs_of,
    scored,
)
from ringattn.training.evaluation.scoring import Scorer
from ringattn.training.evaluation.tasks import Example


@dataclass(frozen=True)
class Answered:
    """How an example went.

    Arguments:
        share: of the parts of its answer that were right, 0 to 1.
        logprob: of all tokens of its answer, summed.
    """

    share: float
    logprob: float


def answered(scorer: Scorer, examples: Sequence[Example], room: int) -> list[Answered]:
    """Scores examples by forward passes, packed into `room` tokens: the same results on every rank. Collective.

    A part of an answer is right if each of its tokens is the most probable one after those before it.
    """
    firsts = np.cumsum([0, *(len(example.answers) for example in examples)]).tolist()
    totals = Totals(firsts[-1], scorer.mesh)
    packs = pack_documents(
        [len(example.ids) for example in examples],
        lambda number: examples[number].ids,
        lambda number: examples[number].bins(firsts[number]),
        room,
    )
    for local in scored(scorer, packs):
        totals.add(local)
    logprob, chosen, count = totals.over_ranks()
    right = chosen == count
    return [
        Answered(float(right[first:last].mean()), float(logprob[first:last].sum()))
        for first, last in itertools.pairwise(firsts)
    ]


def generated(scorer: Scorer, examples: Sequence[Example], room: int, stop: int | None) -> list[Answered]:
    """The same with decoded answers: a part is right if its tokens stand in what was generated. Collective.

    All replicas decode all examples. Of each example as many tokens are decoded as its answer has, with what stands
    between its parts, and half as many more. There is no log-probability of them: it is NaN.
    """
    results = []
    for numbers in packs_of([len(example.prompt) for example in examples], room):
        some = [examples[number] for number in numbers]
        longest = max(len(example.ids) - len(example.prompt) for example in some)
        found = decode(scorer, [example.prompt for example in some], longest + longest // 2, stop)
        for example, tokens in zip(some, found.tokens.tolist(), strict=True):
            kept = tokens[: tokens.index(stop)] if stop in tokens else tokens
            parts = [_stands_in(answer.tolist(), kept) for answer in example.answers]
            results.append(Answered(sum(parts) / len(parts), math.nan))
    return results


def _stands_in(wanted: list[int], tokens: list[int]) -> bool:
    return any(tokens[first : first + len(wanted)] == wanted for first in range(len(tokens) - len(wanted) + 1))


def position_edges(length: int, bins: int) -> list[int]:
    """Edges of at most `bins` bins of positions from 1 to `length`, each some percent wider than the one before."""
    edges = np.unique(np.geomspace(1, length, bins + 1).round().astype(int)).tolist()
    return edges if len(edges) > 1 else [1, length + 1]


def loss_by_position(scorer: Scorer, corpus: Corpus, edges: Sequence[int], room: int) -> tuple[list[float], list[int]]:
    """Mean loss of the tokens at positions `[edges[i], edges[i + 1])` of their documents, and how many there were.

    Documents are cut after the last edge. Collective; the same on every rank.
    """
    longest = edges[-1]
    lengths = [min(corpus.length(number), longest) for number in range(len(corpus))]
    totals = Totals(len(edges) - 1, scorer.mesh)
    bounds = torch.tensor(edges[1:-1], device=scorer.mesh.device)
    packs = pack_documents(
        lengths,
        lambda number: corpus.read(number, 0, lengths[number]),
        lambda number: np.zeros(lengths[number], np.int64),
        room,
    )
    for local in scored(scorer, packs):
        totals.add(local, torch.bucketize(local.positions + 1, bounds, right=True))  # a score is of the next token
    logprob, _, count = totals.over_ranks()
    losses = np.divide(-logprob, count, out=np.full(len(count), math.nan), where=count > 0)
    return losses.tolist(), count.astype(int).tolist()


@contextmanager
def limited_reach(model: nn.Module, reach: int | None) -> Iterator[None]:
    """In here no query sees more than `reach` tokens back, itself counted, in any layer. None: as the model is.

    What a layer passes on may still come from further back, a reach for each layer.
    """
    handle = unwrapped(model)._ringattn
    before, handle.reach = handle.reach, reach
    try:
        yield
    finally:
        handle.reach = before


def write_logprobs(scorer: Scorer, corpus: Corpus, room: int, path: Path) -> int:
    """Writes `path`, JSONL: for each document its token ids and the log-probability of each but the first. Collective.

    Documents are whole, whatever their length: one longer than `room` is a pack of its own. What ranks send each other
    is one number a token, a pack at a time; rank 0 alone writes, and the file is there whole or not at all. Returns the
    number of documents.
    """
    lengths = [corpus.length(number) for number in range(len(corpus))]
    packs = pack_documents(
        lengths,
        lambda number: corpus.read(number, 0, lengths[number]),
        lambda number: np.zeros(lengths[number], np.int64),
        room,
    )
    partial, rank0 = path.with_name(path.name + ".partial"), dist.get_rank() == 0
    numbers = packs_of(lengths, room)
    file = open(partial, "w") if rank0 else None  # noqa: SIM115  written by one rank, over many turns of all
    try:
        for turn, local in enumerate(scored(scorer, packs)):
            for replica, logprobs in enumerate(_of_replicas(local, numbers, turn, scorer)):
                if file is not None:
                    _write(file, corpus, numbers[turn * scorer.mesh.data + replica], logprobs)
    finally:
        if file is not None:
            file.close()
    if rank0:
        partial.replace(path)
    return len(lengths)


def _of_replicas(local: LocalScores, numbers: list[tuple[int, ...]], turn: int, scorer: Scorer) -> list[Tensor]:
    """The log-probabilities (T,) of the pack of each replica that had one."""
    mesh = scorer.mesh
    whole = local.layout.unshard(local.scores.logprob)
    if mesh.data == 1:
        return [whole]
    group = mesh.device_mesh.get_group("data")
    sizes: list[int] = [0] * mesh.data
    dist.all_gather_object(sizes, 0 if local.pack is None else len(whole), group=group)
    padded = whole.new_zeros(max(sizes))
    padded[: len(whole)] = whole[: max(sizes)]
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return [part[:size] for part, size in zip(parts, sizes, strict=True) if size]


def _write(file: Any, corpus: Corpus, numbers: tuple[int, ...], logprobs: Tensor) -> None:
    values, first = logprobs.tolist(), 0
    for number in numbers:
        length = corpus.length(number)
        # The score of a token stands at the one before it.
        own = [None, *values[first : first + length - 1]] if length else []
        record = {"document": number, "tokens": corpus.read(number, 0, length).tolist(), "logprobs": own}
        file.write(json.dumps(record) + "\n")
        first += length

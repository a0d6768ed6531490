"""Validation during training: the mean loss over all targets of held-out sets, of any size, with nothing gathered."""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.distributed.fsdp import FSDPModule

from ringattn.parallel.mesh.mesh import SequenceMesh
from ringattn.training.corpus import Corpus, corpus_of, text_corpus
from ringattn.training.data.files import matching_files
from ringattn.training.data.texts import texts_of
from ringattn.training.data.tokenizer import BYTE_VOCABULARY, load_tokenizer
from ringattn.training.evaluation.passes import NO_BIN, ScoredPack, Totals, scored
from ringattn.training.evaluation.scoring import Scorer
from ringattn.training.packing import NO_TARGET, PackPlan, Segment, read_pack

ONLY = "validation"
"""The name of the one set that a plain list of files makes."""


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

    def losses(self, step: int) -> dict[str, float] | None:
        """Mean loss of each set after `step` steps, the same on every rank; None if it is not their turn. Collective.

        Random states and the mode of the model are as they were afterwards.
        """
        due = step == self.steps or (self.every > 0 and step % self.every == 0)
        if self._scorer is None or not due:
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


def validation_sets(cfg: DictConfig, output: Path) -> dict[str, Corpus]:
    """The sets of `data.validation`, tokenized as the training data are.

    Raises ValueError naming the key for files that cannot be used, and for a set without any target.
    """
    sets: dict[str, Corpus] = {}
    for name, patterns in named_files(cfg.data.validation).items():
        try:
            sets[name] = _corpus(cfg.data, patterns, output)
        except ValueError as error:
            raise ValueError(str(error).replace("data.files", "data.validation")) from None
        if sets[name].longest < 2:
            raise ValueError(f"data.validation: {name} has no document of two tokens or more, so nothing to predict")
    return sets


def named_files(value: Any) -> dict[str, list[str]]:
    """`data.validation` by names of sets. Raises ValueError for what is neither a list of texts nor names with such."""
    plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    if plain is None or plain == [] or plain == {}:
        return {}
    sets: dict[Any, Any] = plain if isinstance(plain, dict) else {ONLY: plain}
    for name, files in sets.items():
        if not isinstance(files, list) or not files or not all(isinstance(one, str) and one for one in files):
            raise ValueError(
                f"data.validation must be a list of files, or names with such lists, got {files!r} for {name}; write "
                "'data.validation=[/path/to/texts]' or 'data.validation={books: [/path/to/books]}'"
            )
    return {str(name): files for name, files in sets.items()}


def _corpus(data: DictConfig, patterns: list[str], output: Path) -> Corpus:
    if data.name != "text":
        files = matching_files(patterns, own=(output,))
        texts = [text for file in files for text, _ in texts_of(file, "text")]
        return corpus_of([np.frombuffer(text.encode(), np.uint8) for text in texts], BYTE_VOCABULARY)
    cache = Path(data.cache).expanduser()
    files = matching_files(patterns, own=(output, cache.resolve()))
    tokenizer = load_tokenizer(data.tokenizer, data.add_eos)
    return text_corpus(files, tokenizer, data.text_field, data.add_eos, cache)


def shared_notes(training: Corpus, sets: Mapping[str, Corpus]) -> list[str]:
    """A warning for each set with documents that the training data have too."""
    found = {name: shared_documents(training, corpus) for name, corpus in sets.items()}
    return [
        f"warning: data.validation: {count:,} of the {len(sets[name]):,} documents of {name} are in the training data "
        "too: their loss says how well they are remembered"
        for name, count in found.items()
        if count
    ]


def shared_documents(training: Corpus, held_out: Corpus) -> int:
    """How many documents of `held_out`, token by token, the training data have too. Empty ones do not count.

    Lengths and three tokens of a document are compared first, all at once; the few that are left are compared whole.
    """
    lengths = np.diff(training.offsets)
    same_length = np.flatnonzero(np.isin(lengths, np.unique(np.diff(held_out.offsets))) & (lengths > 0))
    theirs: dict[tuple[int, ...], list[int]] = {}
    wanted = {_mark(held_out, number) for number in range(len(held_out)) if held_out.length(number)}
    for mark, number in zip(_marks(training, same_length), same_length.tolist(), strict=True):
        if mark in wanted:
            theirs.setdefault(mark, []).append(number)
    return sum(_is_among(training, theirs, held_out, number) for number in range(len(held_out)))


def _marks(corpus: Corpus, documents: Any) -> Iterator[tuple[int, ...]]:
    """Length, first, middle and last token of documents that are not empty."""
    starts, stops = corpus.offsets[:-1][documents], corpus.offsets[1:][documents]
    tokens = [corpus.tokens[at].tolist() for at in (starts, (starts + stops) // 2, stops - 1)]
    return zip((stops - starts).tolist(), *tokens, strict=True)


def _mark(corpus: Corpus, number: int) -> tuple[int, ...]:
    return next(iter(_marks(corpus, np.array([number]))))


def _is_among(training: Corpus, theirs: Mapping[tuple[int, ...], list[int]], held_out: Corpus, number: int) -> bool:
    length = held_out.length(number)
    if not length:
        return False
    own = held_out.read(number, 0, length)
    return any(
        np.array_equal(own, training.read(other, 0, length)) for other in theirs.get(_mark(held_out, number), ())
    )

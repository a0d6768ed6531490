"""What a run would learn from: how much there is, how it is packed, and samples with what is learned of them."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from omegaconf import DictConfig, OmegaConf

from ringattn.training.config.checks import check_data, completed, resolve
from ringattn.training.config.choices import with_saved_model
from ringattn.training.config.data_keys import check_enough, notes_of
from ringattn.training.data.corpus import Corpus
from ringattn.training.data.loading import load_validation
from ringattn.training.data.mixture import MixedCorpus
from ringattn.training.data.streaming import place_in
from ringattn.training.data.tokenizer import BYTES, saved_tokenizer
from ringattn.training.model.flops import StepFlops
from ringattn.training.model.lora import lora_of
from ringattn.training.model.models import empty_model
from ringattn.training.packs.grouping import DocumentCost
from ringattn.training.packs.ordering import AnyCorpus, Position
from ringattn.training.packs.packers import make_packer
from ringattn.training.packs.packing import PackPlan, Segment, counted
from ringattn.training.packs.sharing import tokens_saved
from ringattn.training.start.job import leaks, load_corpus, loader_of, model_of

PACKS = 2000
"""So many packs are planned at most to see how they are filled."""
_STREAMED = 200  # packs of a stream, whose documents are tokenized for it
_COMPARED = 2**22  # tokens of packs whose documents are compared for common prefixes, in a second or two
_AROUND = 160  # tokens of a sample that are shown from its beginning, and from before the first one that is learned


@dataclass(frozen=True)
class PartFacts:
    """How much one source has, or of a stream, how much of it was looked at.

    Arguments:
        drawn: share of the tokens of the packs that were planned.
        learned: share of its tokens that may be targets.
    """

    name: str
    documents: int
    tokens: int
    longest: int
    learned: float
    drawn: float


@dataclass(frozen=True)
class DataFacts:
    """What a configuration's data looks like.

    Arguments:
        lengths: (documents,) tokens of each; of a stream those that were looked at.
        plans: of the packs from the beginning of a run.
        sources: of each segment of `plans`, the number of its part.
        packed, padding, targets, cuts: tokens, padding, targets, and documents that are cut, of these packs.
        wasted: share of padding if every document had a row of its own as long as a pack.
        shared: share of tokens that `data.share_prefixes` leaves out, in the first `compared` packs.
        sharing: whether it does.
        notes: what people should know.
    """

    name: str
    seq_len: int
    parts: tuple[PartFacts, ...]
    lengths: npt.NDArray[np.int64]
    plans: tuple[PackPlan, ...]
    sources: tuple[tuple[int, ...], ...]
    streamed: bool
    packed: int
    padding: int
    targets: int
    cuts: int
    wasted: float
    shared: float
    compared: int
    sharing: bool
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Data:
    """A configuration's documents, with how they are packed and how their tokens are read."""

    cfg: DictConfig
    corpus: AnyCorpus
    facts: DataFacts


def look_at(cfg: DictConfig, chosen: Collection[str] | None = None) -> Data:
    """Reads the data of a configuration of `ringattn train`, and plans the packs of its first steps.

    Raises ValueError with one message that names the key and the numbers.
    """
    cfg = with_saved_model(completed(cfg), chosen)
    shape = check_data(cfg)
    resolved = OmegaConf.create(resolve(cfg, shape, "cpu"))
    output = Path(cfg.run.output).expanduser().resolve()
    config, _ = model_of(resolved)
    corpus = load_corpus(resolved, config, output)
    check_enough(resolved, corpus)
    loader = loader_of(resolved, config, output)
    held_out = load_validation(loader)
    notes = [*notes_of(resolved.data, corpus), *loader.notes, *leaks(corpus, held_out)]
    return Data(resolved, corpus, _facts(resolved, config, corpus, notes))


def _facts(cfg: DictConfig, config: Any, corpus: AnyCorpus, notes: list[str]) -> DataFacts:
    plans = tuple(counted(plan, corpus) for plan in _planned(cfg, config, corpus))
    segments = [segment for plan in plans for segment in plan.segments]
    lengths = _lengths(corpus, segments)
    rows = -(-lengths // cfg.data.seq_len).sum()
    compared = plans[: max(1, _COMPARED // cfg.data.seq_len)]
    saved = sum(tokens_saved(plan, corpus) for plan in compared)
    return DataFacts(
        name=cfg.data.name,
        seq_len=cfg.data.seq_len,
        parts=tuple(_part_facts(corpus, segments)),
        lengths=lengths,
        plans=plans,
        sources=tuple(tuple(_source_of(corpus, segment.document) for segment in plan.segments) for plan in plans),
        streamed=not isinstance(corpus, Corpus | MixedCorpus),
        packed=sum(plan.tokens for plan in plans),
        padding=sum(plan.seq_len - plan.tokens for plan in plans),
        targets=sum(plan.targets for plan in plans),
        cuts=sum(not segment.ends for segment in segments),
        wasted=1 - float(lengths.sum() / max(rows * cfg.data.seq_len, 1)),
        shared=saved / max(sum(plan.tokens for plan in compared), 1),
        compared=len(compared),
        sharing=bool(cfg.data.get("share_prefixes")),
        notes=tuple(notes),
    )


def _planned(cfg: DictConfig, config: Any, corpus: AnyCorpus) -> Iterator[PackPlan]:
    """The packs of a run's steps, until there are enough to judge."""

    def cost() -> DocumentCost:
        flops = StepFlops.of(empty_model(config, lora_of(cfg.model)), config)
        return DocumentCost(flops.attention, flops.per_token)

    packer = make_packer(cfg.data, corpus, cfg.run.seed, Position().state_dict(), cost)
    known = isinstance(corpus, Corpus | MixedCorpus)
    packs = cfg.data.packs_per_step
    for _ in range(min(cfg.run.steps, max(1, (PACKS if known else _STREAMED) // packs))):
        yield from packer.step(packs)


def _lengths(corpus: AnyCorpus, segments: list[Segment]) -> npt.NDArray[np.int64]:
    if isinstance(corpus, Corpus | MixedCorpus):
        return corpus.lengths[corpus.lengths > 0]
    documents = dict.fromkeys(segment.document for segment in segments)
    return np.asarray([corpus.length(one) for one in documents], np.int64)


def _source_of(corpus: AnyCorpus, document: int) -> int:
    if isinstance(corpus, Corpus):
        return 0
    if isinstance(corpus, MixedCorpus):
        return int(np.searchsorted(corpus.firsts, document, side="right")) - 1
    return place_in(document)[0]


def _part_facts(corpus: AnyCorpus, segments: list[Segment]) -> Iterator[PartFacts]:
    drawn: dict[int, int] = {}
    for segment in segments:
        number = _source_of(corpus, segment.document)
        drawn[number] = drawn.get(number, 0) + segment.stop - segment.start
    total = max(sum(drawn.values()), 1)
    if isinstance(corpus, Corpus):
        yield PartFacts("all", len(corpus), corpus.total, corpus.longest, _learned(corpus), 1.0)
    elif isinstance(corpus, MixedCorpus):
        for number, part in enumerate(corpus.parts):
            one, share = part.corpus, drawn.get(number, 0) / total
            yield PartFacts(part.name, len(one), one.total, one.longest, _learned(one), share)
    else:
        for number, streamed in enumerate(corpus.parts):
            documents = dict.fromkeys(one.document for one in segments if _source_of(corpus, one.document) == number)
            sizes = {one: corpus.length(one) for one in documents}
            masks = [corpus.learned(one, 0, size) for one, size in sizes.items()]
            pairs = zip(sizes.values(), masks, strict=True)
            learned = sum(size if mask is None else int(mask.sum()) for size, mask in pairs)
            tokens, share = sum(sizes.values()), drawn.get(number, 0) / total
            longest = max(sizes.values(), default=0)
            yield PartFacts(streamed.name, len(sizes), tokens, longest, learned / max(tokens, 1), share)


def _learned(corpus: Corpus) -> float:
    if corpus.mask is None:
        return 1.0
    return float(np.count_nonzero(corpus.mask[: corpus.total]) / max(corpus.total, 1))


def text_of(facts: DataFacts) -> str:
    """All numbers, for people."""
    looked = ", of what was looked at" if facts.streamed else ""
    lines = [*facts.notes, f"data={facts.name}, packs of {facts.seq_len:,} tokens{looked}", ""]
    width = max(6, *(len(part.name) for part in facts.parts))
    lines.append(f"{'source':{width}} {'documents':>12} {'tokens':>16} {'longest':>12} {'learned':>8} {'drawn':>7}")
    for part in facts.parts:
        counts = f"{part.documents:>12,} {part.tokens:>16,} {part.longest:>12,}"
        lines.append(f"{part.name:{width}} {counts} {part.learned:>8.1%} {part.drawn:>7.1%}")
    lines += ["", "tokens of a document      documents   tokens"]
    total = max(int(facts.lengths.sum()), 1)
    for low, high, documents, tokens in histogram(facts.lengths):
        bar = "█" * round(40 * tokens / total)
        lines.append(f"{low:>10,} to {high:>10,} {documents:>10,} {tokens / total:>8.1%} {bar}")
    packs, all_tokens = len(facts.plans), max(facts.packed + facts.padding, 1)
    lines += [
        "",
        f"the first {packs:,} packs: {facts.packed:,} tokens, {facts.targets:,} targets "
        f"({facts.targets / max(facts.packed, 1):.1%}), {facts.cuts:,} cuts of documents, "
        f"{facts.padding / all_tokens:.1%} padding",
        f"documents in rows of their own, as long as a pack, would be {facts.wasted:.1%} padding",
        f"data.share_prefixes=true {'leaves' if facts.sharing else 'would leave'} out {facts.shared:.1%} of the "
        f"tokens of the first {facts.compared:,} packs, which documents of a pack have in common",
    ]
    return "\n".join(lines)


def histogram(lengths: npt.NDArray[np.int64]) -> list[tuple[int, int, int, int]]:
    """Documents and their tokens by length: (from, to, documents, tokens), one for each power of two."""
    if not len(lengths):
        return []
    powers = np.floor(np.log2(lengths)).astype(int)
    rows = []
    for power in range(int(powers.min()), int(powers.max()) + 1):
        own = lengths[powers == power]
        rows.append((1 << power, (1 << (power + 1)) - 1, len(own), int(own.sum())))
    return rows


def samples(data: Data, count: int, colour: bool) -> list[str]:
    """The first documents of the first packs as they will be read, with what is learned of them.

    Arguments:
        colour: what is learned is green, what is only read is grey; or else what is learned stands in «».
    """
    tokenizer = data.cfg.data.get("tokenizer") or BYTES
    model = None if tokenizer == BYTES else saved_tokenizer(tokenizer)
    seen = dict.fromkeys(segment.document for plan in data.facts.plans for segment in plan.segments)
    return [_sample(data.corpus, document, model, colour) for document in list(seen)[:count]]


def _sample(corpus: AnyCorpus, document: int, model: Any, colour: bool) -> str:
    length = corpus.length(document)
    mask = corpus.learned(document, 0, length)
    learned = np.ones(length, bool) if mask is None else mask.copy()
    learned[:1] = False  # nothing is before the first token that could predict it
    first = int(np.argmax(learned)) if learned.any() else 0
    ranges = [(0, min(length, _AROUND))]
    if first > _AROUND:
        ranges.append((max(_AROUND, first - _AROUND // 4), min(length, first + _AROUND)))
    name = "" if isinstance(corpus, Corpus) else f" of {corpus.parts[_source_of(corpus, document)].name}"
    text, shown = f"document{name}, {length:,} tokens, {int(learned.sum()):,} learned:\n", 0
    for start, stop in ranges:
        text += f" … {start - shown:,} tokens … " if start > shown else ""
        ids = corpus.read(document, start, stop)
        for begin, end in _runs(learned[start:stop]):
            piece = _decoded(ids[begin:end], model)
            text += _marked(piece, bool(learned[start + begin]), colour)
        shown = stop
    return text + (f" … {length - shown:,} tokens …" if shown < length else "")


def _runs(values: npt.NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """Where the same value stands side by side."""
    edges = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
    yield from pairwise(edges)


def _decoded(ids: npt.NDArray[np.int64], model: Any) -> str:
    if model is None:
        text = bytes(ids.astype(np.uint8)).decode("utf-8", "replace") if ids.max(initial=0) < 256 else f"{ids.tolist()}"
    else:
        text = str(model.decode(ids.tolist(), skip_special_tokens=False))
    # What moves a terminal's cursor, or colours it, is not for the data to say.
    return "".join(one if one.isprintable() or one in "\n\t" else f"\\x{ord(one):02x}" for one in text)


def _marked(text: str, learned: bool, colour: bool) -> str:
    if not colour:
        return f"«{text}»" if learned else text
    return f"\033[{32 if learned else 90}m{text}\033[0m"

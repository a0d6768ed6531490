"""What the keys of `data` may hold that are about sources and how packs are filled."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ringattn.training.data.chat import LOSS_ON, OF_TRL
from ringattn.training.data.corpus import Corpus
from ringattn.training.data.loading import validation_of
from ringattn.training.data.mixture import MixedCorpus
from ringattn.training.data.shards import shards_of
from ringattn.training.data.source_store import SKIP, STOP
from ringattn.training.data.sources import sources_of
from ringattn.training.data.tokenizer import AUTO, BYTES
from ringattn.training.packs.curriculum import curriculum_of
from ringattn.training.packs.ordering import AnyCorpus
from ringattn.training.packs.packers import BEST_FIT, LOOKAHEAD, ORDER, PACKING, lengths_of

# Of every corpus; they may be left out.
OF_PACKS = {"data.packing", "data.lookahead", "data.curriculum", "data.validation", "data.share_prefixes"}
OF_SOURCES = {
    f"data.{key}"
    for key in ("sources", "tokenizer", "add_eos", "loss_on", "chat_template", "on_error", "cache", "processes")
} | {"data.streaming"}


def check_data_keys(data: DictConfig) -> None:
    """Raises ValueError naming the key, what it holds and what it may hold."""
    if (packing := data.get("packing") or ORDER) not in PACKING:
        raise ValueError(f"data.packing must be one of {', '.join(PACKING)}, got {packing!r}")
    _check_integer(data, "lookahead")
    if data.get("lookahead") is not None and packing != BEST_FIT:
        raise ValueError("data.lookahead is of data.packing=best_fit, and packs are filled in order")
    if data.get("delay") is not None:
        if packing == BEST_FIT:
            raise ValueError("data.delay and data.packing=best_fit are two rules to fill packs; use one of them")
        if data.get("curriculum") is not None:
            raise ValueError("data.curriculum changes the length of packs, and data.delay needs one; use one of them")
    if (share := data.get("share_prefixes")) not in (None, True, False):
        raise ValueError(f"data.share_prefixes must be true, false or null, got {share!r}")
    if share and data.get("delay") is not None:
        raise ValueError(
            f"data.delay={data.delay} evens out what packs of separate documents cost; use it or data.share_prefixes"
        )
    lengths_of(data)
    held_out = validation_of(data)
    for number, source in enumerate(held_out):
        if source.hub is None:
            shards_of(source, f"data.validation[{number}]")
    if data.name == "sources":
        _check_sources(data)


def settled(data: dict[str, Any], values: DictConfig) -> dict[str, Any]:
    """What was left open, filled in: the longest packs are those of the curriculum."""
    out: dict[str, Any] = {"packing": data.get("packing") or ORDER, "share_prefixes": bool(data.get("share_prefixes"))}
    if out["packing"] == BEST_FIT:
        out["lookahead"] = data.get("lookahead") or LOOKAHEAD
    if (lengths := lengths_of(values)) is not None:
        out["seq_len"] = lengths.longest
    return out


def check_enough(cfg: DictConfig, corpus: AnyCorpus) -> None:
    """Raises ValueError if there is nothing to predict, or if the sources are used up before the run is done."""
    if isinstance(corpus, Corpus) and corpus.longest < 2:
        raise ValueError(
            f"data.files: none of the {len(corpus):,} documents has two tokens or more, so there is nothing to predict"
        )
    if not isinstance(corpus, MixedCorpus):
        return
    data, available = cfg.data, corpus.available()
    lengths = lengths_of(data) or curriculum_of([[0, data.seq_len]])
    wanted = lengths.tokens(cfg.run.steps, data.packs_per_step)
    if wanted > available:
        raise ValueError(
            f"run.steps={cfg.run.steps} take {wanted:,} tokens, and the sources with their epochs have "
            f"{int(available):,}; use fewer steps, or give one source more epochs or none"
        )


def notes_of(data: DictConfig, corpus: AnyCorpus) -> list[str]:
    """What people should know about how documents are packed."""
    notes = list(corpus.notes) if isinstance(corpus, MixedCorpus) else []
    if data.pad and isinstance(corpus, Corpus | MixedCorpus):
        longer = int((corpus.lengths > data.seq_len).sum())
        if longer:
            notes.append(
                f"{longer:,} documents are longer than a pack of {data.seq_len:,} tokens: they are cut into packs"
            )
    return notes


def described(corpus: AnyCorpus) -> str:
    """How much there is, for people."""
    if isinstance(corpus, Corpus | MixedCorpus):
        return f"{len(corpus):,} documents, {corpus.total:,} tokens"
    return f"{sum(len(part.shards) for part in corpus.parts):,} files, streamed"


def _check_sources(data: DictConfig) -> None:
    plain = OmegaConf.to_container(data.sources) if OmegaConf.is_config(data.sources) else data.sources
    sources = sources_of(plain)
    if not sources:
        raise ValueError("data.sources is empty; write data=sources 'data.sources=[{path: /data/books}]'")
    for key, allowed in (("loss_on", LOSS_ON), ("on_error", (STOP, SKIP))):
        if data.get(key) not in allowed:
            raise ValueError(f"data.{key} must be one of {', '.join(allowed)}, got {data.get(key)!r}")
    for key in ("add_eos", "streaming"):
        if not isinstance(data.get(key), bool):
            raise ValueError(f"data.{key} must be true or false, got {data.get(key)!r}")
    for key in ("tokenizer", "cache"):
        if not isinstance(data.get(key), str) or not data.get(key):
            raise ValueError(f"data.{key} must be text, got {data.get(key)!r}")
    _check_integer(data, "processes")
    template = data.get("chat_template")
    if template is not None and (not isinstance(template, str) or not template):
        raise ValueError(f"data.chat_template must be a file, {OF_TRL} or null, got {template!r}")
    if data.tokenizer not in (AUTO, BYTES) and not Path(data.tokenizer).expanduser().is_dir():
        raise ValueError(
            f"data.tokenizer={data.tokenizer!r} must be `auto`, `bytes` or the folder of a saved Hugging Face tokenizer"
        )
    if data.streaming and data.get("delay") is not None:
        raise ValueError(f"data.delay={data.delay} needs the lengths of all documents; use data.streaming=false")
    if data.get("delay") is not None and all(source.epochs for source in sources):
        raise ValueError("data.delay reads ahead of the packs: at least one source must be without epochs")
    if data.streaming and len(sources) > 1 and any(source.weight is None for source in sources):
        raise ValueError("data.streaming=true does not know how large sources are: give each of them a weight")
    for number, source in enumerate(sources):
        if source.hub is None:
            shards_of(source, f"data.sources[{number}]")


def _check_integer(data: DictConfig, key: str) -> None:
    value = data.get(key)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ValueError(f"data.{key} must be an integer of at least 1, or null, got {value!r}")

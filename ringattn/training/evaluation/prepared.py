"""Everything about an evaluation that is decided before a process group exists."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig

from ringattn.hf.tree_checks import carrying_layer
from ringattn.training.data.corpus import Corpus, text_corpus
from ringattn.training.data.files import matching_files
from ringattn.training.data.texts import texts_of
from ringattn.training.data.tokenizer import Tokenizer, load_tokenizer
from ringattn.training.evaluation.corpus import PLAIN, plain_sentences
from ringattn.training.evaluation.haystack import Haystack, encoder, made_up_sentences, sentences_of
from ringattn.training.evaluation.opened import Source, source_of
from ringattn.training.evaluation.settings import OF_LENGTHS, OF_TEXTS, Settings, settings_of
from ringattn.training.evaluation.tasks import RULER, Example, TaskMaker
from ringattn.training.model.models import empty_model
from ringattn.training.start.launched import Launch, pick_device


@dataclass(frozen=True)
class Evaluation:
    """An evaluation that can start.

    Arguments:
        device: where this rank computes.
        tokenizer: of the texts and tasks.
        examples: of each task with lengths, in the order of their results.
        texts: documents, or None where no task needs them.
    """

    settings: Settings
    launch: Launch
    device: torch.device
    source: Source
    tokenizer: Tokenizer
    examples: Mapping[str, list[Example]]
    texts: Corpus | None


def prepare(cfg: DictConfig, launch: Launch) -> Evaluation:
    """Checks a configuration against this machine, the model and the texts, and makes the examples. No collective.

    Raises ValueError with one message that names the key and the numbers.
    """
    device = pick_device(launch)
    settings = settings_of(cfg, launch, device.type)
    source = source_of(settings)
    tokenizer = load_tokenizer(source.tokenizer, add_eos=False)
    known = source.config.get_text_config().vocab_size
    if tokenizer.vocab_size > known:
        raise ValueError(
            f"tokenizer={source.tokenizer} has {tokenizer.vocab_size} tokens, more than the {known} of {source.name}"
        )
    _check_states(settings, source)
    examples = make_examples(settings, tokenizer)
    texts = _texts(settings, tokenizer) if any(task in OF_TEXTS for task in settings["tasks"]) else None
    _check_positions(settings, source, texts)
    return Evaluation(settings, launch, device, source, tokenizer, examples, texts)


def make_examples(settings: Settings, tokenizer: Tokenizer) -> dict[str, list[Example]]:
    """The examples of each task with lengths: by length, then depth, then sample.

    Raises ValueError, naming the keys, for lengths that have no room for needles and question.
    """
    wanted = [task for task in settings["tasks"] if task in OF_LENGTHS]
    if not wanted:
        return {}
    encode, plain = encoder(tokenizer), settings["wording"] == "plain"
    sentences = _sentences(settings) or (plain_sentences() if plain else made_up_sentences(64, 8))
    maker = TaskMaker(encode, Haystack.of(sentences, encode), PLAIN if plain else RULER, settings["seed"])
    return {task: _examples(task, maker, settings) for task in wanted}


def _examples(task: str, maker: TaskMaker, settings: Settings) -> list[Example]:
    made = []
    for length in settings["lengths"]:
        try:
            for sample in range(settings["samples"]):
                if task == "needle":
                    more = settings["distractors"]
                    made += [maker.needle(length, depth, sample, more) for depth in settings["depths"]]
                elif task == "multi_needle":
                    made.append(maker.multi_needle(length, sample, settings["needles"], settings["asked"]))
                else:
                    made.append(maker.variable_tracking(length, sample, settings["chains"], settings["hops"]))
        except ValueError as error:
            raise ValueError(f"lengths={settings['lengths']}, task {task}: {error}") from None
    return made


def _sentences(settings: Settings) -> list[str]:
    """The sentences of the given texts that haystacks are made of; none where no text is given."""
    if not settings["texts.files"]:
        return []
    files = _files(settings)
    texts = (text for path in files for text, _ in texts_of(path, settings["texts.text_field"]))
    found: list[str] = []
    most = 8 * max(settings["lengths"])  # more than any haystack has
    for text in texts:
        found += sentences_of([text[: 16 * most]])
        if len(found) >= most:
            break
    return found


def _files(settings: Settings) -> list[Path]:
    cache = Path(settings["texts.cache"]).expanduser()
    try:
        return matching_files(settings["texts.files"], own=(settings.output, cache.resolve()))
    except ValueError as error:
        raise ValueError(str(error).replace("data.files", "texts.files")) from None


def _texts(settings: Settings, tokenizer: Tokenizer) -> Corpus:
    cache = Path(settings["texts.cache"]).expanduser()
    try:
        corpus = text_corpus(_files(settings), tokenizer, settings["texts.text_field"], False, cache)
    except ValueError as error:
        raise ValueError(str(error).replace("data.", "texts.")) from None
    most = settings.values["texts"].get("documents")
    if most is not None and most < len(corpus):
        corpus = Corpus(corpus.tokens, corpus.offsets[: most + 1], corpus.vocab_size, f"{corpus.fingerprint}-{most}")
    if corpus.longest < 2:
        raise ValueError("texts.files have no document of two tokens or more, so nothing to predict")
    return corpus


def _check_states(settings: Settings, source: Source) -> None:
    """Raises ValueError if a task asks of layers that carry a state what only attention has."""
    asked = {"tasks=[window]": "window" in settings["tasks"]}
    asked["generate=true"] = settings["generate"] and any(task in OF_LENGTHS for task in settings["tasks"])
    if not any(asked.values()):
        return
    if (layer := carrying_layer(empty_model(source.config))) is None:
        return
    reasons = {
        "tasks=[window]": "whose state has no limited reach: it remembers the whole document",
        "generate=true": "whose state is not kept after a forward pass; use generate=false",
    }
    key = next(name for name, wanted in asked.items() if wanted)
    raise ValueError(f"{key}: {source.name} has {layer}, {reasons[key]}")


def _check_positions(settings: Settings, source: Source, texts: Corpus | None) -> None:
    """Raises ValueError if the model has fewer positions than the longest document."""
    positions = getattr(source.config.get_text_config(), "max_position_embeddings", None)
    if positions is None:
        return
    longest = {"lengths": max(settings["lengths"]) if any(t in OF_LENGTHS for t in settings["tasks"]) else 0}
    if texts is not None:
        longest["max_length"] = min(settings.max_length, texts.longest)
        if "logprobs" in settings["tasks"]:
            longest["texts.files"] = texts.longest
    for key, length in longest.items():
        if length > positions:
            raise ValueError(
                f"{key}: documents of {length} tokens, and the model was made for "
                f"max_position_embeddings={positions}; to look beyond it, set "
                f"'+model.config.max_position_embeddings={length}'"
            )


def cells(examples: list[Example], values: list[float], depths: list[float], lengths: list[int]) -> list[list[float]]:
    """Means of values over samples by depth (rows) and length (columns); NaN without any."""
    table = np.full((len(depths), len(lengths)), np.nan)
    for row, depth in enumerate(depths):
        for column, length in enumerate(lengths):
            found = [
                value
                for one, value in zip(examples, values, strict=True)
                if one.length == length and (one.depth == depth or (np.isnan(one.depth) and np.isnan(depth)))
            ]
            if found:
                table[row, column] = np.mean(found)
    return table.tolist()

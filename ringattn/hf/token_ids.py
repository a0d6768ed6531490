"""Are ids of tokens and of targets rows of the model's tables? Looked at in the whole batch, which every rank has.

A rank would meet such an id in its own part alone, and the others would wait for it. Every rank looks at the whole
batch instead, before anything is sent, so that all of them raise the same. That costs nothing where the batch is on the
host. On a device an answer would be waited for, so that only the batch of a first forward pass is looked at there.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ringattn.hf.images import EmbeddingNeeds
from ringattn.hf.loss import IGNORE_INDEX
from ringattn.kept import keep, kept_already
from ringattn.parallel.layout import Layout

_KEY = "ids of tokens and targets"
Place = Callable[[int], str]
"""From a number of the flattened ids to where people find it."""


@dataclass(frozen=True)
class Noted:
    """Ids of a whole batch, of any shape.

    Arguments:
        targets: they are looked up in the head and not in the embedding, and -100 is none of them.
        place: where the n-th of them stands in what the caller gave.
    """

    ids: Tensor
    name: str
    place: Place
    targets: bool = False


@dataclass(frozen=True)
class Vocabulary:
    """How many rows the tables of a model have; None where that is not known.

    Arguments:
        others: ids that stand for something else than a row of the embedding, such as an image's.
    """

    inputs: int | None
    targets: int | None
    others: tuple[int, ...] = ()

    @classmethod
    def of(cls, model: Any, needs: EmbeddingNeeds) -> "Vocabulary":
        """Of a transformers model."""
        known = getattr(model.config.get_text_config(), "vocab_size", None)
        rows = getattr(model.get_input_embeddings(), "num_embeddings", known)
        outputs = getattr(model.get_output_embeddings(), "out_features", known)
        return cls(rows, outputs, tuple(tower.token for tower in needs.towers))

    def check(self, noted: Noted) -> None:
        """Raises ValueError naming the worst id, its place, and what there is."""
        ids = noted.ids
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ValueError(f"{noted.name} must be integers, got {ids.dtype}")
        size = self.targets if noted.targets else self.inputs
        if size is None or not ids.numel():
            return
        low, high = (int(one) for one in ids.aminmax())
        if low >= 0 and high < size:
            return
        bad = (ids < 0) | (ids >= size)
        for other in (IGNORE_INDEX,) if noted.targets else self.others:
            bad &= ids != other
        if not bool(bad.any()):
            return
        found = ids[bad]
        worst = int(found.max()) if int(found.max()) >= size else int(found.min())
        at = int((bad & (ids == worst)).flatten().nonzero()[0])
        none = f", or {IGNORE_INDEX} where there is no target" if noted.targets else ""
        raise ValueError(
            f"{noted.name} must hold ids from 0 to {size - 1}, since the model's vocabulary has {size}{none}, got "
            f"{worst} at {noted.place(at)} ({len(found)} such of {ids.numel()}): is the tokenizer the model's?"
        )


def note_ids(layout: Layout, noted: Noted) -> None:
    """Keep ids of the whole batch with its layout, for `check_noted`."""
    keep(layout, _KEY, (*(kept_already(layout, _KEY) or ()), noted))


def check_noted(layout: Layout, vocabulary: Vocabulary, on_device: bool) -> None:
    """Raises ValueError, the same on every rank of a sequence, for ids that the model has no row for.

    Arguments:
        on_device: look at what is not on the host, too, and wait for it.
    """
    for noted in kept_already(layout, _KEY) or ():
        if on_device or noted.ids.device.type == "cpu":
            vocabulary.check(noted)


def check_batch(batch: Mapping[str, Any], vocabulary: Vocabulary) -> None:
    """The same for a batch that is not sharded yet, by its keys."""
    for noted in _of_batch(batch):
        vocabulary.check(noted)


def check_items(name: str, value: Any) -> None:
    """Raises ValueError for what a loss cannot be divided by. 0 is what a batch without targets has; a number on a
    device is not looked at, which would wait for it."""
    wanted = f"{name} must be a finite number >= 0, the targets that the loss is divided by, got"
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.dtype == torch.bool or value.is_complex():
            raise ValueError(f"{wanted} {value.dtype} of shape {tuple(value.shape)}")
        if value.device.type != "cpu":
            return
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ValueError(f"{wanted} {value!r}")


def in_rows(name: str, size: int, dims: int, shift: int = 0) -> Place:
    """Places in a batch (B, S), or (S,) with one dimension.

    Arguments:
        shift: how many tokens further on a target is given.
    """

    def place(number: int) -> str:
        row, column = divmod(number + shift, size)
        return f"{name}[{row}, {column}]" if dims > 1 else f"{name}[{column}]"

    return place


def _of_batch(batch: Mapping[str, Any]) -> Iterable[Noted]:
    for name in ("input_ids", "labels", "shift_labels"):
        ids = batch.get(name)
        if isinstance(ids, Tensor) and ids.dim():
            yield Noted(ids, name, in_rows(name, ids.shape[-1], ids.dim()), name != "input_ids")

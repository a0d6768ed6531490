"""Images of a model's batch, data-parallel over the sequence ranks: each image's features are computed once, on some
rank, and placed on the ranks that hold its tokens.

Here is what a batch has: `shard_batch` deals out the images of a global batch. The model's own forward pass does the
rest, by `ringattn.hf.image_features`.

Legend: M tokens of images in the stream, of which this rank holds m.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ringattn.hf.axes import GRID, RopeIndex, rope_index
from ringattn.kept import keep, kept_already
from ringattn.parallel.layout import Layout

PIXELS = "pixel_values"
STAND_IN = "stand_in_image"  # of a batch without images: keys and values of one that counts nowhere
_KEY = "images of the batch"
# Arguments of `get_image_features` that are options and not tensors of images.
_OPTIONS = {"vision_feature_layer", "vision_feature_select_strategy", "return_dict", "kwargs"}


@dataclass(frozen=True)
class VisionTower:
    """How a model takes images.

    Arguments:
        token: the id of tokens that stand for features of an image.
        keywords: of `get_image_features`, pixel_values among them.
        path: of the module that has it.
        axes: how its image tokens count on several axes, if they do and it says so.
    """

    token: int
    keywords: tuple[str, ...]
    path: str
    axes: RopeIndex | None = field(default=None, repr=False)


def vision_tower(model: Any, around: Sequence[nn.Module]) -> VisionTower | None:
    """That of a multimodal model, whose modules around its text decoder are given; None: it takes no images so."""
    token = getattr(model.config, "image_token_id", None)
    found: list[Any] = [part for part in around if hasattr(part, "get_image_features")]
    if token is None or not found:
        return None
    owner = found[-1]  # the outer ones ask it
    names = [*inspect.signature(type(owner).get_image_features).parameters][1:]
    path = next(path for path, part in model.named_modules() if part is owner)
    return VisionTower(int(token), tuple(name for name in names if name not in _OPTIONS), path, rope_index(owner))


@dataclass(frozen=True)
class ImageDeal:
    """Who computes which images of a batch, and where their features go; the same rows on every rank.

    Arguments:
        computed: the images that this rank computes, ascending: its own, or one that counts nowhere.
        tokens: of all of these; None where none of them counts.
        send: (sum of sends,) which of its features go out, by the rank that they go to, none of them twice; `sends`
            says how many to each.
        receives: how many come from each rank.
        place: (m,) of each image token of this rank, in its order, which of the received rows is its own.
    """

    computed: tuple[int, ...]
    tokens: int | None
    send: Tensor
    sends: tuple[int, ...]
    receives: tuple[int, ...]
    place: Tensor

    @classmethod
    def of(cls, layout: Layout, where: Tensor, tokens: Sequence[int], weights: Sequence[int]) -> "ImageDeal":
        """Each image goes to the rank that has the least to do so far, the largest first.

        Arguments:
            where: (M,) places of image tokens in the stream, ascending, those of one image after another.
            tokens, weights: of each image, and what it costs.
        """
        ranks, rank = layout.mesh.sequence_size, layout.mesh.sequence_rank
        owner, load = [0] * len(tokens), [0] * ranks
        for image in sorted(range(len(tokens)), key=lambda image: (-weights[image], image)):
            owner[image] = min(range(ranks), key=lambda one: (load[one], one))
            load[owner[image]] += weights[image]
        counts = torch.tensor(tokens, device="cpu")
        of_token = torch.repeat_interleave(torch.tensor(owner, device="cpu"), counts)
        number = torch.full((layout.docs.total,), -1, device="cpu")
        number[where] = torch.arange(len(where), device="cpu")
        held = []  # by rank, the image tokens that it holds, by number
        for one in range(ranks):
            numbers = number[layout.indices(one)]
            held.append(numbers[numbers >= 0])
        own = tuple(image for image in range(len(tokens)) if owner[image] == rank)
        computed = own or (min(range(len(tokens)), key=lambda image: (weights[image], image)),)
        row = torch.full((len(where),), -1, device="cpu")
        row[of_token == rank] = torch.arange(int((of_token == rank).sum()), device="cpu")
        out = [row[part[of_token[part] == rank].sort().values] for part in held]
        mine = held[rank]
        order = torch.argsort(of_token[mine] * len(where) + mine)
        return cls(
            computed,
            sum(tokens[image] for image in computed),
            torch.cat(out),
            tuple(map(len, out)),
            tuple(int((of_token[mine] == one).sum()) for one in range(ranks)),
            torch.argsort(order),
        )

    @classmethod
    def nowhere(cls, ranks: int) -> "ImageDeal":
        """Of a batch without images: every rank computes one that counts nowhere."""
        none = torch.zeros(0, dtype=torch.int64, device="cpu")
        return cls((0,), None, none, (0,) * ranks, (0,) * ranks, none)


def deal_images(
    layout: Layout, batch: Mapping[str, Any], ids: Tensor | None, tower: VisionTower | None
) -> dict[str, Tensor]:
    """This rank's images of a batch, as keywords of the model: under the batch's keys, rows of their values.

    Arguments:
        ids: of all tokens, (T,), or None where the batch has embeddings.
        tower: the model's, of `handle.needs`.

    Raises ValueError or NotImplementedError naming a key, the same on every rank.
    """
    images, instead = batch.get(PIXELS), batch.get(STAND_IN)
    if images is None or not len(images):
        _check_no_images(layout, batch, ids, tower)
        if instead is None or tower is None:
            return {}
        keep(layout, _KEY, ImageDeal.nowhere(layout.mesh.sequence_size))
        return dict(instead)
    if ids is None:
        raise ValueError(f"{PIXELS} need input_ids, whose tokens stand for features of images, got inputs_embeds")
    if tower is None:
        raise NotImplementedError(
            f"{PIXELS} of a batch need needs=handle.needs, of a model with an image_token_id and get_image_features: "
            "else compute inputs_embeds of the global batch, images included, and give those"
        )
    given = {name: batch[name] for name in tower.keywords if batch.get(name) is not None}
    if unread := sorted(name for name in batch if is_of_images(name) and name not in given):
        raise NotImplementedError(f"{', '.join(unread)}: this model's get_image_features takes {tower.keywords}")
    rows = _rows(given)
    where = (ids.to("cpu") == tower.token).nonzero()[:, 0]
    weights = [stop - start for start, stop in rows]
    tokens = _tokens_of_images(where, weights, GRID in given)
    _check_outside(layout, where)
    deal = ImageDeal.of(layout, where, tokens, weights)
    keep(layout, _KEY, deal)
    local = {}
    for name, value in given.items():
        spans = [rows[image] if name == PIXELS else (image, image + 1) for image in deal.computed]
        local[name] = torch.cat([value[start:stop] for start, stop in spans])
    return local


def smallest_image(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Keys and values of the smallest image of a batch, to stand in for those of another without any."""
    given = {name: value for name, value in batch.items() if is_of_images(name)}
    rows = _rows(given)
    image = min(range(len(rows)), key=lambda image: (rows[image][1] - rows[image][0], image))
    start, stop = rows[image]
    return {name: x[start:stop] if name == PIXELS else x[image : image + 1] for name, x in given.items()}


def no_image(name: str, value: Any) -> bool:
    """Whether an entry of a batch says of images that there are none, or is of one that counts nowhere."""
    return name == STAND_IN or (is_of_images(name) and (value is None or not len(value)))


def is_of_images(name: str) -> bool:
    return name.startswith(("pixel_", "image_", "video_", "input_features"))


def _rows(given: Mapping[str, Any]) -> list[tuple[int, int]]:
    """The rows of pixel_values that each image has."""
    pixels = given[PIXELS]
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(value).__name__}")
    if GRID in given:
        ends = [0, *accumulate(given[GRID].prod(-1).tolist())]
    else:
        ends = list(range(len(pixels) + 1))
    images = len(ends) - 1
    if not images or ends[-1] != len(pixels):
        raise ValueError(f"{PIXELS} must have the {ends[-1]} rows that {GRID} says, got {len(pixels)}")
    for name, value in given.items():
        if name != PIXELS and len(value) != images:
            raise NotImplementedError(
                f"{name} must have a row for each of the {images} images, got {len(value)}: only whole images are "
                "dealt out to ranks. Compute inputs_embeds of the global batch, and give those"
            )
    return [*pairwise(ends)]


def _tokens_of_images(where: Tensor, weights: Sequence[int], by_grid: bool) -> list[int]:
    """How many tokens stand for each image: in proportion to its patches, or those of its run, or all as many."""
    total, images = len(where), len(weights)
    if by_grid:
        found = [weight * total / sum(weights) for weight in weights]
        if any(one != int(one) for one in found):
            raise ValueError(
                f"input_ids have {total} tokens of images, which do not go into the {sum(weights)} patches of {images}"
            )
        return [int(one) for one in found]
    edges = [0, *((where.diff() != 1).nonzero()[:, 0] + 1).tolist(), total]
    if len(edges) - 1 == images and total:
        return [stop - start for start, stop in pairwise(edges)]
    if total % images:
        raise ValueError(
            f"input_ids have {total} tokens of images in {len(edges) - 1} runs, and {PIXELS} {images} images: whose "
            "each is, is not clear"
        )
    return [total // images] * images


def _check_no_images(layout: Layout, batch: Mapping[str, Any], ids: Tensor | None, tower: VisionTower | None) -> None:
    """Raises ValueError for tokens of images in documents without any image, which would be learned as words.

    NotImplementedError for what else goes with images.
    """
    if ids is None or tower is None:
        return
    if alone := sorted(name for name, x in batch.items() if is_of_images(name) and not no_image(name, x)):
        raise NotImplementedError(f"{', '.join(alone)}: only {PIXELS} are dealt out to ranks, and the batch has none")
    where = (ids == tower.token).to("cpu")
    for start, stop in layout.docs.padding:
        where[start:stop] = False
    if count := int(where.sum()):
        raise ValueError(
            f"input_ids have {count} tokens of images ({tower.token}) and the batch no {PIXELS}: its collator drops "
            "them, as those of text do, DataCollatorWithFlattening among them"
        )


def _check_outside(layout: Layout, where: Tensor) -> None:
    """Raises ValueError for tokens of images in padding, whose features would go nowhere."""
    for start, stop in layout.docs.padding:
        if bool(((where >= start) & (where < stop)).any()):
            raise ValueError(f"input_ids have tokens of images in padding, tokens {start} to {stop}")


def dealt_images(layout: Any) -> ImageDeal | None:
    """The images of a batch from `shard_batch`, or None."""
    return kept_already(layout, _KEY)

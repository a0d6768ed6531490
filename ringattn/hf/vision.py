"""Images and videos of a model's batch, data-parallel over the sequence ranks: the features of each are computed once,
on some rank, and placed on the ranks that hold its tokens. What is said of images here holds of videos alike.

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

from ringattn.hf.axes import GRID, VIDEO_GRID, RopeIndex, rope_index
from ringattn.kept import keep, kept_already
from ringattn.parallel.layout import Layout

STAND_IN = "stand_in_image"  # of a batch without images or videos: keys and values of ones that count nowhere
# What a decoder takes of features that enter in several layers: the model makes it of what `get_image_features` gives.
DEEP = frozenset({"deepstack_visual_embeds", "visual_pos_masks"})
# Arguments of `get_image_features` that are options and not tensors of images.
_OPTIONS = {"vision_feature_layer", "vision_feature_select_strategy", "return_dict", "kwargs"}


@dataclass(frozen=True)
class Medium:
    """Images, or videos.

    Arguments:
        name: in messages.
        pixels, grid: keys of a batch: values, and patches of each where these stand end to end.
        method: of a model, that computes features.
        token: key of a configuration: the id of tokens that stand for features.
    """

    name: str
    pixels: str
    grid: str
    method: str
    token: str

    def has(self, key: str) -> bool:
        """Whether a key of a batch says something of it."""
        return is_of_media(key) and ("video" in key) == (self.name == "videos")

    def given(self, batch: Mapping[str, Any]) -> bool:
        """Whether a batch has any."""
        pixels = batch.get(self.pixels)
        return pixels is not None and len(pixels) > 0


IMAGES = Medium("images", "pixel_values", GRID, "get_image_features", "image_token_id")
VIDEOS = Medium("videos", "pixel_values_videos", VIDEO_GRID, "get_video_features", "video_token_id")
MEDIA = (IMAGES, VIDEOS)


@dataclass(frozen=True)
class VisionTower:
    """How a model takes images, or videos.

    Arguments:
        medium: which of these.
        token: the id of tokens that stand for features of an image.
        keywords: of the method that computes features, pixels among them.
        path: of the module that has it.
        axes: how its image tokens count on several axes, if they do and it says so.
    """

    medium: Medium
    token: int
    keywords: tuple[str, ...]
    path: str
    axes: RopeIndex | None = field(default=None, repr=False)


def vision_towers(model: Any, around: Sequence[nn.Module]) -> tuple[VisionTower, ...]:
    """Those of a multimodal model, whose modules around its text decoder are given; none: it takes no images so."""
    towers: list[VisionTower] = []
    for medium in MEDIA:
        token = getattr(model.config, medium.token, None)
        found: list[Any] = [part for part in around if hasattr(part, medium.method)]
        if token is None or not found or any(tower.token == token for tower in towers):
            continue
        owner = found[-1]  # the outer ones ask it
        names = [*inspect.signature(getattr(type(owner), medium.method)).parameters][1:]
        keywords = tuple(name for name in names if name not in _OPTIONS)
        path = next(path for path, part in model.named_modules() if part is owner)
        towers.append(VisionTower(medium, int(token), keywords, path, rope_index(owner)))
    return tuple(towers)


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
    layout: Layout, batch: Mapping[str, Any], ids: Tensor | None, towers: Sequence[VisionTower]
) -> dict[str, Tensor]:
    """This rank's images and videos of a batch, as keywords of the model: under the batch's keys, rows of their values.

    Arguments:
        ids: of all tokens, (T,), or None where the batch has embeddings.
        towers: the model's, of `handle.needs`.

    Raises ValueError or NotImplementedError naming a key, the same on every rank.
    """
    given = [name for name, x in batch.items() if is_of_media(name) and not no_image(name, x)]
    if not towers:
        if not any(medium.given(batch) for medium in MEDIA):
            return {}
        raise NotImplementedError(
            f"{', '.join(given)} of a batch need needs=handle.needs, of a model with an image_token_id and "
            "get_image_features: else compute inputs_embeds of the global batch, images included, and give those"
        )
    if unread := sorted(name for name in given if not any(name in tower.keywords for tower in towers)):
        taken = "; ".join(f"{tower.medium.method} takes {', '.join(tower.keywords)}" for tower in towers)
        raise NotImplementedError(f"{', '.join(unread)}: not taken by this model, whose {taken}")
    local: dict[str, Tensor] = {}
    for tower in towers:
        local |= _deal(layout, batch, ids, tower)
    return local


def _deal(layout: Layout, batch: Mapping[str, Any], ids: Tensor | None, tower: VisionTower) -> dict[str, Tensor]:
    """The same of one medium."""
    medium = tower.medium
    given = {name: batch[name] for name in tower.keywords if name in batch and not no_image(name, batch[name])}
    if not medium.given(batch):
        if given:
            raise ValueError(f"{', '.join(given)}: the batch has no {medium.pixels}")
        _check_none(layout, ids, tower)
        instead = {name: x for name, x in batch.get(STAND_IN, {}).items() if medium.has(name)}
        if instead:
            keep(layout, _key(medium), ImageDeal.nowhere(layout.mesh.sequence_size))
        return instead
    if ids is None:
        raise ValueError(
            f"{medium.pixels} need input_ids, whose tokens stand for features of {medium.name}, got inputs_embeds"
        )
    if medium.grid in tower.keywords and medium.grid not in given:
        raise ValueError(f"{medium.pixels} of this model need {medium.grid}, which the batch does not have")
    rows = _rows(given, medium)
    where = (ids.to("cpu") == tower.token).nonzero()[:, 0]
    if not len(where):
        raise ValueError(f"{medium.pixels} are {len(rows)} {medium.name}, and input_ids have no tokens {tower.token}")
    weights = [stop - start for start, stop in rows]
    tokens = _tokens_of_images(where, weights, medium.grid in given, medium)
    _check_outside(layout, where, medium)
    deal = ImageDeal.of(layout, where, tokens, weights)
    keep(layout, _key(medium), deal)
    local = {}
    for name, value in given.items():
        spans = [rows[image] if name == medium.pixels else (image, image + 1) for image in deal.computed]
        local[name] = torch.cat([value[start:stop] for start, stop in spans])
    return local


def smallest_image(batch: Mapping[str, Any], medium: Medium) -> dict[str, Tensor]:
    """Keys and values of the smallest image (or video) of a batch, to stand in for those of another without any."""
    given = {name: value for name, value in batch.items() if medium.has(name)}
    rows = _rows(given, medium)
    image = min(range(len(rows)), key=lambda image: (rows[image][1] - rows[image][0], image))
    start, stop = rows[image]
    return {name: x[start:stop] if name == medium.pixels else x[image : image + 1] for name, x in given.items()}


def no_image(name: str, value: Any) -> bool:
    """Whether an entry of a batch says of images or videos that there are none, or is of one that counts nowhere."""
    return name == STAND_IN or (is_of_media(name) and (value is None or not len(value)))


def is_of_media(name: str) -> bool:
    return name.startswith(("pixel_", "image_", "video_", "input_features"))


def _rows(given: Mapping[str, Any], medium: Medium) -> list[tuple[int, int]]:
    """The rows of pixels that each image has."""
    pixels = given[medium.pixels]
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(value).__name__}")
    if medium.grid in given:
        ends = [0, *accumulate(given[medium.grid].prod(-1).tolist())]
    else:
        ends = list(range(len(pixels) + 1))
    images = len(ends) - 1
    if not images or ends[-1] != len(pixels):
        raise ValueError(f"{medium.pixels} must have the {ends[-1]} rows that {medium.grid} says, got {len(pixels)}")
    for name, value in given.items():
        if name != medium.pixels and len(value) != images:
            raise NotImplementedError(
                f"{name} must have a row for each of the {images} {medium.name}, got {len(value)}: only whole ones are "
                "dealt out to ranks. Compute inputs_embeds of the global batch, and give those"
            )
    return [*pairwise(ends)]


def _tokens_of_images(where: Tensor, weights: Sequence[int], by_grid: bool, medium: Medium) -> list[int]:
    """How many tokens stand for each image: in proportion to its patches, or those of its run, or all as many."""
    total, images = len(where), len(weights)
    if by_grid:
        found = [weight * total / sum(weights) for weight in weights]
        if any(one != int(one) for one in found):
            raise ValueError(
                f"input_ids have {total} tokens of {medium.name}, which do not go into the {sum(weights)} patches of "
                f"{images}"
            )
        return [int(one) for one in found]
    edges = [0, *((where.diff() != 1).nonzero()[:, 0] + 1).tolist(), total]
    if len(edges) - 1 == images and total:
        return [stop - start for start, stop in pairwise(edges)]
    if total % images:
        raise ValueError(
            f"input_ids have {total} tokens of {medium.name} in {len(edges) - 1} runs, and {medium.pixels} {images} "
            f"{medium.name}: whose each is, is not clear"
        )
    return [total // images] * images


def _check_none(layout: Layout, ids: Tensor | None, tower: VisionTower) -> None:
    """Raises ValueError for tokens of images in documents without any image, which would be learned as words."""
    if ids is None:
        return
    where = (ids == tower.token).to("cpu")
    for start, stop in layout.docs.padding:
        where[start:stop] = False
    if count := int(where.sum()):
        medium = tower.medium
        raise ValueError(
            f"input_ids have {count} tokens of {medium.name} ({tower.token}) and the batch no {medium.pixels}: its "
            "collator drops them, as those of text do, DataCollatorWithFlattening among them"
        )


def _check_outside(layout: Layout, where: Tensor, medium: Medium) -> None:
    """Raises ValueError for tokens of images in padding, whose features would go nowhere."""
    for start, stop in layout.docs.padding:
        if bool(((where >= start) & (where < stop)).any()):
            raise ValueError(f"input_ids have tokens of {medium.name} in padding, tokens {start} to {stop}")


def dealt_images(layout: Any) -> dict[str, ImageDeal]:
    """The images and videos of a batch from `shard_batch`, by medium."""
    found = {medium.name: kept_already(layout, _key(medium)) for medium in MEDIA}
    return {name: deal for name, deal in found.items() if deal is not None}


def _key(medium: Medium) -> str:
    return f"{medium.name} of the batch"

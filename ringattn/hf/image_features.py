"""Features of images in a model's forward pass: those of the images that this rank computes, for the tokens it holds.

The model asks its `get_image_features` for the features of the images that it was given, and gets those of the tokens
that it was given. An exchange stands in between, whose gradient is the exchange back. Every rank runs the tower, also
one whose images are none, on an image that counts nowhere: engines gather weights there. Videos go the same way, by
`get_video_features`.

Legend: m tokens of images of this rank; R of its own images; hidden of the decoder.
"""

import inspect
from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from ringattn.hf.vision import DEEP, IMAGES, MEDIA, VIDEOS, ImageDeal, Medium, VisionTower, dealt_images
from ringattn.kernels.spec import to_device
from ringattn.recurrent.piles import taken_apart
from ringattn.recurrent.wire import Wire, exchanged, wire_of


def put_exchange(handle: Any, towers: tuple[VisionTower, ...]) -> None:
    """Make the model's methods that compute features exchange them; `take_exchange` undoes it."""
    for tower in towers:
        owner = handle.model.get_submodule(tower.path)
        owner._ringattn = handle
        setattr(owner, tower.medium.method, MethodType(_METHODS[tower.medium.method], owner))


def take_exchange(model: Any) -> None:
    for part in model.modules():
        for medium in MEDIA:
            part.__dict__.pop(medium.method, None)


def expect_images(handle: Any, layout: Any, kwargs: Mapping[str, Any]) -> None:
    """Before a forward pass: raises an error where images are not those of the batch. No communication."""
    deals = dealt_images(layout)
    for medium in MEDIA:
        given, dealt = kwargs.get(medium.pixels) is not None, medium.name in deals
        if given and not dealt:
            raise NotImplementedError(
                f"{medium.pixels} must come from shard_batch, with needs=handle.needs: a rank computes features of "
                f"some {medium.name}, and holds the tokens of others"
            )
        if dealt and not given:
            raise ValueError(f"{medium.pixels} of the batch are missing, which shard_batch dealt out")
    handle.images, handle.images_placed = deals, dict.fromkeys(deals, 0)


def check_images_placed(handle: Any) -> None:
    """After a forward pass: raises NotImplementedError for a model that took its images in another way."""
    placed, handle.images, handle.images_placed = handle.images_placed, {}, {}
    for medium in MEDIA:
        if placed.get(medium.name, 1) != 1:
            raise NotImplementedError(
                f"{type(handle.model).__name__} called {medium.method} {placed[medium.name]} times in a forward pass, "
                f"and not once: its {medium.name} cannot be dealt out to ranks. Compute inputs_embeds of the global "
                "batch, and give those"
            )


def get_image_features(self: Any, *args: Any, **kwargs: Any) -> Any:
    """In place of the module's own, and of the same form: in a forward pass the features of the tokens of this rank.

    It bears this name because a pickled method is found by its name.
    """
    return _exchanged(self, IMAGES, args, kwargs)


def get_video_features(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The same of videos."""
    return _exchanged(self, VIDEOS, args, kwargs)


_METHODS = {
    medium.method: function for medium, function in zip(MEDIA, (get_image_features, get_video_features), strict=True)
}


def _exchanged(self: Any, medium: Medium, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    plain, handle = getattr(type(self), medium.method), self._ringattn
    deal: ImageDeal | None = handle.images.get(medium.name)
    if deal is None:  # called by itself
        return plain(self, *args, **kwargs)
    taken = inspect.signature(plain).parameters
    # Of other keywords the layout is one, which is none of the tower's.
    kwargs = {name: value for name, value in kwargs.items() if name in taken or name == "return_dict"}
    deals, handle.images = handle.images, {}  # one method may ask the other
    try:
        found = plain(self, *args, **kwargs)
    finally:
        handle.images = deals
    handle.images_placed[medium.name] += 1
    levels = [getattr(found, "pooler_output", found), *_deep_features(handle, found)]  # older ones return features
    every = [_rows(level) for level in levels]
    rows = torch.cat(every, -1)  # so that all levels travel together
    if deal.tokens is not None and len(rows) != deal.tokens:
        raise ValueError(
            f"{medium.pixels}: {medium.name} {deal.computed} have {deal.tokens} tokens in input_ids, and {len(rows)} "
            f"features of {type(self).__name__}"
        )
    local = placed_features(rows, deal, wire_of(handle.mesh, f"features of {medium.name}"))
    widths = [level.shape[-1] for level in every]
    first, *deep = (_like(level, part) for level, part in zip(levels, local.split(widths, -1), strict=True))
    if levels[0] is found:
        return first
    found.pooler_output = first
    if deep:
        found.deepstack_features = deep
    return found


def _deep_features(handle: Any, found: Any) -> list[Any]:
    """Features for several layers of the decoder, where it takes them (DeepStack, arXiv 2406.04334)."""
    if not DEEP.issubset(handle.needs.several):
        return []
    deep = getattr(found, "deepstack_features", None)
    if not deep:
        raise NotImplementedError(
            f"the decoder of {type(handle.model).__name__} takes {', '.join(sorted(DEEP))}, and features of its images "
            "come without deepstack_features"
        )
    return [*deep]


def _rows(features: Any) -> Tensor:
    """(R, hidden), from features of all images or of each."""
    return features.reshape(-1, features.shape[-1]) if isinstance(features, Tensor) else torch.cat([*features])


def _like(features: Any, local: Tensor) -> Any:
    """In the form in which a model has its features: those of this rank's tokens, as if they were of one image."""
    if isinstance(features, Tensor):
        return local.reshape(*(1,) * (features.dim() - 2), *local.shape)
    return type(features)([local])


def placed_features(rows: Tensor, deal: ImageDeal, wire: Wire) -> Tensor:
    """The features of this rank's tokens, (m, hidden), from those of its images (R, hidden). Collective, and so is its
    backward pass, in which every gradient is put into its place: a feature is of one token."""
    send, place = (to_device(index, rows.device) for index in (deal.send, deal.place))
    (sent,) = taken_apart(rows, [send])
    return taken_apart(exchanged(sent, deal.sends, deal.receives, wire), [place])[0]

"""Features of images in a model's forward pass: those of the images that this rank computes, for the tokens it holds.

The model asks its `get_image_features` for the features of the images that it was given, and gets those of the tokens
that it was given. An exchange stands in between, whose gradient is the exchange back. Every rank runs the tower, also
one whose images are none, on an image that counts nowhere: engines gather weights there.

Legend: m tokens of images of this rank; R of its own images; hidden of the decoder.
"""

import inspect
from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from ringattn.hf.vision import PIXELS, ImageDeal, VisionTower, dealt_images
from ringattn.kernels.spec import to_device
from ringattn.recurrent.piles import taken_apart
from ringattn.recurrent.wire import Wire, exchanged, wire_of


def put_exchange(handle: Any, tower: VisionTower) -> None:
    """Make the model's `get_image_features` exchange them; `take_exchange` undoes it."""
    owner = handle.model.get_submodule(tower.path)
    owner._ringattn = handle
    owner.get_image_features = MethodType(get_image_features, owner)


def take_exchange(model: Any) -> None:
    for part in model.modules():
        part.__dict__.pop("get_image_features", None)


def expect_images(handle: Any, layout: Any, kwargs: Mapping[str, Any]) -> None:
    """Before a forward pass: raises an error where images are not those of the batch. No communication."""
    deal, pixels = dealt_images(layout), kwargs.get(PIXELS)
    if pixels is not None and deal is None:
        raise NotImplementedError(
            f"{PIXELS} must come from shard_batch, with needs=handle.needs: a rank computes features of some images, "
            "and holds the tokens of others"
        )
    if pixels is None and deal is not None:
        raise ValueError(f"{PIXELS} of the batch are missing, which shard_batch dealt out")
    handle.images, handle.images_placed = deal, 0


def check_images_placed(handle: Any) -> None:
    """After a forward pass: raises NotImplementedError for a model that took its images in another way."""
    deal, handle.images = handle.images, None
    if deal is not None and handle.images_placed != 1:
        raise NotImplementedError(
            f"{type(handle.model).__name__} called get_image_features {handle.images_placed} times in a forward pass, "
            "and not once: its images cannot be dealt out to ranks. Compute inputs_embeds of the global batch, and "
            "give those"
        )


def get_image_features(self: Any, *args: Any, **kwargs: Any) -> Any:
    """In place of the module's own, and of the same form: in a forward pass the features of the tokens of this rank."""
    plain, handle = type(self).get_image_features, self._ringattn
    deal: ImageDeal | None = handle.images
    if deal is None:  # called by itself
        return plain(self, *args, **kwargs)
    taken = inspect.signature(plain).parameters
    # Of other keywords the layout is one, which is none of the tower's.
    kwargs = {name: value for name, value in kwargs.items() if name in taken or name == "return_dict"}
    found = plain(self, *args, **kwargs)
    handle.images_placed += 1
    features = getattr(found, "pooler_output", found)  # older ones return the features themselves
    listed = not isinstance(features, Tensor)
    rows = torch.cat([*features]) if listed else features.reshape(-1, features.shape[-1])
    if deal.tokens is not None and len(rows) != deal.tokens:
        raise ValueError(
            f"{PIXELS}: images {deal.computed} have {deal.tokens} tokens in input_ids, and {len(rows)} features of "
            f"{type(self).__name__}"
        )
    local = placed_features(rows, deal, wire_of(handle.mesh, "features of images"))
    placed = type(features)([local]) if listed else local.reshape(*(1,) * (features.dim() - 2), *local.shape)
    if features is found:
        return placed
    found.pooler_output = placed
    return found


def placed_features(rows: Tensor, deal: ImageDeal, wire: Wire) -> Tensor:
    """The features of this rank's tokens, (m, hidden), from those of its images (R, hidden). Collective, and so is its
    backward pass, in which every gradient is put into its place: a feature is of one token."""
    send, place = (to_device(index, rows.device) for index in (deal.send, deal.place))
    (sent,) = taken_apart(rows, [send])
    return taken_apart(exchanged(sent, deal.sends, deal.receives, wire), [place])[0]

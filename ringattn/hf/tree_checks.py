"""What a model must have, or not have, to be trained on trees of sequences."""

from typing import Any

from torch import nn

from ringattn.hf.attention import layer_type
from ringattn.hf.handle import Handle
from ringattn.hf.memory import noted_triples
from ringattn.hf.support import RECURRENT, text_model
from ringattn.kept import kept, kept_already
from ringattn.parallel.layout import Layout

TOKENS = "tokens of trees"


def check_trees(handle: Handle, layout: Layout, kwargs: dict[str, Any]) -> None:
    """Raises NotImplementedError for a batch of trees that the model cannot take. No communication."""
    tiled = handle.memory is not None and handle.memory.head is not None
    if kwargs.get("labels") is not None and noted_triples(layout) is not None and not tiled:
        raise needs_tiles(handle.model)
    tokens = kept_already(layout, TOKENS)
    for tower in handle.needs.towers:
        if tokens is not None and bool((tokens == tower.token).any()):
            raise NotImplementedError(
                f"trees have tokens of {tower.medium.name} ({tower.token}), whose features "
                f"{type(handle.model).__name__} would need: {tower.medium.name} are not dealt out along trees. Train "
                "them as separate sequences, with shard_batch"
            )
    if layout.docs.segments:
        told = kept(handle, "carrying layer", lambda: carrying_layer(handle.model))
        if told is not None:
            raise NotImplementedError(
                f"{type(handle.model).__name__} has {told}, which carries something from token to token: on trees each "
                "branch would have to begin with what its parent ends with. Train it on separate sequences"
            )
        chunked = kept(handle, "chunked layer", lambda: chunked_layer(handle.model))
        if chunked is not None:
            raise NotImplementedError(
                f"{type(handle.model).__name__} has {chunked}, whose attention is in chunks of positions, and a branch "
                "may begin inside of one: that is not planned on trees. Train it on separate sequences"
            )


def carrying_layer(model: Any) -> str | None:
    """A layer of a model that carries a state or neighbours along a sequence, with its place; None: it has none."""
    for path, layer in text_model(model).named_modules():
        kind = type(layer).__name__
        if not path:  # the model itself may be named for its layers
            continue
        if isinstance(layer, nn.Conv1d | nn.RNNBase) or RECURRENT.search(kind):
            return f"{kind} at {path}"
    return None


def chunked_layer(model: Any) -> str | None:
    """A layer of a model whose attention ends at chunks, with its place; None: it has none."""
    for path, layer in text_model(model).named_modules():
        if layer_type(layer) == "chunked_attention" and hasattr(layer, "layer_idx"):
            return f"{type(layer).__name__} at {path}"
    return None


def needs_tiles(model: Any) -> NotImplementedError:
    """What is said of a model whose loss takes one target for each token."""
    return NotImplementedError(
        f"{type(model).__name__} has a loss of one target for each token, and rows of trees have several, with "
        "weights: parallelize(model, mesh, memory=MemorySettings(loss_tile=2048)) takes them"
    )

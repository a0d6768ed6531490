"""Which parameters FSDP2 gathers together, when it lets them go, and how far ahead it gathers.

A group is gathered as one: the embedding, each decoder layer, the head, and the root with what is left (norms). Without
groups of their own embedding and head, a quarter of a GiB to two GiB of an 8B model, would stay from the first layer's
forward pass to its backward pass.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from ringattn.hf.layers import decoder_layers
from ringattn.memory.settings import StateSettings


def shard_groups(model: nn.Module, states: StateSettings, **shared: Any) -> None:
    """`fully_shard` on every group of a model.

    Arguments:
        shared: what all groups have alike: the mesh, precision and place.
    """
    embedding, head = _ends(model)
    layers = list(decoder_layers(model))
    if embedding is not None:
        group = fully_shard(embedding, reshard_after_forward=True, **shared)
        # The backward pass of a plain one needs indices alone, so that it is gathered once.
        group.set_unshard_in_backward(not isinstance(embedding, nn.Embedding))
    for layer in layers:
        fully_shard(layer, reshard_after_forward=states.reshard, **shared)
    if head is not None:
        # Its backward pass comes next after its forward pass: let go, it would be gathered again at once, and kept, it
        # goes as soon as that is over. (A tiled loss makes the head's gradient in its forward pass.)
        fully_shard(head, reshard_after_forward=False, **shared)
    fully_shard(model, **shared)
    order = [one for one in (embedding, *layers, head) if one is not None]
    _prefetch([one for one in order if isinstance(one, FSDPModule)], states.prefetch)


def _ends(model: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """Embedding and head that can be groups; None for one that is not there, or shares parameters with others.

    Tied, both use one parameter, which has to be there for either: it stays with the root.
    """
    embedding, head = (getattr(model, name)() for name in ("get_input_embeddings", "get_output_embeddings"))
    if embedding is None or head is None or {*embedding.parameters()} & {*head.parameters()}:
        return None, None
    return embedding, head


def _prefetch(order: Sequence[FSDPModule], count: int) -> None:
    """Each group asks for the next `count` when it begins, in the order of either pass.

    With 0, a group is gathered when it is its turn, on the stream of the computation, which waits: no more than one is
    there at a time. By itself FSDP2 gathers one ahead.
    """
    for place, group in enumerate(order):
        if count == 0:
            group._set_unshard_async_op(True)
            group.set_modules_to_backward_prefetch([group])  # it is there by then; an empty list would mean one ahead
            continue
        group.set_modules_to_forward_prefetch(list(order[place + 1 : place + 1 + count]))
        group.set_modules_to_backward_prefetch(list(reversed(order[max(0, place - count) : place])) or [group])

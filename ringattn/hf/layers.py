"""Where a transformers model has its repeated layers, and their MLPs."""

from typing import Any

from torch import nn

from ringattn.hf.configuration import IN_TILES, asks_router_loss

# What families call the part of a layer that looks at one token at a time.
MLPS = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe")


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The repeated layers, in the order in which they run. Raises ValueError if they cannot be found."""
    config: Any = model.config
    wanted = config.get_text_config().num_hidden_layers
    found = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == wanted]
    if not found:
        raise ValueError(f"{type(model).__name__} has no list of {wanted} decoder layers")
    return max(found, key=lambda layers: sum(p.numel() for p in layers.parameters()))


def mlps_of(model: nn.Module) -> list[nn.Module]:
    """The MLP or mixture of experts of every layer. Raises NotImplementedError naming a layer that has none apart."""
    found: list[nn.Module] = []
    for layer in decoder_layers(model):
        mlp = next((part for name, part in layer.named_children() if name in MLPS), None)
        if mlp is None:
            parts = ", ".join(name for name, _ in layer.named_children())
            raise NotImplementedError(
                f"mlp_tile: {type(model).__name__} has no MLP of its own in {type(layer).__name__}, whose parts are "
                f"{parts}; leave mlp_tile out"
            )
        found.append(mlp)
    return found


def tileable_mlps(model: nn.Module) -> list[nn.Module]:
    """Those of every layer, if they can be computed in tiles of tokens. Raises NotImplementedError naming what speaks
    against it."""
    if asks_router_loss(model):
        raise NotImplementedError(f"mlp_tile: {type(model).__name__} has output_router_logits=True, {IN_TILES}")
    return mlps_of(model)

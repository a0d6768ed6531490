"""Keys of a transformers configuration that no rank can honour by itself: read in `parallelize` and at every forward.

They ask for something of more than one token, or of how many there are, or for a draw that all ranks must share.
"""

from typing import Any

REFUSED = {
    "add_cross_attention": "cross attention (to an encoder or to images) is not supported",
    "alibi": "an additive bias on the scores is not supported",
    "chunk_size_feed_forward": "chunks must divide a rank's tokens, whose number differs between ranks; set it to 0",
    "cross_attention_layers": "cross attention (to an encoder or to images) is not supported",
    "decoder_layerdrop": "layers are dropped by a draw that must be equal on all ranks, which draw apart; set it to 0",
    "layerdrop": "layers are dropped by a draw that must be equal on all ranks, which draw apart; set it to 0",
    "output_attentions": "flash attention never forms that matrix",
    "ple_layer_ids": "embeddings of n-grams need the tokens before a rank's first",
    "use_alibi": "an additive bias on the scores is not supported",
}

# Why routers whose loss counts cannot be computed in tiles of tokens.
IN_TILES = "and in tiles a router's logits are gone when its loss is made; leave mlp_tile out, or set that key to False"


def check_configuration(model: Any) -> None:
    """Raises NotImplementedError naming the first key that asks for what is not supported, in whichever part."""
    configs = (model.config, model.config.get_text_config())
    for config in configs[: 1 if configs[0] is configs[1] else 2]:
        for key, reason in REFUSED.items():
            if value := getattr(config, key, None):
                raise NotImplementedError(f"{type(model).__name__} has {key}={value!r}: {reason}")


def asks_router_loss(model: Any) -> bool:
    """Whether a model's configuration asks it to add the loss of its routers (`ringattn.hf.router_loss`)."""
    configs = (model.config, model.config.get_text_config())
    return any(getattr(config, "output_router_logits", False) for config in configs)

"""What embeddings of a multimodal model do not say by themselves, where images, videos or sounds are in them.

A decoder may need to know which tokens are of an image: because those see each other in both directions, because their
features enter in several layers, or because their positions count on several axes. Given embeddings alone it would
compute something else, without a word. All of it is read from the model: its forward passes and its mask builder.
"""

import inspect
from dataclasses import dataclass
from typing import Any

from ringattn.hf.blocks import BlockRule, block_rule, check_blocks, uses_blocks
from ringattn.hf.support import text_model
from ringattn.hf.vision import DEEP, MEDIA, VisionTower, dealt_images, vision_towers
from ringattn.parallel.layout import Layout
from ringattn.parallel.mesh.mesh import SequenceMesh

# What every decoder's forward pass takes; anything else is one more way into it.
_USUAL = frozenset(
    {
        "attention_mask",
        "cache",
        "cache_position",
        "input_ids",
        "inputs_embeds",
        "kwargs",
        "labels",
        "logits_to_keep",
        "output_attentions",
        "output_hidden_states",
        "past_key_values",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)
# Arguments of transformers' mask builder by which tokens of a block see each other.
_BLOCKS = ("block_sequence_ids", "or_mask_function")
_MARKS = "token_type_ids"


@dataclass(frozen=True)
class EmbeddingNeeds:
    """What a model needs beside `inputs_embeds`.

    Arguments:
        marks: the keyword that says which tokens are of an image, where those see each other; "" where none do.
        several: keywords by which features enter the decoder beside its embeddings.
        axes: positions of image tokens count on several axes (M-RoPE).
        rule: how the marks make blocks of tokens that see each other, if that is known.
        towers: how it takes images and videos themselves, if it does.
    """

    marks: str = ""
    several: tuple[str, ...] = ()
    axes: bool = False
    rule: BlockRule | None = None
    towers: tuple[VisionTower, ...] = ()


def embedding_needs(model: Any) -> EmbeddingNeeds:
    """What a model needs beside embeddings; it may be on the meta device. A model of text alone needs nothing."""
    text = text_model(model)
    if text is model:
        return EmbeddingNeeds()
    around = [part for part in model.modules() if part is not text and any(inner is text for inner in part.modules())]
    sources = "".join(inspect.getsource(type(part).forward) for part in around)
    taken = list(inspect.signature(model.forward).parameters)
    marks = next((name for name in taken if name.endswith(_MARKS)), _MARKS)
    blocks = any(word in sources for word in _BLOCKS) and uses_blocks(model.config)
    several = set(inspect.signature(text.base_model.forward).parameters) - _USUAL
    if not getattr(text.config, "hidden_size_per_layer_input", 1):
        several.discard("per_layer_inputs")  # which only the small models of Gemma 4 have
    return EmbeddingNeeds(
        marks if blocks else "",
        tuple(sorted(several)),
        any(hasattr(part, "get_rope_index") for part in around),
        block_rule(model.config) if blocks else None,
        vision_towers(model, around),
    )


def check_embeddings(needs: EmbeddingNeeds, mesh: SequenceMesh, layout: Layout, kwargs: dict[str, Any]) -> None:
    """Raises NotImplementedError or ValueError where a forward pass would take images for text.

    Collective over the sequence ranks where tokens are marked: an image is refused on all of them.
    """
    marks = kwargs.get(needs.marks) if needs.marks else None
    if needs.marks:
        check_blocks(layout, mesh, needs.marks, needs.rule, marks)
    pixels = [medium.pixels for medium in MEDIA]
    given = next((name for name in ("inputs_embeds", *pixels) if kwargs.get(name) is not None), None)
    deals = dealt_images(layout).values()
    if given is None or (given in pixels and deals and all(deal.tokens is None for deal in deals)):
        return
    if needs.marks and marks is None:
        raise NotImplementedError(
            f"{given} without {needs.marks}: tokens of an image see each other in both directions in this model, "
            f"and embeddings do not tell whether there are any. Give input_ids for text, or {needs.marks} too"
        )
    # Of tokens by their ids, the inputs of each layer are made where they are held; features of images travel there.
    made = {"per_layer_inputs", *DEEP} if given in pixels else set()
    several = [name for name in needs.several if name not in made]
    if several:
        raise NotImplementedError(
            f"{given} are not all that this model's decoder takes of an image: features enter by "
            f"{', '.join(several)} too, which is not supported. Give input_ids for text"
        )
    if needs.axes and kwargs["position_ids"].dim() != 3:
        raise ValueError(
            f"position_ids must be (axes, B, S) beside {given} of this model, whose image tokens count on several "
            "axes: give those of the model's get_rope_index to shard_batch (for text all axes are equal), or, beside "
            "images, its processor's mm_token_type_ids and no position_ids"
        )

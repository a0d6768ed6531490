"""What mask a model asks for, read from the function that transformers would have made the matrix with.

Many models say it twice: by the mask, and by a keyword of the attention call. Some (PhiMoE, Llama 4) say it by
the mask alone, so both are read, and a contradiction is refused.
"""

from collections.abc import Callable, Iterator
from typing import Any

from ringattn.mask import Mask

MADE_BY = "transformers.masking_utils"


class MaskNote:
    """Stands where the attention mask would: what the model asked for. No dataclass, since FSDP takes those apart.

    It has the shape of the matrix, (1, 1, queries, keys), which a decoder inside of another model looks at before it
    takes the mask that it is given.
    """

    ndim = 4

    def __init__(self, mask: Mask, overlay: bool = False, tokens: int = 0) -> None:
        self.mask = mask
        self.shape = (1, 1, tokens, tokens)
        self.overlay = overlay  # blocks of tokens that see each other are in it; whether the batch has some or not

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise NotImplementedError(f"the model works on its attention mask itself ({name}), which is not supported")

    def __getitem__(self, index: Any) -> "MaskNote":
        """All of it, as Gemma 4 takes it for layers that share their keys. Raises NotImplementedError for a part."""
        parts = index if isinstance(index, tuple) else (index,)
        if all(
            isinstance(part, slice) and (part.start or 0, part.stop, part.step or 1) == (0, None, 1) for part in parts
        ):
            return self
        raise NotImplementedError(
            f"the model takes a part of its attention mask ({index}), as if it knew where its tokens are: only models "
            "that leave the mask to their attention layers are supported"
        )

    def __repr__(self) -> str:
        return f"MaskNote({self.mask})"


def note_mask(
    *args: Any,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Any = None,
    q_length: Any = None,
    kv_length: Any = None,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    **kwargs: Any,
) -> MaskNote:
    """The AttentionMaskInterface function: no matrix is made, and a mask that would be lost is refused."""
    if args or mask_function is None:
        raise NotImplementedError("this version of transformers asks for masks in a way that ringattn does not know")
    if isinstance(attention_mask, MaskNote):
        return attention_mask  # of the model around this one: transformers too takes a matrix as it is
    if attention_mask is not None:
        raise ValueError("attention_mask must be None: give padding and packing as documents, through shard_batch")
    if q_length != kv_length or _nonzero(q_offset) or _nonzero(kv_offset):
        raise NotImplementedError(
            f"the model asks for a mask of {q_length} queries on {kv_length} keys: KV caches are for generation, "
            "which a parallelized model cannot do (handle.undo() gives the plain model back)"
        )
    return MaskNote(*read_mask(mask_function), q_length)


def read_mask(function: Callable[..., Any]) -> tuple[Mask, bool]:
    """The band and chunk of a mask function of transformers, what a window does to blocks of tokens that see each
    other, and whether it has such blocks. Raises NotImplementedError for any part not known.
    """
    causal, left, right, chunk, blocks = False, -1, -1, None, ""
    for part, size in _parts(function):
        if part == "blockwise_overlay":
            blocks = "whole" if "sliding_window_overlay" in size else "clipped"
        elif part == "causal_mask_function":
            causal = True
        elif part == "sliding_window_overlay":
            left = size - 1  # transformers counts the query itself
        elif part == "sliding_window_bidirectional_overlay":
            left = right = size  # here it does not
        elif part == "chunked_overlay":
            chunk = size
    if blocks and (not causal or chunk is not None):
        raise NotImplementedError("the model asks for a mask with blocks that is not causal, or has chunks")
    return Mask(causal, (left, right), chunk, blocks if blocks and left >= 0 else "whole"), bool(blocks)


# What a mask may be made of: the maker's name and the variable that holds its size. Packing is not read from here: the
# segments were guessed from local positions, and documents are known better.
PARTS = {
    "causal_mask_function": None,
    "bidirectional_mask_function": None,
    "packed_sequence_mask_function": None,
    "sliding_window_overlay": "sliding_window",
    "sliding_window_bidirectional_overlay": "sliding_window",
    "chunked_overlay": "chunk_size",
}


def _parts(function: Any) -> Iterator[tuple[str, Any]]:
    """(maker, size) of all the functions whose intersection a mask function is."""
    name = getattr(function, "__qualname__", type(function).__name__).partition(".")[0]
    known = getattr(function, "__module__", None) == MADE_BY
    names = function.__code__.co_freevars if known else ()
    cells = {key: cell.cell_contents for key, cell in zip(names, function.__closure__ or (), strict=True)}
    if known and name == "and_masks" and "mask_functions" in cells:
        for part in cells["mask_functions"]:
            yield from _parts(part)
    elif known and name == "remap_positions_for_packed_sequence" and "mask_function" in cells:
        yield from _parts(cells["mask_function"])
    elif known and name == "or_masks" and "mask_functions" in cells:
        first, *others = cells["mask_functions"]
        if len(others) != 1 or not _is_overlay(others[0]):
            raise NotImplementedError(
                "the model asks for a mask that is a union of several, which is supported of blocks of tokens that see "
                "each other (of an image, a prefix) alone"
            )
        inside = list(_parts(first))
        yield from inside
        yield "blockwise_overlay", {part for part, _ in inside}  # and not cut by what is beside the union
    elif known and name in PARTS and (PARTS[name] is None or isinstance(cells.get(PARTS[name]), int)):
        yield name, cells.get(PARTS[name] or "")
    else:
        raise NotImplementedError(
            f"the model asks for a mask made by {name} (image tokens, prefixes, blocks, ...), which is not supported"
        )


def _is_overlay(function: Any) -> bool:
    """Whether a part of a union of masks is of blocks. Which ones is not read: a rank sees its own tokens alone."""
    name = getattr(function, "__qualname__", "").partition(".")[0]
    return getattr(function, "__module__", None) == MADE_BY and name == "blockwise_overlay"


def _nonzero(offset: Any) -> bool:
    return not isinstance(offset, int) or offset != 0

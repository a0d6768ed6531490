"""What mask a model asks for, read from the function that transformers would have made the matrix with.

Many models say it twice: by the mask, and by a keyword of the attention call. Some (PhiMoE, Llama 4) say it by
the mask alone, so both are read, and a contradiction is refused.
"""

from collections.abc import Callable, Iterator
from typing import Any

from ringattn.mask import Mask

MADE_BY = "transformers.masking_utils"


class MaskNote:
    """Stands where the attention mask would: what the model asked for. No dataclass, since FSDP takes those apart."""

    def __init__(self, mask: Mask) -> None:
        self.mask = mask

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
    if attention_mask is not None:
        raise ValueError("attention_mask must be None: give padding and packing as documents, through shard_batch")
    if q_length != kv_length or _nonzero(q_offset) or _nonzero(kv_offset):
        raise NotImplementedError(
            f"the model asks for a mask of {q_length} queries on {kv_length} keys: KV caches are for generation, "
            "which a parallelized model cannot do (handle.undo() gives the plain model back)"
        )
    return MaskNote(read_mask(mask_function))


def read_mask(function: Callable[..., Any]) -> Mask:
    """The band and chunk of a mask function of transformers. Raises NotImplementedError for any part not known."""
    causal, left, right, chunk = False, -1, -1, None
    for part, size in _parts(function):
        if part == "causal_mask_function":
            causal = True
        elif part == "sliding_window_overlay":
            left = size - 1  # transformers counts the query itself
        elif part == "sliding_window_bidirectional_overlay":
            left = right = size  # here it does not
        elif part == "chunked_overlay":
            chunk = size
    return Mask(causal, (left, right), chunk)


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
        if not all(_without_blocks(other) for other in others):
            raise NotImplementedError(
                "the model asks for a mask of tokens that see each other in both directions (of an image, a prefix), "
                "which is not supported"
            )
        yield from _parts(first)
    elif known and name in PARTS and (PARTS[name] is None or isinstance(cells.get(PARTS[name]), int)):
        yield name, cells.get(PARTS[name] or "")
    else:
        raise NotImplementedError(
            f"the model asks for a mask made by {name} (image tokens, prefixes, blocks, ...), which is not supported"
        )


def _without_blocks(function: Any) -> bool:
    """Whether a part of a union of masks adds nothing: blocks of image tokens in a batch that has none."""
    name = getattr(function, "__qualname__", "").partition(".")[0]
    if getattr(function, "__module__", None) != MADE_BY or name != "blockwise_overlay":
        return False
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    return "block_sequence_ids" in cells and not bool((cells["block_sequence_ids"].cell_contents >= 0).any())


def _nonzero(offset: Any) -> bool:
    return not isinstance(offset, int) or offset != 0

"""Positions of images that count on several axes (M-RoPE), by the model's own rule, of all tokens of a batch.

A model makes them of the tokens that it is given, which on a rank are a part of all, and by rows, where documents may
be packed. So they are made here, document by document, before the batch is cut.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ringattn.documents import Documents

GRID = "image_grid_thw"  # (images, 3): patches of each image, whose pixels stand end to end
TYPES = "mm_token_type_ids"  # 0 text, 1 image
_AXES = 3  # time, height, width
RopeIndex = Callable[..., tuple[Tensor, Tensor]]


def rope_index(owner: Any) -> RopeIndex | None:
    """A model's `get_rope_index`, where it counts by token types and grids; None for others."""
    found = getattr(owner, "get_rope_index", None)
    if found is None:
        return None
    taken = inspect.signature(found).parameters
    return found if TYPES in taken and GRID in taken else None


def with_axes(batch: Mapping[str, Any], docs: Documents, rule: RopeIndex | None) -> Mapping[str, Any]:
    """The batch with position_ids (axes, B, S), where it has images and their types and tells no positions itself.

    Arguments:
        docs: of its tokens, rows end to end.
        rule: the model's, of `rope_index`.

    Raises ValueError where types and grids do not tell as many images.
    """
    ids, types, grid = batch.get("input_ids"), batch.get(TYPES), batch.get(GRID)
    if rule is None or docs.segments or batch.get("position_ids") is not None:
        return batch
    if ids is None or types is None or grid is None:
        return batch
    if types.shape != ids.shape:
        raise ValueError(f"{TYPES} must have the shape of input_ids, {tuple(ids.shape)}, got {tuple(types.shape)}")
    flat_ids, flat_types = ids.reshape(-1), types.reshape(-1)
    images = (flat_types == 1).to("cpu")
    spans = [(start, start + size) for start, size in zip(docs.starts, docs.lengths, strict=True) if size]
    counts = [_runs(images[start:stop]) for start, stop in spans]
    if sum(counts) != len(grid):
        raise ValueError(
            f"{TYPES} have {sum(counts)} runs of image tokens and {GRID} {len(grid)} images: each image must be a run "
            "of its own, with text between two"
        )
    positions, first = torch.zeros(_AXES, len(flat_ids), dtype=torch.int64, device=ids.device), 0
    for (start, stop), count in zip(spans, counts, strict=True):
        positions[:, start:stop] = torch.arange(stop - start, device=ids.device)
        if count:
            part = {"input_ids": flat_ids[None, start:stop], TYPES: flat_types[None, start:stop]}
            positions[:, start:stop] = rule(**part, **{GRID: grid[first : first + count]})[0][:, 0]
        first += count
    return {**batch, "position_ids": positions.unflatten(1, torch.atleast_2d(ids).shape)}


def _runs(inside: Tensor) -> int:
    """How many runs of True there are in (n,)."""
    return int(inside[0]) + int((inside[1:] & ~inside[:-1]).sum())

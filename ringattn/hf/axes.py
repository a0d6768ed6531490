"""Positions of images and videos that count on several axes (M-RoPE), by the model's rule, of all tokens of a batch.

A model makes them of the tokens that it is given, which on a rank are a part of all, and by rows, where documents may
be packed. So they are made here, document by document, before the batch is cut.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from ringattn.documents import Documents

GRID = "image_grid_thw"  # (images, 3): patches of each image, whose pixels stand end to end
VIDEO_GRID = "video_grid_thw"  # (videos, 3): the same, of which the first counts frames
SECONDS = "second_per_grid_ts"  # (videos,): how long a frame is, where the rule asks for it
TYPES = "mm_token_type_ids"  # 0 text, 1 image, 2 video
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
    """The batch with position_ids (axes, B, S), where it has images or videos and their types and tells no positions.

    Arguments:
        docs: of its tokens, rows end to end.
        rule: the model's, of `rope_index`.

    Raises ValueError where types and grids do not tell as many images.
    """
    seconds = batch.get(SECONDS)
    batch = {name: x for name, x in batch.items() if name != SECONDS}
    ids, types = batch.get("input_ids"), batch.get(TYPES)
    if rule is None or docs.segments or batch.get("position_ids") is not None:
        return batch
    if ids is None or types is None or (batch.get(GRID) is None and batch.get(VIDEO_GRID) is None):
        return batch
    if types.shape != ids.shape:
        raise ValueError(f"{TYPES} must have the shape of input_ids, {tuple(ids.shape)}, got {tuple(types.shape)}")
    flat_ids, flat_types = ids.reshape(-1), types.reshape(-1)
    host = flat_types.to("cpu")
    spans = [(start, start + size) for start, size in zip(docs.starts, docs.lengths, strict=True) if size]
    parts = [host[start:stop] for start, stop in spans]
    given = dict[str, list[Any]]()  # of each document, by keyword of the rule
    if batch.get(GRID) is not None:
        given[GRID] = _shared_out(batch[GRID], _images_of(parts, batch[GRID]))
    if batch.get(VIDEO_GRID) is not None:
        videos = _videos_of(parts, batch[VIDEO_GRID])
        given[VIDEO_GRID] = _shared_out(batch[VIDEO_GRID], videos)
        if seconds is not None and SECONDS in inspect.signature(rule).parameters:
            given[SECONDS] = _shared_out(torch.as_tensor(seconds), videos)
    positions = torch.zeros(_AXES, len(flat_ids), dtype=torch.int64, device=ids.device)
    for number, (start, stop) in enumerate(spans):
        positions[:, start:stop] = torch.arange(stop - start, device=ids.device)
        own = {name: values[number] for name, values in given.items() if len(values[number])}
        if own:
            part = {"input_ids": flat_ids[None, start:stop], TYPES: flat_types[None, start:stop]}
            positions[:, start:stop] = rule(**part, **own)[0][:, 0]
    return {**batch, "position_ids": positions.unflatten(1, torch.atleast_2d(ids).shape)}


def _images_of(parts: Sequence[Tensor], grid: Tensor) -> list[int]:
    """How many images each document has, from the types of its tokens: each is a run of its own."""
    counts = [_runs(types == 1) for types in parts]
    if sum(counts) != len(grid):
        raise ValueError(
            f"{TYPES} have {sum(counts)} runs of image tokens and {GRID} {len(grid)} images: each image must be a run "
            "of its own, with text between two"
        )
    return counts


def _videos_of(parts: Sequence[Tensor], grid: Tensor) -> list[int]:
    """How many videos each document has. A video may be one run or, with the time of each frame between, several: so
    they are told by how many tokens they have, in proportion to their patches."""
    tokens = [int((types == 2).sum()) for types in parts]
    patches = grid.to("cpu").prod(-1)
    ends = [0, *(patches.cumsum(0) * sum(tokens) / max(1, int(patches.sum()))).tolist()]
    reached = [0, *accumulate(tokens)]
    if any(end not in ends for end in reached):
        raise ValueError(
            f"{TYPES} have {tokens} tokens of videos in the documents, which do not end where those of "
            f"{VIDEO_GRID} do, of {patches.tolist()} patches: a video must be in one document"
        )
    places = [ends.index(end) for end in reached]
    return [stop - start for start, stop in pairwise(places)]


def _shared_out(values: Tensor, counts: Sequence[int]) -> list[Tensor]:
    return [*values.split(list(counts))]


def _runs(inside: Tensor) -> int:
    """How many runs of True there are in (n,)."""
    return int(inside[0]) + int((inside[1:] & ~inside[:-1]).sum())

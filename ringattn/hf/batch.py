"""`shard_batch`: this rank's part of a global batch, in every form in which batches come.

B rows of S tokens, T = B · S tokens of the stream, t tokens of this rank.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ringattn.documents import Documents
from ringattn.hf.axes import with_axes
from ringattn.hf.blocks import note_rule, with_blocks
from ringattn.hf.images import EmbeddingNeeds
from ringattn.hf.loss import IGNORE_INDEX, shifted_labels
from ringattn.hf.metadata import METADATA, check_metadata, documents_of
from ringattn.hf.same_batch import note_batch
from ringattn.hf.token_ids import Noted, check_items, in_rows, note_ids
from ringattn.hf.vision import deal_images, no_image
from ringattn.mask import Mask
from ringattn.parallel.layout import Layout
from ringattn.parallel.mesh.mesh import SequenceMesh
from ringattn.recurrent.weighing import MixingLayers, weighed_layout

LABELS = ("labels", "shift_labels")
# Keywords that are no tokens and go through as they are.
THROUGH = ("use_cache", "return_dict", "output_hidden_states", "output_router_logits", "logits_to_keep")


def shard_batch(
    batch: Mapping[str, Any],
    docs: Documents | None,
    mesh: SequenceMesh,
    policy: str = "auto",
    mask: Mask | Sequence[tuple[Mask, float]] | None = None,
    needs: EmbeddingNeeds | None = None,
    layers: MixingLayers | None = None,
) -> dict[str, Any]:
    """This rank's part of a batch, as keywords of the model. No communication; the batch is the same on every rank.

    Arguments:
        batch: input_ids or inputs_embeds, (B, S) or (S,), and (B, S, hidden); optionally
            labels (B, S), *not* shifted, -100 where there is no target;
            shift_labels (B, S), each token's own target: they win over labels, as in transformers;
            position_ids (B, S), or (axes, B, S) for M-RoPE; by default positions count from 0 in every document;
            num_items_in_batch: targets that the loss is divided by, of more than this batch;
            attention_mask, segment_ids or seq_idx, cu_seq_lens_q and _k, max_length_q and _k: see below;
            pixel_values beside input_ids, and what the model's get_image_features takes with them: images of the whole
            batch in the order of their tokens, each of which one rank computes;
            any other tensor with a row for each token, (B, S, ...), is cut alike.
        docs: the documents of the stream of T tokens, rows end to end. None: they are read from the batch, see
            `ringattn.hf.metadata.documents_of`. What the batch says besides must agree with them.
        policy, mask: those of `Layout`; for a model with several masks pairs (mask, number of layers).
        needs: those of the model, `handle.needs`: by them token_type_ids or mm_token_type_ids make blocks of tokens
            that see each other, where the documents have none yet, and images are dealt out. Without, the model
            refuses such a batch.
        layers: those of a model that has layers with states, `ringattn.hf.shape.mixing_layers(model)`: policy="auto"
            then takes the layout on which all of them together are predicted to be fastest.

    Returns: input_ids, position_ids (1, t), ...; with targets also labels, shift_labels (1, t) and their number in
    the T tokens; and the layout, as `cu_seq_lens_q`: `layout.unshard(logits[0]).view(B, S, -1)` brings logits back.
    Raises ValueError naming a key that is malformed, unknown or contradicts another one.
    """
    rows, size = _shape(batch)
    if docs is None:
        docs = documents_of(batch, rows, size)
    elif docs.total != rows * size:
        raise ValueError(f"docs must have the {rows * size} tokens of the batch, got {docs}: input_ids {rows} × {size}")
    else:
        check_metadata(batch, docs, rows, size)
    if needs is not None:
        batch, docs = _with_needs(batch, docs, needs)
    layout = _layout(docs, mesh, policy, mask, layers)
    if needs is not None:
        note_rule(layout, needs.rule)
    if batch.get("input_ids") is not None:
        note_batch(layout, batch["input_ids"])
        note_ids(layout, Noted(batch["input_ids"], "input_ids", in_rows("input_ids", size, batch["input_ids"].dim())))
    local = _images(layout, batch, needs)
    left = {name: x for name, x in batch.items() if not (name in local or no_image(name, x))}
    local |= _inputs(layout, left, rows, size)
    targets = _targets(batch, docs, rows, size)
    if targets is not None:
        note_ids(layout, _noted_targets(batch, targets, size))
        # Models compute a loss where there are labels, from shift_labels where there are these.
        labels = targets if batch.get("labels") is None else _labels("labels", batch, rows, size)
        local["labels"] = layout.shard(labels)[None]
        local["shift_labels"] = layout.shard(targets)[None]
        local.setdefault("num_items_in_batch", (targets != IGNORE_INDEX).sum())
    return {"use_cache": False} | local | attention_kwargs(layout)


def _with_needs(
    batch: Mapping[str, Any], docs: Documents, needs: EmbeddingNeeds
) -> tuple[Mapping[str, Any], Documents]:
    """With the blocks that a model makes of its marks, and the positions of its images."""
    docs = with_blocks(docs, batch, needs.marks, needs.rule)
    return (with_axes(batch, docs, needs.towers[0].axes) if needs.towers else batch), docs


def _layout(
    docs: Documents,
    mesh: SequenceMesh,
    policy: str,
    mask: Mask | Sequence[tuple[Mask, float]] | None,
    layers: MixingLayers | None,
) -> Layout:
    if layers is None:
        return Layout(docs, mesh, policy, mask=mask)
    if mask is not None or policy != "auto":
        raise ValueError(
            f'layers are what policy="auto" weighs, masks with them: with layers expected policy="auto" and mask=None, '
            f"got policy={policy!r} and mask={mask!r}"
        )
    return weighed_layout(docs, mesh, policy, layers)


def _images(layout: Layout, batch: Mapping[str, Any], needs: EmbeddingNeeds | None) -> dict[str, Any]:
    """This rank's images, and what goes with them."""
    ids = batch.get("input_ids")
    return deal_images(layout, batch, None if ids is None else ids.reshape(-1), () if needs is None else needs.towers)


def _inputs(layout: Layout, batch: Mapping[str, Any], rows: int, size: int) -> dict[str, Any]:
    """What the model reads of a batch, but for targets: this rank's rows, and always their positions."""
    local: dict[str, Any] = {}
    for name, value in batch.items():
        if name in METADATA or name in LABELS or value is None:
            continue
        if name == "num_items_in_batch":
            check_items(name, value)
            local[name] = value
        elif name in THROUGH:
            local[name] = value
        elif name == "position_ids":
            local[name] = _shard_positions(layout, value, rows, size)
        else:
            local[name] = layout.shard(_stream(name, value, rows, size))[None]
    if "position_ids" not in local:
        device = next(x.device for x in local.values() if isinstance(x, Tensor))
        local["position_ids"] = layout.position_ids(device)[None]
    return local


def attention_kwargs(layout: Layout) -> dict[str, Any]:
    """Keywords of a model's forward that tell its attention layers the layout of the batch."""
    return {"cu_seq_lens_q": layout}


def count_targets(batch: Mapping[str, Any]) -> Tensor:
    """Number of targets in a global batch whose documents it says itself: what its loss is divided by."""
    rows, size = _shape(batch)
    targets = _targets(batch, documents_of(batch, rows, size), rows, size)
    if targets is None:
        raise ValueError(f"batch must hold labels or shift_labels, got the keys {sorted(batch)}")
    return (targets != IGNORE_INDEX).sum()


def _targets(batch: Mapping[str, Any], docs: Documents, rows: int, size: int) -> Tensor | None:
    """Each token's target, (T,), -100 where it has none; None for a batch without labels.

    Raises ValueError for a target of padding, which sees nothing, and for labels of trees.
    """
    if batch.get("shift_labels") is None:
        return None if batch.get("labels") is None else shifted_labels(_labels("labels", batch, rows, size), docs)
    targets = _labels("shift_labels", batch, rows, size)
    padded = [targets[start:stop] for start, stop in docs.padding]
    if padded and bool((torch.cat(padded) != IGNORE_INDEX).any()):
        start, stop = next(
            span for span, part in zip(docs.padding, padded, strict=True) if (part != IGNORE_INDEX).any()
        )
        raise ValueError(f"shift_labels must be {IGNORE_INDEX} in padding, got a target in tokens {start} to {stop}")
    return targets


def _noted_targets(batch: Mapping[str, Any], targets: Tensor, size: int) -> Noted:
    """The targets (T,), which are found a token further on where they were shifted here."""
    name, shift = ("labels", 1) if batch.get("shift_labels") is None else ("shift_labels", 0)
    return Noted(targets, name, in_rows(name, size, batch[name].dim(), shift), targets=True)


def _labels(name: str, batch: Mapping[str, Any], rows: int, size: int) -> Tensor:
    return _stream(name, batch[name], rows, size)


def _shape(batch: Mapping[str, Any]) -> tuple[int, int]:
    """B and S."""
    ids, embeddings = batch.get("input_ids"), batch.get("inputs_embeds")
    if (ids is None) == (embeddings is None):
        raise ValueError(f"batch must hold either input_ids or inputs_embeds, got the keys {sorted(batch)}")
    if isinstance(ids, Tensor) and ids.dim() in (1, 2):
        rows, size = torch.atleast_2d(ids).shape
    elif isinstance(embeddings, Tensor) and embeddings.dim() in (2, 3):
        rows, size = (1, *embeddings.shape)[-3:-1]
    else:
        came = ids if ids is not None else embeddings
        shape = tuple(came.shape) if isinstance(came, Tensor) else type(came).__name__
        raise ValueError(f"input_ids must be (B, S) or (S,), inputs_embeds (B, S, hidden), got {shape}")
    return rows, size


def _stream(name: str, value: Any, rows: int, size: int) -> Tensor:
    """(B, S, ...) or, of one row, (S, ...) -> (T, ...)"""
    if isinstance(value, Tensor) and tuple(value.shape[:2]) == (rows, size):
        return value.flatten(0, 1)
    if isinstance(value, Tensor) and rows == 1 and value.dim() and len(value) == size:
        return value
    shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
    raise ValueError(f"{name} must have a row for each token, ({rows}, {size}, ...), got {shape}: it cannot be cut")


def _shard_positions(layout: Layout, positions: Any, rows: int, size: int) -> Tensor:
    """(B, S) or (S,) -> (1, t); (axes, B, S) -> (axes, 1, t)"""
    if not isinstance(positions, Tensor) or positions.dim() not in (1, 2, 3) or positions.shape[-1] != size:
        shape = tuple(positions.shape) if isinstance(positions, Tensor) else type(positions).__name__
        raise ValueError(f"position_ids must be ({rows}, {size}) or (axes, {rows}, {size}), got {shape}")
    positions = positions.expand(*positions.shape[:-2], rows, size)
    return layout.shard(positions.flatten(-2), dim=-1).unsqueeze(-2)

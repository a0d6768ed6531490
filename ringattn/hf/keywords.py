"""The keywords of a model's forward pass, checked before anything runs: what would be silently wrong is an error."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ringattn.hf.handle import Handle
from ringattn.hf.images import check_embeddings
from ringattn.parallel.layout import Layout

GENERATION = "a parallelized model is for training; handle.undo() gives the plain model back, which can generate"
REFUSED = {
    "output_attentions": "flash attention never forms the attention matrix",
    "past_key_values": f"KV caches are for generation, and so are the prefixes of PEFT's tuners: {GENERATION}",
    "encoder_hidden_states": "cross attention is not supported",
}


def check_keywords(handle: Handle, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Layout:
    """The layout of the batch. Raises ValueError or NotImplementedError naming the keyword.

    What depends on a rank's own tokens is agreed on, so that all sequence ranks raise or none; the rest is without
    communication.
    """
    for name, reason in REFUSED.items():
        value = kwargs.get(name)
        if value is not None and value is not False:
            raise NotImplementedError(f"{name} is not supported: {reason}")
    layout = kwargs.get("cu_seq_lens_q")
    if not isinstance(layout, Layout):
        raise ValueError(
            f"the model needs a batch from shard_batch (or the keywords of attention_kwargs(layout)), got "
            f"cu_seq_lens_q={_shown(layout)}; {GENERATION}"
        )
    if not layout.is_on(handle.mesh):
        raise ValueError(f"the batch was sharded on {layout.mesh}, the model is parallelized on {handle.mesh}")
    if kwargs.get("attention_mask") is not None:
        raise ValueError(
            f"attention_mask must be None, got {_shown(kwargs['attention_mask'])}: give padding and packing as "
            "documents, through shard_batch"
        )
    if kwargs.get("use_cache", getattr(handle.model.config.get_text_config(), "use_cache", False)):
        raise ValueError(f"use_cache must be False (shard_batch passes it): {GENERATION}")
    _check_tokens(layout, args, kwargs)
    if kwargs.get("labels") is not None and (
        kwargs.get("shift_labels") is None or kwargs.get("num_items_in_batch") is None
    ):
        raise ValueError(
            "labels need shift_labels (a target may be on another rank) and num_items_in_batch (the targets of the "
            "global batch): both come from shard_batch"
        )
    keep = kwargs.get("logits_to_keep")
    if keep is not None and (isinstance(keep, Tensor) or keep != 0):
        raise ValueError(f"logits_to_keep must be 0, got {_shown(keep)}: the last tokens of a rank are not the last")
    check_embeddings(handle.needs, handle.mesh, layout, kwargs)
    _check_lengths(handle, layout, kwargs["position_ids"])
    return layout


def _check_tokens(layout: Layout, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises ValueError unless ids, targets and positions are one row of this rank's tokens."""
    tokens = layout.tokens()
    inputs = {"input_ids": args[0]} if args else {}
    _check_virtual(tokens, kwargs)
    for name in ("input_ids", "inputs_embeds", "shift_labels"):
        x = inputs.get(name, kwargs.get(name))
        if isinstance(x, Tensor) and tuple(x.shape[:2]) != (1, tokens):
            raise ValueError(
                f"{name} must hold this rank's {tokens} tokens in one row, a batch size of 1, got {tuple(x.shape)}: "
                "take it from shard_batch"
            )
    positions = kwargs.get("position_ids")
    if not isinstance(positions, Tensor):
        raise ValueError("position_ids are missing: without them a model counts a rank's tokens from 0")
    if positions.dim() not in (2, 3) or tuple(positions.shape[-2:]) != (1, tokens):
        raise ValueError(
            f"position_ids must be (1, {tokens}), or (axes, 1, {tokens}) for M-RoPE, got {tuple(positions.shape)}"
        )


def _check_virtual(tokens: int, kwargs: dict[str, Any]) -> None:
    """PEFT's tuners of prompts change no model: they are told by tokens in front of the batch, without position_ids."""
    embeddings = kwargs.get("inputs_embeds")
    if kwargs.get("position_ids") is not None or not isinstance(embeddings, Tensor) or embeddings.dim() != 3:
        return
    if (virtual := embeddings.shape[1] - tokens) > 0:
        raise NotImplementedError(
            f"inputs_embeds have {virtual} tokens more than the batch, and no position_ids, as PEFT's prompt tuning "
            "makes them (PROMPT_TUNING, P_TUNING, CPT, ...): virtual tokens before the sequence would stand before "
            "every rank's part of it, which is not supported"
        )


def _check_lengths(handle: Handle, layout: Layout, positions: Tensor) -> None:
    """Raises NotImplementedError, on all sequence ranks or none, if a document is longer than the model's limits."""
    if not handle.limits:  # reading the positions waits for the device and for the other ranks
        return
    last = positions.max().to(torch.int64) if positions.numel() else positions.new_tensor(-1, dtype=torch.int64)
    last = last.reshape(1).to(handle.mesh.device)
    dist.all_reduce(last, dist.ReduceOp.MAX, group=handle.mesh.sequence_group)
    # Padding is one more document to whoever counts positions, and a tree as long as its longest path.
    longest = max([int(last) + 1, *(first + stop - start for start, stop, first in layout.docs.position_runs)])
    for limit in handle.limits:
        seen = max([longest, *(layout.tokens(rank) for rank in range(layout.mesh.sequence_size))])
        if (seen if limit.local else longest) > limit.longest:
            raise NotImplementedError(
                f"{limit.name} changes with the length that one call sees, which differs between ranks and documents: "
                f"exact up to {limit.longest} tokens, got {seen if limit.local else longest}"
            )


def _shown(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)

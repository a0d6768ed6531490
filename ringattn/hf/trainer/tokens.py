"""How many tokens a batch of a whole sequence holds."""

from collections.abc import Mapping
from typing import Any

from ringattn.hf.metadata import SEGMENTS, documents_of
from ringattn.hf.trainer.agreement import Idle


def count_tokens(batch: Mapping[str, Any], kind: str | bool, processing_class: Any = None) -> int:
    """Tokens of a batch, once; none in an idle one.

    Arguments:
        kind: "non_padding" leaves out what a mask or segment ids call padding, or, without them, padding tokens of
            the processing class; anything else counts all.
    """
    ids = batch.get("input_ids", batch.get("inputs_embeds"))
    if isinstance(batch, Idle) or ids is None:
        return 0
    size = ids.shape[:2].numel() if ids.dim() > 1 else len(ids)
    if kind != "non_padding":
        return size
    if any(batch.get(name) is not None for name in ("attention_mask", *SEGMENTS)):
        rows, columns = ids.shape[:2] if ids.dim() > 1 else (1, size)
        return sum(documents_of(batch, rows, columns).lengths)
    padding = getattr(processing_class, "pad_token_id", None)
    if padding is None or "input_ids" not in batch:
        return size
    return int((ids != padding).sum())

"""Documents from what a batch says about them: cumulative lengths, segment ids, masks, positions, or nothing.

B rows of S tokens. Rows are laid end to end and never join. All sources that a batch has must agree.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ringattn.documents import Documents
from ringattn.integers import integers

SEGMENTS = ("segment_ids", "seq_idx")
CUMULATIVE = ("cu_seq_lens_q", "cu_seq_lens_k")
LONGEST = ("max_length_q", "max_length_k")
METADATA = (*SEGMENTS, *CUMULATIVE, *LONGEST, "attention_mask")


def documents_of(batch: Mapping[str, Any], rows: int, size: int) -> Documents:
    """The documents of a global batch of `rows` × `size` tokens, from its metadata.

    In this order: cu_seq_lens_q, segment_ids (or seq_idx; negative is padding, 0 is a document), position_ids with the
    attention_mask, the attention_mask, position_ids, and without any of them one document for each row.
    Raises ValueError if a source is malformed or two of them disagree.
    """
    found = _told_by(batch, rows, size) or _guessed(batch, rows, size)
    name, docs = next(iter(found.items()), ("", Documents([size] * rows)))
    for other, claimed in found.items():
        if _spans(claimed) != _spans(docs):
            raise ValueError(f"{other} and {name} disagree: {_told(claimed)} against {_told(docs)}")
    check_metadata(batch, docs, rows, size)
    positions = batch.get("position_ids")
    if isinstance(positions, Tensor) and positions.dim() <= 2 and positions.numel() == docs.total:
        flat = positions.reshape(-1)
        firsts = {int(flat[start]) for start, _ in _spans(docs)}
        if len(firsts) > 1:
            raise ValueError(
                f"position_ids begin with {sorted(firsts)} in documents that {name} tells: they disagree about where "
                "documents begin, or need docs given explicitly"
            )
    return docs


def check_metadata(batch: Mapping[str, Any], docs: Documents, rows: int, size: int) -> None:
    """Raises ValueError if the metadata of a batch contradicts its documents."""
    for name, claimed in _told_by(batch, rows, size).items():
        if _spans(claimed) != _spans(docs):
            raise ValueError(f"{name} and the documents disagree: {_told(claimed)} against {_told(docs)}")
    if (mask := batch.get("attention_mask")) is not None:
        tokens = torch.ones(docs.total, dtype=torch.bool, device="cpu")
        for start, stop in docs.padding:
            tokens[start:stop] = False
        if not torch.equal(_mask(mask, rows, size).flatten(), tokens):
            raise ValueError("attention_mask and the documents disagree about which tokens are padding")
    longest = max(docs.lengths, default=0)
    for name in LONGEST:
        if batch.get(name) is not None and int(batch[name]) < longest:
            raise ValueError(f"{name} must be at least {longest}, the longest document, got {int(batch[name])}")
    positions = batch.get("position_ids")
    if isinstance(positions, Tensor) and positions.dim() <= 2:
        _check_positions(positions.reshape(-1), docs)


def _told_by(batch: Mapping[str, Any], rows: int, size: int) -> dict[str, Documents]:
    """What each source that names documents says, the first to be believed first."""
    found = {}
    for name in CUMULATIVE:
        if batch.get(name) is not None:
            found[name] = _cumulative(name, batch[name], rows * size)
    for name in SEGMENTS:
        if batch.get(name) is not None:
            found[name] = Documents.from_segment_ids(_segments(name, batch[name], rows, size))
    return found


def _segments(name: str, values: Any, rows: int, size: int) -> Tensor:
    """Ids of (B, S) tokens. Raises ValueError for 0 after other ids, which in other libraries is padding."""
    ids = _rows(name, values, rows, size)
    falls = (ids[:, 1:] == 0) & (ids[:, :-1] > 0)
    if bool(falls.any()):
        row, token = (int(x) for x in falls.nonzero()[0])
        raise ValueError(
            f"{name} must be negative in padding, got 0 after {int(ids[row, token])} at token {token + 1} of row {row}"
            f": 0 is a document like any other here. Where it stands for padding give {name} - 1"
        )
    return ids


def _guessed(batch: Mapping[str, Any], rows: int, size: int) -> dict[str, Documents]:
    """What positions and mask say together, where nothing names documents."""
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    if isinstance(positions, Tensor) and positions.dim() <= 2:
        keep = torch.ones(rows, size, dtype=torch.bool, device="cpu") if mask is None else _mask(mask, rows, size)
        return {"position_ids": _by_positions(_rows("position_ids", positions, rows, size), keep)}
    if mask is not None:
        return {"attention_mask": Documents.from_padding_mask(_mask(mask, rows, size))}
    if positions is not None:
        raise ValueError(
            f"position_ids of shape {tuple(positions.shape)} do not tell where documents begin: give docs, "
            "cu_seq_lens_q, segment_ids or attention_mask"
        )
    return {}


def _cumulative(name: str, values: Any, total: int) -> Documents:
    numbers = integers(values, name)
    if not numbers or numbers[0] != 0 or numbers[-1] != total:
        raise ValueError(
            f"{name} must start with 0 and end with the {total} tokens of the global batch, got {list(numbers[:1])} to "
            f"{list(numbers[-1:])}: it counts the whole stream, not a rank's part, and padding at the end as documents"
        )
    return Documents.from_cu_seqlens(numbers)


def _mask(mask: Any, rows: int, size: int) -> Tensor:
    if isinstance(mask, Tensor) and mask.dim() == 4:
        raise ValueError(
            f"attention_mask must be (B, S) with 1 for tokens and 0 for padding, got a 4-D mask {tuple(mask.shape)}: "
            "who attends to whom is said by documents and by the model's layers"
        )
    mask = _rows("attention_mask", mask, rows, size)
    if bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError(
            f"attention_mask must hold 0 and 1 only, got values up to {int(mask.max())}: give packed documents as "
            "segment_ids (negative is padding)"
        )
    return mask.to("cpu", torch.bool)


def _rows(name: str, values: Any, rows: int, size: int) -> Tensor:
    try:
        x = torch.as_tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be integers of shape ({rows}, {size}): {error}") from None
    if tuple(x.shape) not in ((rows, size), (1, size), (size,)) or x.numel() not in (rows * size, size):
        raise ValueError(f"{name} must have shape ({rows}, {size}), got {tuple(x.shape)}")
    if x.numel() != rows * size:
        if name != "position_ids":
            raise ValueError(f"{name} must have shape ({rows}, {size}), got {tuple(x.shape)}")
        x = x.reshape(1, size).expand(rows, size)
    if x.is_floating_point() or x.is_complex():
        raise ValueError(f"{name} must be integers, got {x.dtype}")
    return x.reshape(rows, size)


def _by_positions(positions: Tensor, keep: Tensor) -> Documents:
    """Documents of rows whose kept tokens count up from one first position, and again from it in every document."""
    starts: list[int] = []
    lengths: list[int] = []
    size = positions.shape[1]
    for row, (values, kept) in enumerate(zip(positions, keep, strict=True)):
        tokens = kept.nonzero().flatten().tolist()
        if not tokens:
            continue
        if tokens[-1] - tokens[0] + 1 != len(tokens):
            raise ValueError(f"attention_mask row {row} has padding between its tokens: give segment_ids")
        docs = Documents.from_position_ids(values[tokens[0] : tokens[-1] + 1])
        starts += [row * size + tokens[0] + start for start in docs.starts]
        lengths += docs.lengths
    return Documents(lengths, starts, positions.numel())


def _check_positions(positions: Tensor, docs: Documents) -> None:
    """Positions count by ones in every document, and of a tree in every branch, whatever they start with."""
    if positions.numel() != docs.total:
        return  # one row for all, checked as such
    steps = torch.diff(positions.to("cpu"))
    inside = torch.zeros(max(docs.total - 1, 0), dtype=torch.bool, device="cpu")
    spans = _spans(docs)
    if docs.segments:
        spans = [(branch.start, branch.stop - branch.start) for branch in docs.branches]
    for start, length in spans:
        inside[start : start + length - 1] = True
    wrong = (inside & (steps != 1)).nonzero().flatten()
    if len(wrong):
        at = int(wrong[0])
        raise ValueError(
            f"position_ids must count by ones inside a document, got {int(positions[at])} then "
            f"{int(positions[at + 1])} at token {at + 1}: they must be those of the whole stream, in its order"
        )


def _spans(docs: Documents) -> list[tuple[int, int]]:
    return [(start, size) for start, size in zip(docs.starts, docs.lengths, strict=True) if size]


def _told(docs: Documents) -> str:
    lengths = [size for _, size in _spans(docs)]
    return f"documents of {', '.join(str(size) for size in lengths[:8])}{', ...' if len(lengths) > 8 else ''} tokens"

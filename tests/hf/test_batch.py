"""Batches in every form: documents are read exactly or refused, and every token goes to one rank."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ringattn import Documents, MeshShape
from ringattn.hf import IGNORE_INDEX, shard_batch, shifted_labels
from ringattn.hf.batch import count_targets
from ringattn.hf.metadata import documents_of

ONE = MeshShape()
X = IGNORE_INDEX

# Position ids that mislead transformers' detectors. Lengths, or words of the error.
POSITIONS: dict[str, tuple[Any, tuple[int, ...] | str]] = {
    "whole": ([0, 1, 2, 3, 4, 0, 1, 2, 3], (5, 4)),
    "contiguous shard": ([8, 9, 10, 11], "must start with first = 0"),
    "shard from inside": ([3, 4, 0, 1, 2, 3], "must start with first = 0"),
    "no zero in shard": ([3, 4, 5, 1, 2, 3], "must start with first = 0"),
    "zigzag": ([0, 1, 6, 7], "count by ones"),
    "zero tail": ([0, 1, 2, 0, 1, 0, 0, 0], (3, 2, 1, 1, 1)),
    "tail of ones": ([0, 1, 2, 0, 1, 1, 1, 1], "count by ones"),
    "left pad": ([1, 1, 1, 0, 1, 2], "must start with first = 0"),
    "step of 2": ([0, 2, 4, 6], "count by ones"),
    "starts at 2": ([2, 3, 4, 2, 3], "must start with first = 0"),
    "M-RoPE": ([[[0, 1, 2, 3, 4, 5]]] * 3, "do not tell where documents begin"),
}
# The same with what makes them clear: a mask, or documents.
CLEAR: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "zero tail": ({"attention_mask": [[1, 1, 1, 1, 1, 0, 0, 0]]}, (3, 2)),
    "tail of ones": ({"attention_mask": [[1, 1, 1, 1, 1, 0, 0, 0]]}, (3, 2)),
    "left pad": ({"attention_mask": [[0, 0, 0, 1, 1, 1]]}, (3,)),
    "starts at 2": ({"cu_seq_lens_q": [0, 3, 5]}, (3, 2)),
    "M-RoPE": ({"segment_ids": [[0, 0, 1, 1, 1, 1]]}, (2, 4)),
}


def batch_of(positions: Any, **more: Any) -> dict[str, Any]:
    tensor = torch.tensor(positions)
    tensor = tensor if tensor.dim() == 3 else tensor[None]
    ids = torch.arange(tensor.shape[-1])[None]
    return {"input_ids": ids, "position_ids": tensor} | {name: torch.tensor(x) for name, x in more.items()}


@pytest.mark.parametrize("name", POSITIONS)
def test_position_ids_that_mislead_are_read_right_or_refused(name: str) -> None:
    positions, expected = POSITIONS[name]
    batch = batch_of(positions)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            shard_batch(batch, None, ONE)
    else:
        assert shard_batch(batch, None, ONE)["cu_seq_lens_q"].docs.lengths == expected


@pytest.mark.parametrize("name", CLEAR)
def test_position_ids_beside_other_metadata(name: str) -> None:
    metadata, expected = CLEAR[name]
    local = shard_batch(batch_of(POSITIONS[name][0], **metadata), None, ONE)
    assert local["cu_seq_lens_q"].docs.lengths == expected
    whole = local["cu_seq_lens_q"].unshard(local["position_ids"], dim=-1)
    assert torch.equal(whole, batch_of(POSITIONS[name][0])["position_ids"])


@pytest.mark.parametrize("name", ["contiguous shard", "shard from inside", "no zero in shard", "zigzag", "step of 2"])
def test_sharded_positions_contradict_documents(name: str) -> None:
    """Given as positions of the whole stream: in one document they would have to count by ones."""
    batch = batch_of(POSITIONS[name][0])
    if name == "contiguous shard":  # a document may be the later part of another one
        assert shard_batch(batch, Documents([4]), ONE)["position_ids"].tolist() == [[8, 9, 10, 11]]
        return
    with pytest.raises(ValueError, match="count by ones inside a document"):
        shard_batch(batch, Documents([batch["input_ids"].numel()]), ONE)


IDS = torch.arange(12).view(2, 6)
MALFORMED: dict[str, tuple[dict[str, Any], str]] = {
    "no tokens": ({"labels": IDS}, "either input_ids or inputs_embeds"),
    "both": ({"input_ids": IDS, "inputs_embeds": torch.zeros(2, 6, 4)}, "either input_ids or inputs_embeds"),
    "three dims": ({"input_ids": IDS[None]}, r"\(B, S\)"),
    "labels": ({"input_ids": IDS, "labels": IDS[:, :5]}, r"labels must have a row for each token, \(2, 6, ...\)"),
    "unknown": ({"input_ids": IDS, "image_sizes": torch.zeros(3, 3)}, "image_sizes must have a row for each token"),
    "no tensor": ({"input_ids": IDS, "foo": 3}, "foo must have a row for each token"),
    "4-D mask": ({"input_ids": IDS, "attention_mask": torch.ones(2, 1, 6, 6)}, "got a 4-D mask"),
    "mask of segments": ({"input_ids": IDS, "attention_mask": IDS}, "0 and 1 only, got values up to 11.*segment_ids"),
    "mask with a hole": (
        {"input_ids": IDS, "attention_mask": torch.tensor([[1, 1, 0, 0, 1, 1], [1] * 6])},
        "attention_mask row 0 has 2 runs",
    ),
    "mask too short": ({"input_ids": IDS, "attention_mask": torch.ones(2, 5)}, r"shape \(2, 6\), got \(2, 5\)"),
    "local cu_seqlens": ({"input_ids": IDS, "cu_seq_lens_q": [0, 6]}, "counts the whole stream"),
    "cu_seqlens from 1": ({"input_ids": IDS, "cu_seq_lens_q": [1, 12]}, "must start with 0"),
    "cu_seqlens decrease": ({"input_ids": IDS, "cu_seq_lens_q": [0, 8, 6, 12]}, "must not decrease"),
    "cu_seqlens off by one": ({"input_ids": IDS, "cu_seq_lens_q": [0, 6, 13]}, "end with the 12 tokens"),
    "q and k": ({"input_ids": IDS, "cu_seq_lens_q": [0, 6, 12], "cu_seq_lens_k": [0, 5, 12]}, "cu_seq_lens_k and"),
    "longest": ({"input_ids": IDS, "cu_seq_lens_q": [0, 9, 12], "max_length_q": 8}, "max_length_q must be at least 9"),
    "mask and cu_seqlens": (
        {"input_ids": IDS, "cu_seq_lens_q": [0, 6, 12], "attention_mask": torch.tensor([[1] * 6, [1, 1, 0, 0, 0, 0]])},
        "attention_mask and the documents disagree",
    ),
    "segments and cu_seqlens": (
        {"input_ids": IDS, "cu_seq_lens_q": [0, 6, 12], "segment_ids": [[0] * 6, [1, 1, 1, 2, 2, 2]]},
        "segment_ids and cu_seq_lens_q disagree",
    ),
    "segments come back": ({"input_ids": IDS, "segment_ids": [[0] * 6, [1, 1, 2, 2, 1, 1]]}, "comes back at token 4"),
    "zero as padding": (
        {"input_ids": IDS, "segment_ids": [[1, 1, 1, 2, 2, 0], [1] * 6]},
        "segment_ids must be negative in padding, got 0 after 2 at token 5 of row 0",
    ),
    "target in padding": (
        {"input_ids": IDS, "shift_labels": IDS, "segment_ids": [[0, 0, 0, -1, -1, -1], [1] * 6]},
        "shift_labels must be -100 in padding, got a target in tokens 3 to 6",
    ),
    "shift_labels": ({"input_ids": IDS, "shift_labels": IDS[:, :5]}, "shift_labels must have a row for each token"),
    "positions and cu_seqlens": (
        {"input_ids": IDS, "cu_seq_lens_q": [0, 6, 9, 12], "position_ids": torch.arange(6).repeat(2, 1)},
        "disagree about where documents begin",
    ),
    "positions too many": ({"input_ids": IDS, "position_ids": torch.arange(12)[None]}, "position_ids must have shape"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_batches_are_errors(name: str) -> None:
    batch, words = MALFORMED[name]
    with pytest.raises(ValueError, match=words):
        shard_batch(batch, None, ONE)


def test_documents_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="docs must have the 12 tokens"):
        shard_batch({"input_ids": IDS}, Documents([5]), ONE)
    with pytest.raises(ValueError, match="segment_ids and the documents disagree"):
        shard_batch({"input_ids": IDS, "segment_ids": [[0] * 6, [1] * 6]}, Documents([12]), ONE)


def test_rows_without_metadata_are_documents() -> None:
    assert documents_of({}, 2, 6).lengths == (6, 6)


def test_flattening_collator_is_accepted_unchanged() -> None:
    transformers = pytest.importorskip("transformers")
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    features = [{"input_ids": list(range(n)), "labels": list(range(n))} for n in (5, 1, 3)]
    local = shard_batch(collate(features), None, ONE)
    assert local["cu_seq_lens_q"].docs.lengths == (5, 1, 3)
    assert local["shift_labels"].tolist() == [[1, 2, 3, 4, X, X, 1, 2, X]]
    assert local["num_items_in_batch"] == count_targets(collate(features)) == 6


@given(
    rows=st.integers(1, 3),
    ring=st.integers(1, 3),
    ulysses=st.integers(1, 2),
    seed=st.integers(0, 99),
    cut=st.booleans(),
)
def test_every_token_goes_to_one_rank(rows: int, ring: int, ulysses: int, seed: int, cut: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    size = int(torch.randint(1, 40, (), generator=generator))
    ids = torch.arange(rows * size).view(rows, size)
    segments = torch.randint(0, 2, (rows, size), generator=generator).cumsum(1) if cut else torch.zeros_like(ids)
    batch = {
        "input_ids": ids,
        "labels": ids,
        "segment_ids": segments,
        "inputs_embeds": None,
        "position_ids": torch.stack([ids, ids + 1000, ids + 2000]),  # M-RoPE
        "weights": ids.float()[..., None].expand(rows, size, 2),
    }
    docs = documents_of({"segment_ids": segments}, rows, size)
    seen = []
    for rank in range(ring * ulysses):
        local = shard_batch(batch, None, MeshShape(1, ring, ulysses, rank), policy="zigzag")
        mine = local["input_ids"][0]
        seen.append(mine)
        assert local["position_ids"].shape == (3, 1, len(mine))
        assert torch.equal(local["position_ids"][:, 0], torch.stack([mine, mine + 1000, mine + 2000]))
        assert torch.equal(local["weights"][0, :, 1], mine.float())
        assert torch.equal(local["labels"][0], mine)
        assert torch.equal(local["shift_labels"][0], shifted_labels(ids.flatten(), docs)[mine])
        assert local["num_items_in_batch"] == rows * size - len([size for size in docs.lengths if size])
    assert torch.equal(torch.cat(seen).sort().values, ids.flatten())


@pytest.mark.parametrize("beside_labels", [False, True])
def test_shift_labels_win_over_labels(beside_labels: bool) -> None:
    """As in transformers: they are targets already, also across what `labels` would have said."""
    targets = torch.tensor([[5, X, 7, 8, X, X], [X, 1, 2, 3, 4, 5]])
    batch = {"input_ids": IDS, "shift_labels": targets} | ({"labels": IDS} if beside_labels else {})
    seen = []
    for rank in range(2):
        local = shard_batch(batch, None, MeshShape(1, 2, 1, rank), policy="zigzag")
        assert torch.equal(local["shift_labels"][0], targets.flatten()[local["input_ids"][0]])
        assert local["labels"].shape == local["shift_labels"].shape  # models compute no loss without
        assert local["num_items_in_batch"] == 8
        seen.append(local["input_ids"][0])
    assert torch.equal(torch.cat(seen).sort().values, IDS.flatten())
    assert count_targets(batch) == 8
    with pytest.raises(ValueError, match="must hold labels or shift_labels"):
        count_targets({"input_ids": IDS})


def test_shifted_labels_stay_in_their_document() -> None:
    docs = Documents([3, 0, 2, 1], starts=[1, 4, 5, 7], total=9)
    targets = shifted_labels(torch.arange(9), docs)
    assert targets.tolist() == [X, 2, 3, X, X, 6, X, X, X]

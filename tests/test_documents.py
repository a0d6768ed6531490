"""Documents: every constructor against brute force over the tokens, and every refusal by its words."""

import pickle
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ringattn.documents import Documents
from ringattn.mask import Mask

LENGTHS = st.lists(st.integers(0, 9), max_size=8)
GAPS = st.lists(st.integers(0, 4), min_size=9, max_size=9)


def token_ids(documents: Documents) -> list[int]:
    """Brute force: the document of each token, -1 for padding."""
    ids = [-1] * documents.total
    for index, (start, length) in enumerate(zip(documents.starts, documents.lengths, strict=True)):
        for token in range(start, start + length):
            assert ids[token] == -1
            ids[token] = index
    return ids


def spread(lengths: list[int], gaps: list[int]) -> Documents:
    """Documents with gaps[i] padding tokens before document i, and one more gap at the end."""
    starts, end = [], 0
    for length, gap in zip(lengths, gaps, strict=False):
        starts.append(end + gap)
        end += gap + length
    return Documents(lengths, starts, end + gaps[len(lengths)])


@given(LENGTHS)
def test_documents_lie_end_to_end(lengths: list[int]) -> None:
    documents = Documents(lengths)
    assert documents.lengths == tuple(lengths)
    assert documents.total == sum(lengths)
    assert len(documents) == len(lengths)
    assert documents.cu_seqlens[0] == 0
    assert [b - a for a, b in pairwise(documents.cu_seqlens)] == lengths
    assert documents.starts == documents.cu_seqlens[:-1]
    assert documents.padding == ()
    assert -1 not in token_ids(documents)
    values = [*documents.lengths, *documents.starts, *documents.cu_seqlens, documents.total]
    assert all(type(value) is int for value in values)


@given(LENGTHS, st.integers(0, 5))
def test_cu_seqlens_round_trip(lengths: list[int], tail: int) -> None:
    documents = Documents(lengths, total=sum(lengths) + tail)
    assert Documents.from_cu_seqlens(documents.cu_seqlens, documents.total) == documents
    assert (
        Documents.from_cu_seqlens(torch.tensor(documents.cu_seqlens, dtype=torch.int32), documents.total) == documents
    )
    assert Documents.from_cu_seqlens(np.array(documents.cu_seqlens), documents.total) == documents
    assert Documents(documents.lengths, documents.starts, documents.total) == documents
    assert documents.padding == (((sum(lengths), sum(lengths) + tail),) if tail else ())


@given(LENGTHS, GAPS)
def test_padding_is_what_no_document_holds(lengths: list[int], gaps: list[int]) -> None:
    documents = spread(lengths, gaps)
    padded = [token for start, stop in documents.padding for token in range(start, stop)]
    assert padded == [token for token, document in enumerate(token_ids(documents)) if document < 0]
    assert all(start < stop for start, stop in documents.padding)


@given(LENGTHS, GAPS)
def test_segment_ids_round_trip(lengths: list[int], gaps: list[int]) -> None:
    documents = spread(lengths, gaps)
    rebuilt = Documents.from_segment_ids(token_ids(documents))
    kept = [(start, length) for start, length in zip(documents.starts, documents.lengths, strict=True) if length]
    assert list(zip(rebuilt.starts, rebuilt.lengths, strict=True)) == kept  # empty documents leave no trace in ids
    assert rebuilt.total == documents.total
    assert torch.equal(rebuilt.dense(), documents.dense())


@given(st.integers(1, 3).flatmap(lambda width: st.lists(st.lists(st.integers(-1, 1), min_size=width, max_size=width))))
def test_segment_rows_never_join(rows: list[list[int]]) -> None:
    if any(row == [0, 1, 0] or row == [1, 0, 1] or row in ([0, -1, 0], [1, -1, 1]) for row in rows):
        return  # refused: see below
    documents = Documents.from_segment_ids(rows)
    flat = [(index, value) for index, row in enumerate(rows) for value in row]
    expected = [[a == b and a[1] >= 0 for b in flat] for a in flat]
    assert documents.dense().tolist() == expected


@given(LENGTHS.filter(lambda lengths: 0 not in lengths), st.integers(0, 3))
def test_position_ids_round_trip(lengths: list[int], first: int) -> None:
    positions = [first + position for length in lengths for position in range(length)]
    assert Documents.from_position_ids(positions, first) == Documents(lengths)
    if lengths:
        assert Documents.from_position_ids(torch.tensor([positions]), first) == Documents(lengths)


@given(LENGTHS.filter(lambda lengths: 0 not in lengths and len(lengths) > 0), st.data())
def test_position_ids_of_a_shard_are_refused_unless_it_starts_a_document(
    lengths: list[int], data: st.DataObject
) -> None:
    positions = [position for length in lengths for position in range(length)]
    start = data.draw(st.integers(0, len(positions) - 1))
    if positions[start] == 0:
        assert Documents.from_position_ids(positions[start:]).total == len(positions) - start
    else:
        with pytest.raises(ValueError, match="position_ids must start with first = 0"):
            Documents.from_position_ids(positions[start:])


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ([0, 1, 2, 3, 4, 0, 1, 2, 3], (5, 4)),
        ([8, 9, 10, 11], r"start with first = 0, got \[8, 9, 10, 11\]; give first=8 if"),
        ([3, 4, 0, 1, 2, 3], r"start with first = 0, got \[3, 4, 0, 1, 2, 3\]"),
        ([3, 4, 5, 1, 2, 3], r"start with first = 0, got \[3, 4, 5, 1, 2, 3\]"),
        ([0, 1, 6, 7], "restart at 0 in every document, got 1 then 6 at token 2"),
        ([0, 1, 2, 0, 1, 0, 0, 0], (3, 2, 1, 1, 1)),  # documents of one token look just like this
        ([0, 1, 2, 0, 1, 1, 1, 1], "got 1 then 1 at token 5"),
        ([1, 1, 1, 0, 1, 2], r"start with first = 0, got \[1, 1, 1, 0, 1, 2\]"),
        ([0, 2, 4, 6], "got 0 then 2 at token 1"),
        ([2, 3, 4, 2, 3], "give first=2 if every document counts from there"),
        ([[[0, 1, 2]], [[0, 1, 2]], [[0, 1, 2]]], r"shape \(T,\) or \(B, T\), got \(3, 1, 3\) of torch.int64"),
        ([[0, 1], [0, 1]], "one packed stream, shape .* got 2 rows"),
        ([], ()),
    ],
)
def test_position_ids_that_mislead_detectors(positions: list[int], expected: tuple[int, ...] | str) -> None:
    if isinstance(expected, tuple):
        assert Documents.from_position_ids(positions).lengths == expected
    else:
        with pytest.raises(ValueError, match=f"^position_ids must .*{expected}"):
            Documents.from_position_ids(positions)


def test_position_ids_that_count_from_two() -> None:
    assert Documents.from_position_ids([2, 3, 4, 2, 3], first=2).lengths == (3, 2)
    with pytest.raises(ValueError, match=r"start with first = 2, got \[0, 1\]"):
        Documents.from_position_ids([0, 1], first=2)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=4))
def test_padding_masks_are_read_row_by_row(parts: list[tuple[int, int, int]]) -> None:
    width = max(sum(part) for part in parts)
    rows = [[0] * left + [1] * tokens + [0] * (width - left - tokens) for left, tokens, _ in parts]
    documents = Documents.from_padding_mask(torch.tensor(rows, dtype=torch.int64).view(len(rows), width))
    assert documents.lengths == tuple(tokens for _, tokens, _ in parts)
    assert documents.total == width * len(parts)
    assert [int(document >= 0) for document in token_ids(documents)] == [value for row in rows for value in row]


def test_padding_mask_of_booleans() -> None:
    assert Documents.from_padding_mask(torch.tensor([[False, True], [True, True]])).lengths == (1, 2)
    assert Documents.from_padding_mask([0, 1, 1, 0]).starts == (1,)


@given(LENGTHS, GAPS, st.integers(1, 12))
def test_chunked_is_the_chunk_of_the_mask(lengths: list[int], gaps: list[int], chunk: int) -> None:
    documents = spread(lengths, gaps)
    for mask, plain in [
        (Mask(chunk=chunk), Mask()),
        (Mask(causal=False, window=(2, 1), chunk=chunk), Mask(causal=False, window=(2, 1))),
    ]:
        assert torch.equal(documents.chunked(chunk).dense(plain), documents.dense(mask))
    padded = [token for start, stop in documents.chunked(chunk).padding for token in range(start, stop)]
    assert padded == [token for token, document in enumerate(token_ids(documents)) if document < 0]
    assert max(documents.chunked(chunk).lengths, default=0) <= chunk
    assert documents.chunked(None) is documents


@given(LENGTHS, GAPS)
def test_dense_is_same_document(lengths: list[int], gaps: list[int]) -> None:
    documents = spread(lengths, gaps)
    ids = torch.tensor(token_ids(documents), dtype=torch.int64)
    same = (ids[:, None] == ids[None, :]) & (ids[:, None] >= 0)
    assert torch.equal(documents.dense(), same)
    assert torch.equal(documents.dense(Mask()), same.tril())


def test_documents_are_values() -> None:
    documents = Documents([3, 0, 2], total=7)
    assert documents == Documents(torch.tensor([3, 0, 2]), total=7)
    assert hash(documents) == hash(Documents((3, 0, 2), total=7))
    assert documents != Documents([3, 0, 2])
    assert documents.cu_seqlens == (0, 3, 3, 5)
    assert pickle.loads(pickle.dumps(documents)) == documents
    assert str(documents) == "3 documents, 7 tokens (longest 3, 2 padding)"
    assert str(Documents([])) == "0 documents, 0 tokens (longest 0)"
    with pytest.raises(AttributeError):
        documents.total = 8  # type: ignore[misc]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Documents([3, -1]), "lengths must be >= 0, got lengths[1] = -1"),
        (lambda: Documents([1.5]), "lengths must be integers, got [1.5]"),
        (lambda: Documents([True, False]), "lengths must be integers, got [True, False]"),
        (lambda: Documents(["a"]), "lengths must be a sequence of integers, got ['a']"),
        (lambda: Documents([float("inf")]), "lengths must be a sequence of integers, got [inf]"),
        (lambda: Documents([float("nan")]), "lengths must be a sequence of integers, got [nan]"),
        (lambda: Documents(5), "lengths must be a sequence of integers, got 5"),
        (lambda: Documents(None), "lengths must be a sequence of integers, got None"),
        (lambda: Documents(torch.ones(2)), "lengths must be one-dimensional integers, got (2,) of torch.float32"),
        (
            lambda: Documents(torch.ones(2, 3).int()),
            "lengths must be one-dimensional integers, got (2, 3) of torch.int32",
        ),
        (lambda: Documents([2, 2], starts=[0]), "starts must have one entry per document: 2 lengths, 1 starts"),
        (lambda: Documents([2, 2], starts=[0, 1]), "starts[1] = 1 lies before the end 2"),
        (lambda: Documents([2], starts=[-1]), "starts[0] = -1 lies before"),
        (
            lambda: Documents([2, 2], total=3),
            "total must be an integer >= 4, the end of the last document, got 3",
        ),
        (
            lambda: Documents([2], total=2.5),
            "total must be an integer >= 2, the end of the last document, got 2.5",
        ),
        (lambda: Documents.from_cu_seqlens([]), "cu_seqlens must start with 0, got []"),
        (lambda: Documents.from_cu_seqlens([1, 2]), "cu_seqlens must start with 0, got [1, 2]"),
        (lambda: Documents.from_cu_seqlens([0, 4, 3]), "cu_seqlens must not decrease, got 4 then 3 at entry 2"),
        (lambda: Documents.from_cu_seqlens([0, 4], total=3), "total must be an integer >= 4"),
        (
            lambda: Documents.from_segment_ids([0, 1, 0]),
            "segment_ids must hold each document in one run: id 0 ",
        ),
        (lambda: Documents.from_segment_ids([0, -1, 0]), "comes back at token 2 of row 0"),
        (
            lambda: Documents.from_segment_ids(torch.ones(2)),
            "segment_ids must be integers of shape (T,) or (B, T), got ",
        ),
        (lambda: Documents.from_segment_ids([[0, 1], [0]]), "segment_ids must be integers of shape (T,) or (B, T): "),
        (lambda: Documents.from_segment_ids(torch.ones(2, dtype=torch.cfloat)), "of torch.complex64"),
        (lambda: Documents.from_padding_mask([1, 2]), "attention_mask must hold 0 and 1 only, got [1, 2] in row 0"),
        (lambda: Documents.from_padding_mask([[1, 1, 1], [1, 0, 1]]), "attention_mask row 1 has 2 runs of tokens"),
        (lambda: Documents.from_padding_mask(torch.ones(1, 1, 2, 2).int()), "attention_mask must be integers of shape"),
        (
            lambda: Documents([2], [1]).cu_seqlens,
            "cu_seqlens cannot describe padding before document 0 (tokens 0 ",
        ),
        (lambda: Documents([2]).chunked(0), "chunk must be None or an integer >= 1, got 0"),
    ],
)
def test_refusals_name_the_argument_and_the_numbers(call, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()

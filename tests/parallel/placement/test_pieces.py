"""The piece table against the tokens, one by one."""

from hypothesis import given
from hypothesis import strategies as st

from ringattn import Documents, Layout, Mask, MeshShape
from ringattn.parallel.placement.pieces import PieceTable
from tests.strategies import documents, masks


@given(
    docs=documents(longest=40),
    mask=masks,
    ring=st.integers(1, 5),
    policy=st.sampled_from(["contiguous", "zigzag", "balanced"]),
)
def test_every_row_is_the_token_that_its_piece_says(docs: Documents, mask: Mask, ring: int, policy: str) -> None:
    (placement,) = Layout(docs, MeshShape(1, ring), policy, mask).parts
    table = PieceTable.of(placement, mask)
    chunks = docs.chunked(mask.chunk)
    tokens = {
        start + place: (number, place)
        for number, (start, length) in enumerate(zip(chunks.starts, chunks.lengths, strict=True))
        for place in range(length)
    }
    holders: dict[int, set[int]] = {}
    for position, ranges in enumerate(placement.positions):
        held = [tokens.get(index) for span in ranges for index in range(*span)]
        found: list[tuple[int, int] | None] = [None] * table.rows[position]
        for piece in table.pieces(position):
            for place in range(piece.first, piece.last):
                found[piece.row + place - piece.first] = (piece.document, place)
            holders.setdefault(piece.document, set()).add(position)
        assert found == held  # padding is no piece's
    assert set(holders) == {number for number, length in enumerate(chunks.lengths) if length}
    for document, positions in holders.items():
        pieces = [piece for _, piece in table.holders(document)]
        assert [place for piece in pieces for place in range(piece.first, piece.last)] == list(
            range(chunks.lengths[document])
        )
        assert table.readers(document) == sorted(positions)
        assert {position for position, _ in table.holders(document)} == positions
    for position in range(ring):
        cut = [number for number, where in sorted(holders.items()) if position in where and len(where) > 1]
        assert table.cut_documents(position) == cut

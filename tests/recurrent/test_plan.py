"""Plans of recurrences: every token in one piece, chains in document order, and transfers that all ranks agree on."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ringattn import Documents, Layout, MeshShape
from ringattn.recurrent.exchange import plan_exchange, stream_order
from ringattn.recurrent.halo_plan import plan_halo
from ringattn.recurrent.plan import RecurrencePlan, plan_recurrence
from ringattn.recurrent.price import RecurrenceShape, cheaper, prices, received
from tests.strategies import documents

MESHES = st.sampled_from([(1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (2, 2), (8, 1)])
POLICIES = st.sampled_from(["contiguous", "zigzag", "balanced"])


def plans_of(docs: Documents, mesh: tuple[int, int], policy: str) -> tuple[list[Layout], list[RecurrencePlan]]:
    layouts = [Layout(docs, MeshShape(1, *mesh, rank), policy) for rank in range(mesh[0] * mesh[1])]
    return layouts, [plan_recurrence(layout) for layout in layouts]


@given(docs=documents(), mesh=MESHES, policy=POLICIES)
def test_pieces_are_the_documents(docs: Documents, mesh: tuple[int, int], policy: str) -> None:
    layouts, plans = plans_of(docs, mesh, policy)
    seen: dict[int, list[tuple[int, int]]] = {}
    for layout, plan in zip(layouts, plans, strict=True):
        indices = layout.indices().tolist()
        assert plan.tokens == len(indices)
        for piece in (*plan.whole, *plan.cut):
            start = docs.starts[piece.document]
            assert indices[slice(*piece.rows)] == list(range(start + piece.first, start + piece.last))
            seen.setdefault(piece.document, []).append((piece.first, piece.last))
        assert all((piece.first, piece.last) == (0, docs.lengths[piece.document]) for piece in plan.whole)
        assert all(piece.size < docs.lengths[piece.document] for piece in plan.cut)
    for document, length in enumerate(docs.lengths):
        ends = [0, *(last for _, last in sorted(seen.get(document, [])))]
        assert [first for first, _ in sorted(seen.get(document, []))] == ends[:-1]
        assert ends[-1] == length


@given(docs=documents(), mesh=MESHES, policy=POLICIES)
def test_chains_are_in_document_order_on_all_ranks(docs: Documents, mesh: tuple[int, int], policy: str) -> None:
    _, plans = plans_of(docs, mesh, policy)
    assert len({(plan.chains, plan.communicates) for plan in plans}) == 1
    chained = []
    for chain in plans[0].chains:
        pieces = [plans[rank].cut[number] for rank, number in chain]
        assert len(pieces) > 1
        assert len({piece.document for piece in pieces}) == 1
        assert [piece.first for piece in pieces[1:]] == [piece.last for piece in pieces[:-1]]
        roles = [plans[piece.rank] for piece in pieces]
        assert pieces[0] in roles[0].firsts
        assert pieces[-1] in roles[-1].lasts
        assert all(piece in plan.middles for piece, plan in zip(pieces[1:-1], roles[1:-1], strict=True))
        chained += pieces
    assert sorted(map(repr, chained)) == sorted(repr(piece) for plan in plans for piece in plan.cut)
    across = any(len({rank for rank, _ in chain}) > 1 for chain in plans[0].chains)
    assert plans[0].communicates == across


@given(docs=documents(), mesh=MESHES, policy=POLICIES, width=st.sampled_from([1, 2, 4, 9]))
def test_halos_are_the_rows_before(docs: Documents, mesh: tuple[int, int], policy: str, width: int) -> None:
    layouts = [Layout(docs, MeshShape(1, *mesh, rank), policy) for rank in range(mesh[0] * mesh[1])]
    plans = [plan_halo(layout, width) for layout in layouts]
    indices = [layout.indices().tolist() for layout in layouts]
    assert len({plan.communicates for plan in plans}) == 1
    for rank, plan in enumerate(plans):
        assert plan.receives == tuple(len(other.sends[rank]) for other in plans)
        arrived = [indices[other][row] for other, sent in enumerate(plans) for row in sent.sends[rank]]
        for piece, places in zip(plan.pieces, plan.before, strict=True):
            start = docs.starts[piece.document]
            wanted = [piece.first - width + 1 + tap for tap in range(width - 1)]
            assert [arrived[place] if place >= 0 else -1 for place in places] == [
                start + position if position >= 0 else -1 for position in wanted
            ]
    across = any(len(sent) for rank, plan in enumerate(plans) for other, sent in enumerate(plan.sends) if other != rank)
    assert plans[0].communicates == across


def test_a_plan_can_be_read() -> None:
    layout = Layout(Documents([10, 2]), MeshShape(1, 2, 1, 1), "zigzag")
    text = str(plan_recurrence(layout))
    assert "1.0" in text
    assert "after 0.0" in text
    assert "width 4" in str(plan_halo(layout, 4))
    with pytest.raises(ValueError, match="width must be an integer >= 1, got 0"):
        plan_halo(layout, 0)
    with pytest.raises(ValueError, match="rounds must be an integer >= 1, got 0"):
        plan_recurrence(layout, rounds=0)


def test_prices_follow_the_documents() -> None:
    """One long document is scanned, whose states are small beside its rows; in many short ones that are all cut the
    heads are exchanged; nothing moves where nothing is cut."""
    shape = RecurrenceShape(16, 32, 128, 128, True, False)
    ranks = MeshShape(1, 8, 1, 0)
    scan, swap = prices(Layout(Documents([1 << 20]), ranks, "contiguous"), shape)
    assert scan.sent < swap.sent / 10
    assert cheaper(prices(Layout(Documents([200] * 64), ranks, "zigzag"), shape)) == "exchange"
    assert cheaper(prices(Layout(Documents([1024] * 8), ranks, "contiguous"), shape)) == "scan"
    assert prices(Layout(Documents([1024] * 8), ranks, "contiguous"), shape)[0].seconds == 0
    mamba = RecurrenceShape(1, 64, 64, 64, False, False)
    assert prices(Layout(Documents([1 << 20]), ranks, "contiguous"), mamba)[0].sent < scan.sent


def test_many_ranks_take_more_rounds_and_less_bytes() -> None:
    """What a rank receives is bounded where a gather grows with the ranks; few ranks take one round."""
    shape = RecurrenceShape(16, 32, 128, 128, True, False)

    def layout(ranks: int) -> Layout:
        return Layout(Documents([ranks * 4096]), MeshShape(1, ranks, 1, 0), "zigzag")

    found = {ranks: prices(layout(ranks), shape)[0] for ranks in (2, 8, 64, 256)}
    assert found[2].rounds == found[8].rounds == 1
    assert 1 < found[64].rounds <= found[256].rounds
    assert found[256].sent < 1.5 * found[64].sent
    assert sum(received(layout(64), shape, 1)) > 5 * sum(received(layout(64), shape, found[64].rounds))
    packed = Layout(Documents([4096] * 64), MeshShape(1, 64, 1, 0), "contiguous")
    assert (prices(packed, shape)[0].seconds, prices(packed, shape)[0].sent) == (0.0, 0.0)


@given(docs=documents(), mesh=MESHES, policy=POLICIES, rounds=st.integers(1, 5))
def test_what_is_priced_is_what_is_planned(docs: Documents, mesh: tuple[int, int], policy: str, rounds: int) -> None:
    shape = RecurrenceShape(1, 2, 3, 5, True, False)
    layout = Layout(docs, MeshShape(1, *mesh, 0), policy)
    plans = [plan_recurrence(layout, rank, rounds) for rank in range(mesh[0] * mesh[1])]
    for number, priced in enumerate(received(layout, shape, rounds)):
        most = max(
            sum(len(one.maps) * shape.map_numbers + len(one.states) * shape.state_numbers for one in part.receives)
            for part in (plan.ahead[number] for plan in plans)
        )
        assert priced == 4 * most


@given(docs=documents(), mesh=MESHES, policy=POLICIES)
def test_the_order_of_the_stream(docs: Documents, mesh: tuple[int, int], policy: str) -> None:
    layout = Layout(docs, MeshShape(1, *mesh, 0), policy)
    by_rank = torch.cat([layout.indices(rank) for rank in range(mesh[0] * mesh[1])])
    spans = zip(docs.starts, docs.lengths, strict=True)
    expected = [token for start, size in spans for token in range(start, start + size)]
    assert by_rank[stream_order(plan_exchange(layout, (1, 1)), torch.device("cpu"))].tolist() == expected

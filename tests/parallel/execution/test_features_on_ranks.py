"""What a call can ask for, over ranks: against one dense softmax over the whole stream, in float64."""

import pytest
import torch
from torch import Tensor

from ringattn import Documents, Layout, Mask, parallel_attention
from tests.dense import Case, dense_attention
from tests.parallel.ranks import attend, mesh_of
from tests.pool import Pools
from tests.small_tensors import DOCS, tensors

# ring × ulysses and a scheme for every number of ranks
MESHES = {1: (1, 1, "auto"), 2: (1, 2, "ulysses"), 4: (2, 2, "hybrid")}


def assert_exact(got: dict[str, Tensor], case: Case) -> None:
    for name, reference in dense_attention(case).items():
        torch.testing.assert_close(got[name].double(), reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("ring", "ulysses", "scheme"), [(4, 1, "gather"), (4, 1, "ring"), (2, 2, "hybrid")])
def test_a_window_longer_than_a_share_is_applied(pool: Pools, ring: int, ulysses: int, scheme: str) -> None:
    """16 tokens a rank, a window of 40, a document of 64: what one device computes, which full attention is not."""
    case = Case(Documents([64]), Mask(window=(39, 0)), (4, 2))
    expected = dense_attention(case)
    full = dense_attention(Case(Documents([64]), Mask(), (4, 2)))
    for got in pool(4).run(attend, case, ring, ulysses, "contiguous", scheme):
        for name, reference in expected.items():
            torch.testing.assert_close(got[name], reference, rtol=1e-12, atol=1e-12)
            assert not torch.allclose(got[name], full[name], atol=1e-3)


@pytest.mark.parametrize("scheme", ["ring", "gather"])
def test_a_ring_need_not_be_causal(pool: Pools, scheme: str) -> None:
    case = Case(Documents([33, 7]), Mask(causal=False), (4, 2))
    for got in pool(2).run(attend, case, 2, 1, "balanced", scheme):
        for name, reference in dense_attention(case).items():
            torch.testing.assert_close(got[name], reference, rtol=1e-12, atol=1e-12)


def dropped(ring: int, ulysses: int, scheme: str) -> Tensor:
    """(T, H, T) booleans: which probabilities are dropped, seen by values that are the rows of the identity."""
    layout = Layout(DOCS, mesh_of(ring, ulysses), "balanced")
    q, k, _ = tensors()
    v = torch.eye(20, dtype=torch.float64)[:, None, :].expand(-1, 2, -1)
    local = [layout.shard(x.contiguous()) for x in (q, k, v)]
    out = parallel_attention(*local, layout, dropout_p=0.4, dropout_seed=11, scheme=scheme)
    return layout.unshard(out) == 0


@pytest.mark.parametrize(("ring", "ulysses", "scheme"), [(4, 1, "ring"), (4, 1, "gather"), (1, 4, "ulysses")])
def test_four_ranks_drop_what_one_drops(pool: Pools, ring: int, ulysses: int, scheme: str) -> None:
    alone = pool(1).run(dropped, 1, 1, "auto")[0]
    for together in pool(4).run(dropped, ring, ulysses, scheme):
        assert torch.equal(alone, together)
    share = alone[DOCS.dense(Mask())[:, None, :].expand_as(alone)].double().mean()
    assert 0.3 < share < 0.5


SINKS = Case(Documents([33, 1, 14]), Mask(window=(20, 0)), (6, 2), sinks=True)


@pytest.mark.parametrize(
    ("ring", "ulysses", "scheme", "stages"),
    [
        (1, 1, "auto", None),
        (4, 1, "ring", 2),
        (4, 1, "ring", 4),
        (4, 1, "gather", None),
        (4, 1, "joint", None),
        (1, 4, "ulysses", None),
    ],
)
def test_a_sink_counts_once_whatever_the_stages(
    pool: Pools, ring: int, ulysses: int, scheme: str, stages: int | None
) -> None:
    """Out, lse and all gradients, that of the sinks included; under Ulysses every rank has its heads' sinks."""
    case = SINKS if stages is None else Case(**SINKS.__dict__ | {"options": {"stages": stages}})
    for got in pool(ring * ulysses).run(attend, case, ring, ulysses, "balanced", scheme):
        assert_exact(got, case)


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_a_sink_is_not_added_in_every_stage(pool: Pools, stages: int) -> None:
    case = Case(Documents([40]), heads=(4, 2), sinks=True, options={"stages": stages})
    for got in pool(4).run(attend, case, 4, 1, "contiguous", "ring"):
        for name, reference in dense_attention(case).items():
            torch.testing.assert_close(got[name], reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_fewer_key_heads_than_ranks_and_uneven_heads(pool: Pools, world: int) -> None:
    """Keys' gradients are summed over the ranks that hold copies."""
    ring, ulysses, scheme = MESHES[world]
    cases = [Case(Documents([21, 9]), heads=heads) for heads in ((4, 4), (4, 2), (4, 1), (6, 2))]
    places = [(ring, ulysses, scheme)] + ([(1, 4, "ulysses")] if world == 4 else [])
    for place in places:
        jobs = [(case, *place[:2], "balanced", place[2]) for case in cases]
        for case, results in zip(cases, pool(world).run_many(attend, jobs), strict=True):
            for got in results:
                assert_exact(got, case)


@pytest.mark.parametrize(("ring", "ulysses", "scheme"), [(2, 1, "ring"), (1, 2, "ulysses")])
def test_values_of_another_dim_are_exact(pool: Pools, ring: int, ulysses: int, scheme: str) -> None:
    case = Case(Documents([21, 9]), heads=(4, 2), dims=(24, 12), sinks=True)
    for got in pool(2).run(attend, case, ring, ulysses, "balanced", scheme):
        assert_exact(got, case)


@pytest.mark.parametrize("docs", [Documents([1]), Documents([0, 2], [0, 1], 5), Documents([])], ids=str)
@pytest.mark.parametrize(
    ("ring", "ulysses", "scheme"), [(4, 1, "ring"), (4, 1, "gather"), (1, 4, "ulysses"), (2, 2, "hybrid")]
)
def test_ranks_without_tokens_join(pool: Pools, ring: int, ulysses: int, scheme: str, docs: Documents) -> None:
    case = Case(docs, heads=(4, 2))
    for got in pool(4).run(attend, case, ring, ulysses, "balanced", scheme):
        assert_exact(got, case)


def test_the_shape_of_the_mesh_changes_nothing(pool: Pools) -> None:
    case = Case(Documents([33, 1, 14]), Mask(window=(9, 0)), (4, 2), sinks=True)
    expected = dense_attention(case)
    for ring, ulysses in ((1, 4), (2, 2), (4, 1)):
        for got in pool(4).run(attend, case, ring, ulysses, "auto", "auto"):
            for name, reference in expected.items():
                torch.testing.assert_close(got[name], reference, rtol=1e-12, atol=1e-12)

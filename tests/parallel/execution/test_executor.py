"""The whole of attention over processes against one dense computation, in float64."""

from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ringattn import Documents, Mask
from ringattn.parallel.schedules import demand
from tests.dense import Case, dense_attention
from tests.parallel.ranks import attend
from tests.pool import Pools
from tests.strategies import HEADS, MASKS, documents, masks

# ring × ulysses and the schemes that make a difference on it
MESHES = [
    (1, 1, "auto"),
    (2, 1, "gather"),
    (2, 1, "ring"),
    (1, 2, "ulysses"),
    (4, 1, "gather"),
    (4, 1, "joint"),
    (4, 1, "ring"),
    (1, 4, "ulysses"),
    (2, 2, "hybrid"),
    (2, 2, "ring"),
    (2, 2, "joint"),
]
# With every policy that makes a difference: on one ring position all of them place tokens alike.
PLACES = [
    (*mesh, policy) for mesh in MESHES for policy in ("contiguous", "zigzag", "balanced")[: None if mesh[0] > 1 else 1]
]
reuse_pool = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def assert_close(results: list[dict[str, torch.Tensor]], case: Case, tolerance: float = 1e-12) -> None:
    """What every rank found, against one dense computation, which takes longer than most of theirs."""
    expected = dense_attention(case)
    if not case.options.get("return_lse", True):
        del expected["lse"]
    for got in results:
        assert set(expected) <= set(got)
        for name, reference in expected.items():
            torch.testing.assert_close(
                got[name].double(),
                reference,
                rtol=tolerance,
                atol=tolerance,
                msg=lambda text, name=name: f"{name}: {text}",
            )


@pytest.mark.parametrize(("ring", "ulysses", "scheme", "policy"), PLACES)
@settings(reuse_pool, max_examples=2)
@given(docs=documents(), heads=st.permutations(HEADS), seed=st.integers(0, 1000))
def test_every_schedule_layout_and_mask_is_exact(
    pool: Pools, ring: int, ulysses: int, scheme: str, policy: str, docs: Documents, heads: list, seed: int
) -> None:
    cases = [Case(docs, mask, heads[index % 3], seed=seed) for index, mask in enumerate(MASKS)]
    jobs = [(case, ring, ulysses, policy, scheme) for case in cases]
    for case, results in zip(cases, pool(ring * ulysses).run_many(attend, jobs), strict=True):
        assert_close(results, case)


def attend_sharing(case: Case, policy: str) -> dict[str, torch.Tensor]:
    """With keys that two pieces of a document see once in the buffer, as if they were many."""
    with mock.patch.object(demand, "REPEATED", 0):
        return attend(case, 4, 1, policy, "gather")


@pytest.mark.parametrize("policy", ["zigzag", "balanced"])
def test_pieces_that_share_keys_are_exact(pool: Pools, policy: str) -> None:
    cases = [Case(Documents([37, 140, 1, 0, 61]), mask, HEADS[0]) for mask in MASKS]
    for case, results in zip(cases, pool(4).run_many(attend_sharing, [(case, policy) for case in cases]), strict=True):
        assert_close(results, case)


@pytest.mark.parametrize("world", [1, 2, 4])
@settings(reuse_pool, max_examples=40)
@given(data=st.data())
def test_random_combinations_are_exact(pool: Pools, world: int, data: st.DataObject) -> None:
    ring, ulysses, scheme = data.draw(st.sampled_from([mesh for mesh in MESHES if mesh[0] * mesh[1] == world]))
    options: dict[str, object] = {"keep_keys": data.draw(st.sampled_from([None, False, True]))}
    if scheme == "ring":
        options["stages"] = data.draw(st.sampled_from([None, 2, 3]))
    heads = data.draw(st.sampled_from([*HEADS, (5, 5), (7, 1), (6, 3)]))
    case = Case(
        docs=data.draw(documents()),
        mask=data.draw(masks),
        heads=heads,
        dims=data.draw(st.sampled_from([(8, 8), (8, 4), (3, 5)])),
        softcap=data.draw(st.sampled_from([0.0, 2.0])),
        sinks=data.draw(st.booleans()),
        dropout=data.draw(st.sampled_from([None, (0.3, 5)])),
        seed=data.draw(st.integers(0, 1000)),
        options=options,
    )
    policy = data.draw(st.sampled_from(["contiguous", "zigzag", "balanced"]))
    assert_close(pool(world).run(attend, case, ring, ulysses, policy, scheme), case)


@pytest.mark.parametrize(("ring", "ulysses", "scheme"), MESHES)
def test_cpu_flash_in_float32(pool: Pools, ring: int, ulysses: int, scheme: str) -> None:
    docs = Documents([150, 1, 64, 0, 333, 40])
    for mask in (Mask(), Mask(window=(40, 0)), Mask(causal=False)):
        case = Case(docs, mask, (6, 2), (32, 32), torch.float32, options={"backend": "cpu"})
        assert_close(pool(ring * ulysses).run(attend, case, ring, ulysses, "balanced", scheme), case, 2e-6)


@pytest.mark.parametrize(("ring", "ulysses", "scheme", "policy"), PLACES)
def test_unseen_keys_get_exactly_zero_gradient(pool: Pools, ring: int, ulysses: int, scheme: str, policy: str) -> None:
    docs = Documents([40, 9, 70, 25])
    mask = Mask(window=(6, 0))
    case = Case(docs, mask, (4, 2), dtype=torch.float32)
    queries = slice(49 + 30, 49 + 35)  # in the third document
    seen = docs.dense(mask)[queries].any(0)
    for got in pool(ring * ulysses).run(attend_some, case, queries, ring, ulysses, policy, scheme):
        for name in ("dk", "dv"):
            assert (got[name][~seen] == 0).all()
            assert (got[name][seen] != 0).any(-1).all()


def attend_some(case: Case, queries: slice, *where: object) -> dict[str, torch.Tensor]:
    return attend(_OnlyQueries(case, queries), *where)  # type: ignore[arg-type]


class _OnlyQueries:
    """A case whose loss depends on a few query rows only."""

    def __init__(self, case: Case, queries: slice) -> None:
        self._case, self._queries = case, queries

    def __getattr__(self, name: str) -> object:
        return getattr(self._case, name)

    def tensors(self) -> dict[str, torch.Tensor]:
        x = self._case.tensors()
        kept = torch.zeros_like(x["dout"])
        kept[self._queries] = x["dout"][self._queries]
        return x | {"dout": kept}


@pytest.mark.parametrize(("ring", "ulysses", "scheme"), MESHES)
def test_other_documents_do_not_change_by_a_bit(pool: Pools, ring: int, ulysses: int, scheme: str) -> None:
    docs = Documents([40, 9, 70, 25])
    case = Case(docs, Mask(), (4, 2), dtype=torch.float32)
    for before, after in pool(ring * ulysses).run(attend_twice, case, 60, ring, ulysses, "balanced", scheme):
        inside = slice(49, 119)
        for name in ("out", "dq", "dk", "dv"):
            outside = torch.ones(docs.total, dtype=torch.bool)
            outside[inside] = False
            assert torch.equal(before[name][outside], after[name][outside])
            assert not torch.equal(before[name][inside], after[name][inside])


def attend_twice(case: Case, token: int, *where: object) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    return attend(case, *where), attend(_Changed(case, token), *where)  # type: ignore[arg-type]


class _Changed(_OnlyQueries):
    """A case in which one token is another."""

    def __init__(self, case: Case, token: int) -> None:
        super().__init__(case, slice(0, 0))
        self._token = token

    def tensors(self) -> dict[str, torch.Tensor]:
        x = self._case.tensors()
        for name in ("q", "k", "v"):
            x[name][self._token] += 1
        return x

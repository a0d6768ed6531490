"""Four and eight ranks on however few GPUs there are, which read each other's memory: every scheme, parts and captured
steps. Ranks of one device take turns on it, so it is their order that varies here and not their speed that counts."""

import pytest
import torch

from ringattn import Documents, Layout, Mask
from ringattn.kernels.registry import explain
from ringattn.kernels.spec import CallSpec
from tests.dense import Case
from tests.parallel.execution.test_captured import errors_on_a_mesh
from tests.parallel.ranks import attend_on, free_mesh
from tests.parallel.test_gpu import assert_small, compared, errors_of
from tests.pool import Pools

DOCS = Documents([1400, 1, 129, 0, 700, 64, 100, 333], [0, 1400, 1401, 1530, 1540, 2240, 2310, 2410], 2800)
MASKS = [Mask(), Mask(window=(100, 0)), Mask(causal=False)]
MESHES = [
    (4, 1, "gather"),
    (4, 1, "ring"),
    (1, 4, "ulysses"),
    (2, 2, "hybrid"),
    (8, 1, "gather"),
    (8, 1, "joint"),
    (8, 1, "ring"),
    (1, 8, "ulysses"),
    (4, 2, "hybrid"),
    (2, 4, "hybrid"),
]
pytestmark = pytest.mark.gpu


def cases() -> list[Case]:
    """More query heads than ranks, and fewer key heads: an exchange repeats them."""
    backend = "torch" if explain(CallSpec("cuda", torch.bfloat16, 64, 64, 8, 2))["fa4"] else "fa4"
    options: dict[str, object] = {"backend": backend}
    return [Case(DOCS, mask, (8, 2), (64, 64), torch.bfloat16, options=options) for mask in MASKS]


@pytest.mark.parametrize(("ring", "ulysses", "scheme"), MESHES)
def test_bfloat16_against_float64(pool: Pools, ring: int, ulysses: int, scheme: str) -> None:
    jobs = [(case, ring, ulysses, policy, scheme, "copy") for case in cases() for policy in ("zigzag", "balanced")]
    assert_all_small(pool(ring * ulysses, "shared").run_many(errors_of, jobs, timeout=300), [case for case, *_ in jobs])


def assert_all_small(results: list[list[tuple[dict[str, float], dict[str, float]]]], tried: list[Case]) -> None:
    for case, ranks in zip(tried, results, strict=True):
        for got, single in ranks:
            assert_small(got, single, case)


def errors_of_parts(case: Case, ranks: int, degrees: tuple[int, int]) -> tuple[dict[str, float], dict[str, float]]:
    order = sorted(range(len(DOCS)), key=lambda number: -DOCS.lengths[number])
    mesh = free_mesh(ranks, "cuda", "copy")
    layout = Layout(DOCS, mesh, mask=case.mask, parts=[(degrees, order[:2]), ((ranks, 1), order[2:])])
    return compared(case, attend_on(layout, case, "auto"))


@pytest.mark.parametrize(("ranks", "degrees"), [(4, (1, 4)), (8, (1, 8)), (8, (2, 4))])
def test_parts_on_shared_devices_are_small_in_error(pool: Pools, ranks: int, degrees: tuple[int, int]) -> None:
    jobs = [(case, ranks, degrees) for case in cases()]
    assert_all_small(pool(ranks, "shared").run_many(errors_of_parts, jobs, timeout=300), [case for case, *_ in jobs])


@pytest.mark.parametrize("delayed", [False, True])
@pytest.mark.parametrize(("ring", "ulysses", "scheme"), [(8, 1, "gather"), (8, 1, "ring"), (1, 8, "ulysses")])
def test_replays_on_shared_devices_are_right(pool: Pools, ring: int, ulysses: int, scheme: str, delayed: bool) -> None:
    ranks = pool(8, "shared").run(errors_on_a_mesh, ring, ulysses, scheme, "copy", delayed, timeout=300)
    for found in ranks:
        assert max(found) <= 5e-3, found

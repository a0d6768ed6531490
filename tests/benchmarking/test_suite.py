"""The benchmark on gloo: every scheme is checked against the kernel alone, and a wrong result is no result."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from ringattn import Documents, Mask
from ringattn.benchmarking.contestants import Ours
from ringattn.benchmarking.flex_peer import visible
from ringattn.benchmarking.problem import LIMITS, Heads, Problem
from ringattn.benchmarking.report import plot, write
from ringattn.benchmarking.roster import contestants, every_name, parse, peer_names
from ringattn.benchmarking.slow import Slow
from ringattn.benchmarking.suite import CEILING, Result, measure
from ringattn.benchmarking.timing import Timer
from ringattn.benchmarking.workloads import Workload, sequences_of, workload
from tests.pool import Pools
from tests.strategies import segment_masks, segmented_documents

HEADS = Heads(4, 2, 16)
FACTS = {
    "date": "2026-01-01", "device": "CPU rank", "ranks": 2, "versions": "torch", "dtype": "float32", "heads": "4/2",
    "head_dim": 16, "kernel": "cpu", "seed": 0, "command": "torchrun recipes/benchmark.py",
}  # fmt: skip


def measured(fault: bool, names: Sequence[str] = ("packed600", "window4200")) -> list[Result]:
    makers = [
        lambda name=name: Problem.draw(workload(name, 0), HEADS, "auto", torch.device("cpu"), torch.float32, 0)
        for name in names
    ]
    entered: list[Any] = contestants(None, peers=True)
    if fault:
        entered = [Broken(entered[0].name, entered[0].mesh, entered[0].options)]
    return list(measure(makers, entered, Timer(torch.device("cpu"), calls=1, repeats=1, warmups=0)))


class Broken(Ours):
    """One wrong row of one gradient, on one rank."""

    def enter(self, problem: Problem) -> Any:
        entry = super().enter(problem)
        right = entry.both

        def both() -> list[torch.Tensor]:
            results = right()
            if dist.get_rank() == 1:
                results[2][:5] = 0
            return results

        entry.both = both
        return entry


def test_every_scheme_and_the_peer_are_right(pool: Pools, tmp_path: Path) -> None:
    for results in pool(2, "cpu").run_many(measured, [(False,)], timeout=200)[0]:
        names = [CEILING, *every_name(2), *peer_names(2)]
        assert [result.contestant for result in results] == names * 2
        ours = [result for result in results if result.contestant not in peer_names(2) or result.both]
        assert not [result.failure for result in ours if result.failure]
        assert all(result.share_both and result.rate_forward for result in ours)
        assert all(result.error < 1e-5 for result in ours if result.contestant != CEILING)
    write(tmp_path, results[:1], FACTS)  # of a run that goes on
    paths = write(tmp_path, results, FACTS)
    assert set(tmp_path.iterdir()) == set(paths)  # nothing unfinished is left
    if find_spec("matplotlib"):
        assert plot(tmp_path / "benchmark.png", results, FACTS).stat().st_size
    text = paths[0].read_text()
    assert "ulysses:1x2" in text
    assert "sum over workloads" in text


@pytest.mark.parametrize("world", [1, 2])
def test_trees_and_blocks_are_those_of_flex_attention(pool: Pools, tmp_path: Path, world: int) -> None:
    """Its mask is made token by token, and its softmax by torch."""
    names = ["tree512", "images600", "clipped1300"] + ["apart4352"] * (world == 1)
    for results in pool(world, "cpu").run_many(measured, [(False, names)], timeout=200)[0]:
        flex = [result for result in results if result.contestant == "flex"]
        assert [result.failure for result in flex[:2]] == [""] * 2
        assert all(result.error < 1e-5 for result in flex[:2])
        ours = [result for result in results if result.contestant in every_name(world)]
        assert all(result.share_both and result.error < 1e-5 for result in ours)
        bands = [one for one in results if one.contestant in peer_names(world) and one.workload in names[:2]]
        assert all(one.failure for one in bands if one.contestant != "flex")
    if world == 1:
        text = write(tmp_path, results, FACTS)[0].read_text()
        assert "| auto:1 | tree512 | apart4352 |" in text
        assert "holds all scores" in text


def measured_on_gpus(ranks: int) -> list[Result]:
    device, names = torch.device("cuda"), ["tree4096", "apart34816", "images4096", "clipped4096"]
    makers = [
        lambda name=name: Problem.draw(workload(name, 0), Heads(8, 2, 64), "auto", device, torch.bfloat16, 0)
        for name in names
    ]
    entered = contestants([*every_name(ranks), "flex"], peers=False)
    return list(measure(makers, entered, Timer(device, calls=1, repeats=1, warmups=1)))


@pytest.mark.parametrize("ranks", [pytest.param(n, marks=pytest.mark.gpu(n)) for n in (1, 2)])
def test_trees_and_blocks_on_gpus(pool: Pools, ranks: int) -> None:
    """The compiled kernel of FlexAttention on its own mask: half-precision kernels round differently, and no more."""
    for results in pool(ranks, "cuda").run(measured_on_gpus, ranks, timeout=500):
        assert not [result.failure for result in results if result.failure]
        assert all(result.error <= LIMITS[torch.bfloat16] for result in results if result.contestant != CEILING)


@settings(max_examples=60)
@given(docs=segmented_documents(), mask=segment_masks)
def test_the_mask_of_flex_attention_is_that_of_the_documents(docs: Documents, mask: Mask) -> None:
    place = torch.arange(docs.total)
    allowed = visible(docs, mask, torch.device("cpu"))(place, place, place[:, None], place[None, :])
    assert torch.equal(allowed, docs.dense(mask))


def narrow() -> list[Result]:
    cpu = torch.device("cpu")
    problem = Problem.draw(workload("dense600", 0), HEADS, "reference", cpu, torch.bfloat16, 0)
    entered = contestants(["gather:2x1", "gather:2x1+narrow"], peers=False)
    return list(measure([lambda: problem], entered, Timer(cpu, 1, 1, 0), Slow(0.1, (0,))))


def test_a_narrow_wire_shows_in_the_error_and_slow_ranks_in_their_column(pool: Pools, tmp_path: Path) -> None:
    for results in pool(2, "cpu").run(narrow):
        alone, wide, narrowed = results
        assert narrowed.contestant == "gather:2x1+narrow"
        assert 2 * wide.errors["dk"] < narrowed.errors["dk"] < LIMITS[torch.bfloat16]
        assert all(result.slowed for result in (alone, wide, narrowed))
    text = write(tmp_path, results, FACTS | {"slow": 0.1, "slow_ranks": [0]})[0].read_text()
    assert "ranks [0] taking 10% longer on purpose" in text
    assert ", ".join(f"{error:.1e}" for error in narrowed.errors.values()) in text


def test_a_wrong_result_is_not_timed(pool: Pools) -> None:
    for results in pool(2, "cpu").run_many(measured, [(True, ["packed600"])], timeout=200)[0]:
        wrong = [result for result in results if result.contestant != CEILING]
        assert all("differs from the kernel alone" in result.failure and result.both is None for result in wrong)


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(any),
    left=st.one_of(st.just(-1), st.integers(0, 50)),
)
def test_pairs_of_a_workload(lengths: list[int], left: int) -> None:
    docs, mask = Documents(lengths), Mask(window=(left, 0) if left >= 0 else (-1, -1))
    assert Workload("", docs, mask).pairs() == int(docs.dense(mask).sum())


@given(docs=segmented_documents(), mask=segment_masks)
def test_pairs_of_trees_and_blocks(docs: Documents, mask: Mask) -> None:
    assert Workload("", docs, mask).pairs() == int(docs.dense(mask).sum())


def test_a_tree_has_the_sequences_that_stand_apart() -> None:
    tree, apart = workload("tree64k", 0), workload(sequences_of("tree64k"), 0)
    prompt, *completions = tree.docs.segments
    assert {prompt.stop - prompt.start + c.stop - c.start for c in completions} == set(apart.docs.lengths) == {34816}
    assert len(completions) == len(apart.docs) == 16
    assert sequences_of("dense64k") == sequences_of("tree65") == ""


@pytest.mark.parametrize(
    "name",
    ["dense64k", "packed256k", "short256k", "hist64k", "window8k", "packed1000", "tree64k", "tree5", "apart544k",
     "images64k", "clipped1000"],
)  # fmt: skip
def test_workloads_have_their_tokens_and_are_the_same_again(name: str) -> None:
    tokens = int(name.strip("abcdefghijklmnopqrstuvwxyz")) * (1024 if name.endswith("k") else 1)
    assert workload(name, 3).docs.total == tokens
    assert workload(name, 3) == workload(name, 3)


@pytest.mark.parametrize("name", ["dense", "wide64k", "dense0", "hist64m"])
def test_other_workloads_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="hist256k, got"):
        workload(name, 0)


@pytest.mark.parametrize(
    ("name", "why"), [("gather", "<scheme>"), ("gather:4x4", "8 ranks"), ("gather:1x8", "ring > 1")]
)
def test_other_contestants_are_refused(name: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse(name, 8)


def test_a_report_without_any_times_is_written(tmp_path: Path) -> None:
    nothing = Result("dense600", "gather:2x1+graph", captured=True, failure="can be captured on CUDA devices only")
    assert nothing.failure in write(tmp_path, [nothing], FACTS)[0].read_text()
    pytest.importorskip("matplotlib")
    assert plot(tmp_path / "benchmark.png", [nothing], FACTS).stat().st_size

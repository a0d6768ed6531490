"""Other systems on gloo: each is as exact as the kernel alone, or says why it cannot do a problem."""

import importlib.util
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ringattn.benchmarking.peers import Runs
from ringattn.benchmarking.problem import LIMITS, Heads, Problem
from ringattn.benchmarking.roster import contestants, parse, peer_names
from ringattn.benchmarking.suite import Result, measure
from ringattn.benchmarking.timing import Timer
from ringattn.benchmarking.workloads import workload
from tests.pool import Pools

PACKAGES = {"rfa": "ring_flash_attn", "usp": "yunchang"}
# What each cannot do, of the workloads below; "" where it must be exact.
CANNOT = {
    "plain-ulysses": ("", "", "", ""),
    "flex": ("", "", "", "takes 4096 tokens there, got 4200"),
    "rfa-zigzag": ("", "", "divide by 4, got", "no windows"),
    "rfa-llama3": ("", "", "", ""),
    "rfa-llama3:1": ("", "", "", ""),
    "usp:2x1": ("", "no packed documents, got 16", "no packed documents", "no windows"),
    "usp:1x2": ("which gloo cannot do", "no packed documents, got 16", "no packed documents", "no windows"),
    "torch-cp": ("CUDA only, got cpu",) * 4,
    "torch-cp:alltoall": ("CUDA only, got cpu",) * 4,
}
WORKLOADS = ("dense512", "packed2048", "hist600", "window4200")


def measured(names: list[str], backend: str, heads: Heads, workloads: tuple[str, ...]) -> list[Result]:
    cpu = torch.device("cpu")
    makers = [
        lambda one=one: Problem.draw(workload(one, 0), heads, backend, cpu, torch.bfloat16, 0) for one in workloads
    ]
    timer = Timer(cpu, calls=1, repeats=1, warmups=0)
    return list(measure(makers, contestants(names, peers=False), timer))


def test_there_is_a_line_for_every_name() -> None:
    assert list(CANNOT) == peer_names(2)


def lacking(name: str) -> str | None:
    """The package that a peer needs and that is not installed."""
    package = PACKAGES.get(name[:3])
    return None if package is None or importlib.util.find_spec(package) is not None else package


@pytest.fixture(scope="module")
def found(pool: Pools) -> list[list[Result]]:
    """Of each rank, with all peers that are installed: the kernel alone takes as long as most of them."""
    names = [name for name in CANNOT if lacking(name) is None]
    return pool(2, "cpu").run(measured, names, "cpu", Heads(4, 2, 16), WORKLOADS, timeout=200)


@pytest.mark.parametrize("name", list(CANNOT))
def test_a_peer_is_right_or_says_why_not(found: list[list[Result]], name: str) -> None:
    if package := lacking(name):
        pytest.skip(f"{package} is not installed")
    for results in found:
        mine = [result for result in results if result.contestant == name]
        for result, reason in zip(mine, CANNOT[name], strict=True):
            assert re.search(reason, result.failure) if reason else not result.failure, result
            assert (result.both is None) == bool(reason)
            assert reason or result.error < LIMITS[torch.bfloat16]


def test_a_peer_runs_the_kernel_of_the_run(pool: Pools) -> None:
    """The reference backend is the run's, and is called: it is replaced by one that computes nothing."""
    if importlib.util.find_spec("ring_flash_attn") is None:
        pytest.skip("ring_flash_attn is not installed")
    cases = [(["rfa-zigzag"], "reference", Heads(4, 2, 16), ("dense512",))]
    for results in pool(2, "cpu").run_many(counted, cases, timeout=200)[0]:
        assert results == (True, True)


def counted(names: list[str], backend: str, heads: Heads, workloads: tuple[str, ...]) -> tuple[bool, bool]:
    """Whether the peer was right, and whether its kernel calls went through the backend of the run."""
    from ringattn.benchmarking.flash_attn_surface import surface
    from ringattn.kernels.registry import backends

    calls = []
    original = type(backends()[backend]).forward
    problem = Problem.draw(workload(workloads[0], 0), heads, backend, torch.device("cpu"), torch.bfloat16, 0)
    entry = contestants(names, peers=False)[0].enter(problem)

    def forward(self: Any, *arguments: Any) -> torch.Tensor:
        calls.append(arguments)
        return original(self, *arguments)

    type(surface().backend).forward = forward
    try:
        errors = problem.errors(entry.layout, entry.both())
        before = len(calls)
        entry.both()
    finally:
        type(surface().backend).forward = original
    return max(errors.values()) < LIMITS[torch.bfloat16], len(calls) == before + 2


def test_heads_that_do_not_divide(pool: Pools) -> None:
    names = ["plain-ulysses", "rfa-llama3:2", "usp:1x2"]
    for results in pool(2, "cpu").run_many(measured, [(names, "cpu", Heads(3, 3, 16), ("dense512",))], timeout=200)[0]:
        told = [result.failure for result in results[1:]]
        assert told == [
            "needs head counts that divide by 2, got 3 and 3",
            "needs key heads that divide by 2, got 3",
            "needs head counts that divide by 2, got 3 and 3",
        ]


class Failing:
    name, peer = "failing", True

    def missing(self, problem: Problem) -> str | None:
        return None

    def enter(self, problem: Problem) -> Any:
        raise RuntimeError("no kernel | for\nthis device")


def failed() -> list[Result]:
    cpu = torch.device("cpu")
    problem = Problem.draw(workload("dense64", 0), Heads(2, 2, 8), "cpu", cpu, torch.float32, 0)
    return list(measure([lambda: problem], [Failing()], Timer(cpu, 1, 1, 0)))


def test_a_peer_that_fails_does_not_end_the_run(pool: Pools) -> None:
    for results in pool(2, "cpu").run(failed):
        assert results[1].failure == "RuntimeError: no kernel / for this device"


def absent() -> list[str | None]:
    import ringattn.benchmarking.peers as peers

    def load(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    kept = peers.ring_flash_attn, peers.yunchang
    try:
        peers.ring_flash_attn = lambda: load("ring_flash_attn")
        peers.yunchang = lambda: load("einops_of_yunchang")
        zeros = torch.zeros(64, 2, 8, dtype=torch.bfloat16)
        problem = Problem(workload("dense64", 0), Heads(2, 2, 8), "cpu", (zeros,) * 4)
        return [one.missing(problem) for one in contestants(["rfa-zigzag", "rfa-llama3", "usp:2x1"], peers=False)]
    finally:
        peers.ring_flash_attn, peers.yunchang = kept


def test_a_package_that_is_absent_is_told(pool: Pools) -> None:
    hint = "ring-flash-attn is not installed: pip install --no-deps ring-flash-attn"
    for told in pool(2, "cpu").run(absent):
        assert told == [
            hint,
            hint,
            "yunchang is installed but cannot be imported: No module named 'einops_of_yunchang'",
        ]


def wide() -> list[str | None]:
    """Sums that alias what is added to them."""
    problem = Problem(workload("dense64", 0), Heads(2, 2, 8), "cpu", (torch.zeros(64, 2, 8),) * 4)
    return [one.missing(problem) for one in contestants(["rfa-zigzag", "usp:2x1"], peers=False)]


def test_zigzag_rings_take_no_float32(pool: Pools) -> None:
    for told in pool(2, "cpu").run(wide):
        assert told == ["takes bfloat16 and float16, got float32"] * 2


def test_peers_are_added_to_what_is_named_once(pool: Pools) -> None:
    for names in pool(2, "cpu").run(listed):
        assert names == ["gather:2x1+narrow", "usp:2x1", *(name for name in peer_names(2) if name != "usp:2x1")]


def listed() -> list[str]:
    return [one.name for one in contestants(["gather:2x1+narrow", "usp:2x1"], peers=True)]


@pytest.mark.parametrize(
    ("name", "why"),
    [("usp:4x4", "8 ranks"), ("rfa-llama3:0", "rfa-zigzag"), ("torch-cp:ring", "torch-cp"), ("auto:8+wide", "narrow")],
)
def test_other_names_are_refused(name: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse(name, 8)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(1, 4))
def test_zigzag_places_every_token_once(parts: list[int], ranks: int) -> None:
    lengths = [part * 2 * ranks for part in parts]
    places = [Runs.zigzag(lengths, rank, ranks) for rank in range(ranks)]
    assert torch.cat([place.indices() for place in places]).sort().values.tolist() == list(range(sum(lengths)))
    stream = torch.arange(sum(lengths))
    assert all(torch.equal(place.shard(stream), place.indices()) for place in places)
    assert {place.tokens() for place in places} == {sum(lengths) // ranks}

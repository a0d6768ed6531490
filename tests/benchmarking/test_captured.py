"""Replays of captured steps: their names, what is refused where, and that all ranks agree. Graphs need a GPU; elsewhere
a pretended one calls the step again."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from ringattn.benchmarking import captured, suite
from ringattn.benchmarking.captured import Captured, Graphs, Recording, agreed
from ringattn.benchmarking.contestants import Contestant, Entry, Silent
from ringattn.benchmarking.problem import Heads, Problem
from ringattn.benchmarking.report import markdown
from ringattn.benchmarking.roster import _options, contestants, parse
from ringattn.benchmarking.slow import Slow
from ringattn.benchmarking.suite import CAPTURED_CEILING, CEILING, Result, measure
from ringattn.benchmarking.timing import Timer
from ringattn.benchmarking.workloads import workload
from ringattn.parallel.plan.route import Route
from ringattn.settings import AttentionOptions
from tests.benchmarking.test_suite import FACTS
from tests.pool import Pools

HEADS = Heads(4, 2, 16)
REFUSED = "can be captured on CUDA devices only, got cpu"


def measured(entered: list[Contestant], slow: Slow | None = None, device: str = "cpu") -> list[Result]:
    heads, dtype = (HEADS, torch.float32) if device == "cpu" else (Heads(8, 2, 128), torch.bfloat16)
    problem = Problem.draw(workload("packed2048", 0), heads, "auto", torch.device(device), dtype, 0)
    return list(measure([lambda: problem], entered, Timer(problem.device, 1, 1, 0 if device == "cpu" else 1), slow))


def listed(names: list[str], graphs: bool) -> list[tuple[str, bool, bool]]:
    entered = contestants(names, peers=False, graphs=graphs)
    return [(one.name, isinstance(one, Captured), one.peer) for one in entered]


def test_variants_are_keywords_of_attention() -> None:
    assert _options("", ["narrow", "8chunks"]) == AttentionOptions(wide_reduce=False, head_chunks=8)
    assert _options("", ["2groups"]) == AttentionOptions(head_groups=2)
    for wrong in ("0chunks", "chunks", "wide"):
        with pytest.raises(ValueError, match=rf"a variant is \+narrow, .* got \+{wrong}"):
            _options("gather:2x1", [wrong])


def test_a_name_says_what_is_captured_and_what_is_a_peer(pool: Pools) -> None:
    names = ["gather:2x1+narrow", "gather:2x1+narrow+graph", "rfa-llama3:1+graph"]
    for found in pool(2, "cpu").run(listed, names, False):
        assert found == [
            ("gather:2x1+narrow", False, False),
            ("gather:2x1+narrow+graph", True, False),
            ("rfa-llama3:1+graph", True, True),
        ]


def test_every_one_is_captured_too_but_once(pool: Pools) -> None:
    for found in pool(2, "cpu").run(listed, ["auto:2", "auto:2+graph", "plain-ulysses"], True):
        assert [name for name, *_ in found] == ["auto:2", "auto:2+graph", "plain-ulysses", "plain-ulysses+graph"]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("gather:8x1+graph+narrow", r"\+graph comes last"),
        ("auto:8+graph+graph", r"\+graph comes last"),
        ("graph", r"each also with \+graph last"),
        ("usp:4x4+graph", "8 ranks"),
    ],
)
def test_other_names_are_refused(name: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse(name, 8)


def refused() -> list[Result]:
    return measured(contestants(["gather:2x1", "gather:2x1+graph", "plain-ulysses+graph"], peers=False))


def test_a_cpu_captures_nothing(pool: Pools) -> None:
    for results in pool(2, "cpu").run(refused):
        told = [(result.contestant, result.failure) for result in results]
        assert told == [
            (CEILING, ""),
            (CAPTURED_CEILING, REFUSED),
            ("gather:2x1", ""),
            ("gather:2x1+graph", REFUSED),
            ("plain-ulysses+graph", REFUSED),
        ]
    text = markdown(results, FACTS)
    assert f"| packed2048 | gather:2x1+graph | {REFUSED} |" in text
    assert "share is of the kernel alone captured as well" in text
    assert "captured" not in markdown([one for one in results if not one.captured], FACTS)


def reasons() -> list[tuple[str, int]]:
    rank = dist.get_rank()
    return [agreed("", 10 * rank), agreed("no" if rank else "", 1), agreed("no"), agreed(f"no {rank}")]


def test_ranks_agree_on_a_reason(pool: Pools) -> None:
    expected = [("", 10), ("rank 1: no", 1), ("no", 0), ("rank 0: no 0", 0)]
    assert pool(2, "cpu").run(reasons) == [expected, expected]


class PretendedGraph:
    """Calls the step again, and puts what it returns where it was, unless it is `idle`."""

    def __init__(self, step: Callable[[], Any], result: Any, idle: bool) -> None:
        self.step, self.result, self.idle = step, result, idle
        self.alive = True

    def replay(self) -> None:
        assert self.alive
        for x, y in zip(self.result or (), self.step() or (), strict=True):
            if not self.idle:
                x.copy_(y)

    def reset(self) -> None:
        self.alive = False


def pretended(
    entered: list[Contestant], slow: Slow | None = None, idle_rank: int = -1
) -> tuple[list[Result], int, int]:
    """The results, and how many graphs were made and were left alive."""
    graphs: list[PretendedGraph] = []

    def record(self: Graphs, step: Callable[[], Any], shared: bool = True) -> Recording:
        result = step()
        graphs.append(PretendedGraph(step, result, dist.get_rank() == idle_rank and len(graphs) > 3))
        self._graphs.append(graphs[-1])
        return Recording(graphs[-1], result, 1000)

    with ExitStack() as stack:
        stack.enter_context(patch.object(Graphs, "record", record))
        stack.enter_context(patch.object(torch.cuda, "synchronize", lambda: None))
        for module in (captured, suite):
            stack.enter_context(patch.object(module, "uncapturable", lambda _: None))
        results = measured(entered, slow)
    return results, len(graphs), sum(graph.alive for graph in graphs)


def replayed() -> tuple[list[Result], int, int]:
    names = ["gather:2x1", "gather:2x1+graph", "plain-ulysses+graph"]
    return pretended(contestants(names, peers=False), Slow(0.1, (0,)))


def test_replays_are_compared_with_the_captured_kernel(pool: Pools) -> None:
    for results, made, alive in pool(2, "cpu").run(replayed):
        assert (made, alive) == (3 + 4 + 3, 0)  # both passes twice, forward, and where there is one the silent step
        alone, captured_alone, plain, ours, peer = results
        assert not any(result.failure for result in results)
        assert [result.captured for result in results] == [False, True, False, True, True]
        for result, ceiling in ((plain, alone), (ours, captured_alone), (peer, captured_alone)):
            assert result.share_both == pytest.approx(ceiling.both / result.both)
            assert result.share_forward == pytest.approx(ceiling.forward / result.forward)
        assert max(captured_alone.errors.values()) < 1e-6
        assert max(*ours.errors.values(), *peer.errors.values()) < 1e-5
        assert all(result.slowed for result in results)
        assert ours.exposed is not None
        assert peer.exposed is None
        assert ours.memory > 0.5  # inputs, and what the pretended graph holds
        assert plain.memory is None  # a CPU tells no peak
        assert (ours.choice, ours.planning is None) == (plain.choice, False)


def spoiled() -> list[Result]:
    return pretended(contestants(["gather:2x1+graph"], peers=False), idle_rank=1)[0]


def test_a_replay_that_leaves_nothing_is_not_timed(pool: Pools) -> None:
    for results in pool(2, "cpu").run(spoiled):
        assert results[2].failure.startswith("its replay differs from the kernel alone: out nan")
        assert results[2].both is None
        assert results[1].both is not None


class Failing(Captured):
    """Its backward pass cannot be captured on one rank: what runs before a capture goes well."""

    def enter(self, problem: Problem) -> Entry:
        entry = super().enter(problem)
        calls: list[None] = []

        def both() -> list[torch.Tensor]:
            calls.append(None)
            if dist.get_rank() == 1 and len(calls) > 1:
                entry.both()
                raise RuntimeError("operation not permitted when stream is capturing")
            return entry.both()

        return replace(entry, both=both)


def failing() -> tuple[list[Result], bool, bool]:
    """The results, and who has new transports afterwards."""
    ours, other = contestants(["gather:2x1+graph", "ulysses:1x2+graph"], peers=False)
    broken = Failing(ours.make)
    before = broken.of, other.of
    results = pretended([broken, other])[0]
    return results, broken.of.mesh is not before[0].mesh, other.of is not before[1]


def test_what_one_rank_cannot_capture_no_rank_replays(pool: Pools) -> None:
    told = "cannot be captured: rank 1: RuntimeError: operation not permitted when stream is capturing"
    for (_, alone, broken, other), *renewed in pool(2, "cpu").run(failing):
        assert renewed == [True, False]
        assert broken.failure == told
        assert broken.error is None  # nothing wrong was computed
        assert other.both
        assert alone.both


def test_what_would_have_arrived_is_kept_for_a_capture() -> None:
    arrived: list[torch.Tensor] = []
    x, route = torch.zeros(8), Route((8,), (8,), (0,), 8)
    Silent(True, arrived).exchange(x, x, route)
    assert x.all()
    Silent(False, arrived).exchange(x, x, route)
    assert not arrived  # of this call nothing is captured


class Synchronising(Captured):
    """Asks on one rank for a number of the device, which no capture allows."""

    def enter(self, problem: Problem) -> Entry:
        entry = super().enter(problem)

        def both() -> list[torch.Tensor]:
            results = entry.both()
            if dist.get_rank() == dist.get_world_size() - 1:
                results[0].sum().item()
            return results

        return replace(entry, both=both)


def on_devices(names: list[str]) -> list[Result]:
    entered = contestants([*names, *(f"{name}+graph" for name in names)], False, "collective")
    return measured([Synchronising(lambda: entered[0]), *entered], device="cuda")


@pytest.mark.parametrize(
    ("ranks", "names"),
    [
        pytest.param(1, ["auto:1"], marks=pytest.mark.gpu(1)),
        pytest.param(2, ["gather:2x1", "ring:2x1", "ulysses:1x2", "plain-ulysses"], marks=pytest.mark.gpu(2)),
    ],
)
def test_replays_on_devices_compute_what_plain_steps_do(pool: Pools, ranks: int, names: list[str]) -> None:
    for results in pool(ranks, "cuda").run(on_devices, names, timeout=300):
        by_name = {result.contestant: result for result in results[3:]}
        assert results[2].failure.startswith("cannot be captured")
        assert results[1].share_both == 1.0
        for name in names:
            plain, replay = by_name[name], by_name[f"{name}+graph"]
            assert not plain.failure
            assert not replay.failure
            assert replay.share_both
            assert replay.memory
            assert (replay.exposed is None) == (plain.exposed is None)

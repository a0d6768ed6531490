"""The benchmark of recurrent layers, tiny and on CPUs: every row of its table is there."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks import recurrent
from benchmarks.recurrent import Shape, TimedWire, report
from ringattn.benchmarking.timing import Timer
from tests.parallel.ranks import mesh_of
from tests.pool import Pools


def on_rank() -> list[str]:
    mesh = mesh_of(2, 1)
    timer = Timer(mesh.device, calls=1, repeats=1, warmups=0)
    shapes = [Shape(rule, 4, 2, 8, torch.float32) for rule in ("delta", "mamba2")]
    return ["\n".join(report(shape, [128], mesh, timer)) for shape in shapes]


def test_its_table(pool: Pools) -> None:
    delta, mamba = pool(2).run(on_rank)[0]
    assert delta.startswith("delta by `torch`, 2 key heads and 4 value heads of 8, float32, 2 ranks\n")
    for told in (delta, mamba):
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in told.splitlines()[4:]]
        expected = {
            "one of 128": ("kernel", "states", "scan", "exchange"),
            "128 in 16s": ("kernel", "scan", "exchange"),
        }
        assert [row[:2] for row in rows] == [[workload, what] for workload, each in expected.items() for what in each]
        for _, what, took, ceiling, transfers in rows:
            assert float(took) > 0
            assert (ceiling != "") == (transfers != "") == (what in ("scan", "exchange"))
        assert float(rows[5][4]) == 0.0, "whole documents need no transfer"


def in_turn() -> str:
    mesh = mesh_of(1, 1)
    return "\n".join(report(Shape("delta", 4, 2, 8, torch.float32), [128], mesh, Timer(mesh.device, 1, 1, 0), of=4))


def test_ranks_in_turn(pool: Pools) -> None:
    told = pool(1).run(in_turn)[0]
    assert "float32, 4 ranks\n" in told
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in told.splitlines()[4:]]
    assert [row[1] for row in rows] == ["kernel", "states", "scan, nothing sent", "kernel", "scan, nothing sent"]
    assert all(float(row[2]) > 0 for row in rows)


def test_only_standing_still_is_a_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on by 1 when a transfer is awaited, and by 10 when something is computed."""
    clock = [0.0]

    def passes(seconds: float) -> torch.Tensor:
        clock[0] += seconds
        return torch.zeros(1)

    monkeypatch.setattr(recurrent, "_now", lambda: clock[0])
    arriving = SimpleNamespace(wait=lambda: passes(1.0))
    wire = TimedWire(SimpleNamespace(start=lambda *given: arriving, exchange=lambda *given: passes(1.0)))
    under_way = wire.start(torch.zeros(1), [1], [1])
    passes(10.0)
    assert wire.seconds == 0.0
    under_way.wait()
    assert wire.seconds == 1.0
    wire.exchange(torch.zeros(1), [1], [1])
    assert wire.seconds == 2.0

"""Calibration over real ranks, where it is kept and found again, and how ranks come to plan for one machine."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ringattn import Documents, Layout, Mask, init_mesh, parallel_attention
from ringattn.cli import main
from ringattn.parallel.machine.calibrate import Calibration
from ringattn.parallel.machine.machine import Machine
from ringattn.parallel.machine.shipped import SHIPPED, calibration_path, keep, local_machine, write
from ringattn.parallel.plan.shape import Shape
from ringattn.parallel.planning.planner import plan_attention
from ringattn.settings import AttentionOptions
from tests.pool import Pools

TINY = Calibration(
    "cpu", (8,), (2, 1), torch.float32, "reference", 0.1, ((1, 32), (2, 32), (4, 8), (1, 8)), (64, 4096), (64, 4096)
)


def calibrate() -> tuple[str, list[str]]:
    told: list[str] = []
    return TINY.run(SHIPPED["CPU"], told.append).to_json(), told


def test_two_ranks_measure_kernels_copies_and_links(pool: Pools) -> None:
    results = pool(2).run(calibrate)
    machine = Machine.from_json(results[0][0])
    assert results[0][0] == results[1][0]  # of each number the slowest rank's, so the same on both
    assert {rate.head_dim for rate in machine.rates} == {8, 64}
    assert all(rate.flops > 0 and rate.launch_seconds >= 0 for rate in machine.rates)
    shipped = SHIPPED["CPU"].links
    # One of the two classes is measured: whether the two ranks count as one node is up to the launcher.
    changed = {key for key, link in machine.links.items() if link != shipped[key]}
    assert changed in [{(name, "p2p"), (name, "all_to_all")} for name in ("node", "network")]
    assert all(link.bandwidth > 0 and link.latency >= 0 for link in machine.links.values())
    provenance = machine.provenance
    assert provenance["origin"] == "measured"
    assert provenance["versions"]["torch"] == torch.__version__
    assert provenance["versions"]["backend"] == "reference"
    assert provenance["the rest"] == "of CPU (shipped)"
    assert len(results[0][1]) == 5  # two kernels, copies, two links


def test_bench_stores_what_later_meshes_plan_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RINGATTN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("ringattn.parallel.machine.calibrate.GRIDS", {"cpu": TINY.grid})
    monkeypatch.setattr("ringattn.parallel.machine.calibrate.COPIES", {"cpu": TINY.copies})
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert local_machine("cpu") == SHIPPED["CPU"]
    arguments = ["bench", "--calibrate", "--device", "cpu", "--head-dim", "8", "--heads", "2/1", "--seconds", "1"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    for words in ("head dim 8 forward", "TFLOP/s", "node/p2p", "GB/s", "of CPU (shipped)", str(tmp_path)):
        assert words in text
    assert max(len(line) for line in text.splitlines() if "stored in" not in line) <= 100
    found = local_machine("cpu")
    assert found.provenance["origin"] == "measured"
    assert {rate.head_dim for rate in found.rates} == {8, 64}
    assert main([*arguments, "--json", "--out", str(tmp_path / "mine.json")]) == 0
    shown = json.loads(capsys.readouterr().out)
    monkeypatch.setenv("RINGATTN_MACHINE", str(tmp_path / "mine.json"))
    assert json.loads(local_machine("cpu").to_json()) == shown
    with pytest.raises(SystemExit):
        main(["bench"])


def test_where_a_machine_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RINGATTN_CACHE_DIR", str(tmp_path / "new"))
    mine = replace(SHIPPED["CPU"], copy_bandwidth=1.0)
    assert keep(mine, "cpu") == calibration_path("cpu")
    assert local_machine("cpu") == mine
    monkeypatch.setenv("RINGATTN_MACHINE", "H100")
    assert local_machine("cpu") == SHIPPED["H100"]
    monkeypatch.setenv("RINGATTN_MACHINE", "h100")
    assert local_machine("cpu") == SHIPPED["H100"]
    monkeypatch.setenv("RINGATTN_MACHINE", "H101")
    with pytest.raises(ValueError, match=r"RINGATTN_MACHINE must be H200, .*got 'H101'"):
        local_machine("cpu")
    monkeypatch.delenv("RINGATTN_MACHINE")
    calibration_path("cpu").write_text("{")
    with pytest.warns(UserWarning, match="cannot be read"):
        assert local_machine("cpu") == SHIPPED["CPU"]


def agreed(files: list[str]) -> tuple[str, str]:
    """What this rank would plan for alone, and what its mesh plans for."""
    os.environ["RINGATTN_MACHINE"] = files[dist.get_rank()]
    try:
        return local_machine("cpu").digest, init_mesh(ring=2, device_type="cpu").machine.digest
    finally:
        del os.environ["RINGATTN_MACHINE"]


def test_ranks_with_other_files_plan_for_the_first_ones_machine(pool: Pools, tmp_path: Path) -> None:
    file = str(write(replace(SHIPPED["CPU"], name="slow", copy_bandwidth=1.0), tmp_path / "slow.json"))
    for files in ([file, "H200"], ["H200", file], [file, file]):
        own, meshes = zip(*pool(2).run(agreed, files), strict=True)
        assert set(meshes) == {own[0]}


def planned(different: bool) -> str:
    """An attention with RINGATTN_CHECK_PLANS, on ranks that plan alike or not; the error's text."""
    mesh = init_mesh(ring=2, device_type="cpu")
    layout = Layout(Documents([64, 32]), mesh)
    q, k, v = (torch.randn(layout.tokens(), 2, 8, dtype=torch.float64) for _ in range(3))
    scheme = "ring" if different and mesh.sequence_rank else "gather"
    os.environ["RINGATTN_CHECK_PLANS"] = "on"
    try:
        for _ in range(2):
            parallel_attention(q, k, v, layout, mask=Mask(), scheme=scheme)
        return plan_attention(layout, Shape(2, 2, 128, 128), AttentionOptions(scheme=scheme)).schedule
    except RuntimeError as error:
        return str(error)
    finally:
        del os.environ["RINGATTN_CHECK_PLANS"]


def test_plans_that_differ_are_told_before_anything_is_sent(pool: Pools) -> None:
    assert pool(2).run(planned, False) == ["gather", "gather"]
    first, second = pool(2).run(planned, True)
    assert first == second
    for words in ("ranks planned differently", "sequence rank 0", "gather of 2 stages", "ring of 2 stages"):
        assert words in first

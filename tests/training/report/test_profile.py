"""Traces of a window of steps: files that Perfetto reads, of these steps alone, and what is counted in them."""

import json
import time

import pytest
import torch

from ringattn.training.report import beside
from ringattn.training.report.profile import Profile, check_window
from ringattn.training.report.traces import covered, read_summaries, read_trace, summary


def steps(profile: Profile, first: int, last: int) -> None:
    for step in range(first, last + 1):
        profile.before(step)
        torch.ones(step, 64) @ torch.ones(64, 64)
        profile.after(step)


def test_a_window_is_recorded_and_nothing_else(tmp_path, capfd):
    with Profile(tmp_path, [2, 3], 0) as profile:
        steps(profile, 1, 5)
    events = read_trace(tmp_path / "profile" / "trace-rank0.json.gz")
    assert sum(event.get("name") == "aten::matmul" for event in events) == 2
    assert {name for event in events if (name := str(event.get("name"))).startswith("step ")} == {"step 2", "step 3"}
    assert all("ts" in event and "pid" in event for event in events if event.get("ph") == "X")
    (known,) = read_summaries(tmp_path)
    assert known["steps"] == [2, 3]
    assert known["seconds"] > 0
    assert known["exposed"] is None
    assert "ui.perfetto.dev" in capfd.readouterr().out
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == [
        "summary-rank0.json", "trace-rank0.json.gz",
    ]  # fmt: skip


@pytest.mark.parametrize(("window", "rank"), [(None, 0), ([7, 8], 0), ([1, 2], 8)])
def test_nothing_is_recorded_that_was_not_asked_for(tmp_path, window, rank):
    with Profile(tmp_path, window, rank) as profile:
        steps(profile, 1, 3)
    assert not list(tmp_path.iterdir())


def test_a_step_that_fails_leaves_the_trace_of_what_was_done(tmp_path):
    def run() -> None:
        with Profile(tmp_path, [1, 9], 0) as profile:
            steps(profile, 1, 1)
            profile.before(2)
            raise KeyError("broken")

    with pytest.raises(KeyError):
        run()
    for _ in range(3000):  # nobody waits for it
        if read_summaries(tmp_path):
            break
        time.sleep(0.01)
    assert read_trace(tmp_path / "profile" / "trace-rank0.json.gz")


def test_no_step_waits_until_a_trace_is_packed_and_read(tmp_path, monkeypatch, capfd):
    go = tmp_path / "go"
    wait = "go = pathlib.Path(sys.argv[3]).parents[1] / 'go'\nwhile not go.exists(): time.sleep(0.01)"
    monkeypatch.setattr(beside, "_RUN", f"import pathlib, sys, time; {wait}\nsys.exit(3)")
    with Profile(tmp_path, [1, 2], 0) as profile:
        steps(profile, 1, 5)  # would never end
        go.touch()
    assert "warning: no trace of rank 0: its process ended with exit code 3" in capfd.readouterr().err


def test_a_trace_that_cannot_be_written_costs_a_warning(tmp_path, capfd):
    (tmp_path / "profile" / "trace-rank0.json.gz").mkdir(parents=True)
    with Profile(tmp_path, [1, 1], 0) as profile:
        steps(profile, 1, 2)
    assert "warning: no trace of rank 0" in capfd.readouterr().err
    assert [one.name for one in (tmp_path / "profile").iterdir()] == ["trace-rank0.json.gz"]


def test_a_disk_that_takes_nothing_costs_a_warning(tmp_path, capsys):
    (tmp_path / "profile").write_text("a file")
    with Profile(tmp_path, [1, 1], 0) as profile:
        steps(profile, 1, 2)
    assert "warning: no trace of rank 0" in capsys.readouterr().err


def event(kind: str, name: str, start: float, length: float) -> dict[str, object]:
    return {"ph": "X", "cat": kind, "name": name, "ts": start, "dur": length}


def test_exposed_is_communication_under_no_kernel():
    events = [
        event("user_annotation", "step 5", 0, 100),
        event("gpu_user_annotation", "step 5", 0, 90),
        event("user_annotation", "step 6", 100, 100),
        event("kernel", "flash_fwd", 10, 30),
        event("kernel", "ncclDevKernel_SendRecv", 30, 20),  # 10 of 20 under flash_fwd
        event("gpu_memcpy", "Memcpy PtoP (Device -> Device)", 45, 15),  # 10 more
        event("gpu_memcpy", "Memcpy HtoD", 150, 40),
        {"ph": "i", "cat": "kernel", "name": "nccl"},
    ]
    assert summary(events) == pytest.approx({"seconds": 1e-4, "communication": 30 / 200, "exposed": 20 / 200})
    assert summary([]) == {"seconds": None, "communication": None, "exposed": None}


def test_intervals_that_overlap_count_once():
    assert covered([(5, 7), (0, 2), (1, 3), (1, 2)]) == 5
    assert covered([]) == 0


@pytest.mark.parametrize("window", [[1], [0, 3], [5, 4], [1, 11], [1.0, 2.0], [True, 2], "1,2", 5, {"a": 1}])
def test_a_window_that_is_none_is_refused(window):
    with pytest.raises(ValueError, match=r"run\.profile must be null or the first and the last step"):
        check_window(window)


def test_summaries_that_are_none_are_passed_over(tmp_path):
    (tmp_path / "profile").mkdir()
    for number, text in enumerate(["{", "[]", json.dumps({"rank": 2})]):
        (tmp_path / "profile" / f"summary-rank{number}.json").write_text(text)
    assert read_summaries(tmp_path) == [{"rank": 2}]

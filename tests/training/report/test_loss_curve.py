"""The picture of a run: nobody waits for it, it is whole, and the last one has all steps."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from ringattn.training.report import beside, plot
from ringattn.training.report.plot import LossCurve, plot_loss

PNG = b"\x89PNG"
# Stands for the process: it notes how many lines it finds, and ends once a file is there.
SLOW = (
    "import sys, time, pathlib; _, _, metrics, path, _ = sys.argv[1:]; path = pathlib.Path(path); "
    "lines = len(pathlib.Path(metrics).read_text().splitlines()); "
    "print(lines, file=(path.parent / 'drawn').open('a')); go = path.parent / 'go'\n"
    "while not go.exists(): time.sleep(0.01)"
)


def add(metrics: Path, step: int) -> None:
    with metrics.open("a") as file:
        print(json.dumps({"step": step, "loss": 1.0 / step}), file=file)


def until(path: Path) -> None:
    for _ in range(3000):
        if path.exists():
            return
        time.sleep(0.01)
    raise AssertionError(f"{path} did not come")


def work() -> int:
    """Something in Python, as a step whose launches the device waits for."""
    return sum(range(20_000))


def test_a_step_of_python_goes_on_while_a_picture_of_many_steps_is_drawn(tmp_path):
    """In a thread nearly every step that is bound by the host stands still as long as it takes to draw."""
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps({"step": step, "loss": 1.0 / step}) + "\n" for step in range(1, 100_000)))
    curve = LossCurve(metrics, tmp_path / "loss.png", "tiny")
    spent = time.thread_time()
    began = time.process_time()
    curve.draw()
    while not (tmp_path / "loss.png").exists():
        work()
    # What this process computed meanwhile was the steps alone.
    assert time.process_time() - began < 1.2 * (time.thread_time() - spent) + 0.05
    curve.close()


def test_nobody_waits_for_a_picture_and_the_last_one_has_all_steps(tmp_path, monkeypatch):
    """Two that are asked for while one is drawn are one picture after it."""
    monkeypatch.setattr(beside, "_RUN", SLOW)
    metrics, drawn = tmp_path / "metrics.jsonl", tmp_path / "drawn"
    curve = LossCurve(metrics, tmp_path / "loss.png", "tiny")
    curve.close()  # of nothing
    for step in (1, 2, 3):
        add(metrics, step)
        curve.draw()
        until(drawn)
    (tmp_path / "go").touch()
    curve.close()
    assert drawn.read_text().split() == ["1", "3"]
    curve.draw()
    curve.close()
    assert drawn.read_text().split() == ["1", "3", "3"]


def test_a_picture_that_cannot_be_drawn_is_a_warning_and_the_next_one_is_drawn(tmp_path, capfd):
    metrics, path = tmp_path / "metrics.jsonl", tmp_path / "gone" / "loss.png"
    add(metrics, 1)
    curve = LossCurve(metrics, path, "tiny")
    curve.draw()
    curve.close()
    assert f"warning: {path} could not be drawn" in capfd.readouterr().err
    path.parent.mkdir()
    curve.draw()
    curve.close()
    assert path.read_bytes().startswith(PNG)
    assert [one.name for one in path.parent.iterdir()] == ["loss.png"]


def test_a_process_that_is_killed_or_never_ends_is_a_warning(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(beside, "_RUN", SLOW)
    metrics = tmp_path / "metrics.jsonl"
    add(metrics, 1)
    curve = LossCurve(metrics, tmp_path / "loss.png", "tiny")
    curve.draw()
    assert curve._process is not None
    curve._process.kill()
    curve.close()
    assert f"could not be drawn: its process ended with exit code {-signal.SIGKILL}" in capfd.readouterr().err
    monkeypatch.setattr(plot, "LONGEST", 0.5)
    curve.draw()
    curve.close()
    assert "could not be drawn: it took more than" in capfd.readouterr().err
    monkeypatch.setattr(sys, "executable", str(tmp_path / "none"))
    curve.draw()
    curve.close()
    assert "could not be drawn: [Errno 2]" in capfd.readouterr().err


def test_signals_that_stop_a_run_do_not_stop_its_picture(tmp_path, monkeypatch):
    """Schedulers send them to every process of a job."""
    monkeypatch.setattr(beside, "_RUN", SLOW)
    metrics = tmp_path / "metrics.jsonl"
    add(metrics, 1)
    curve = LossCurve(metrics, tmp_path / "loss.png", "tiny")
    curve.draw()
    process = curve._process
    assert process is not None
    until(tmp_path / "drawn")
    assert os.getpgid(process.pid) != os.getpgid(0)  # nor does Ctrl-C
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        process.send_signal(number)
    (tmp_path / "go").touch()
    assert process.wait(30) == 0
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGTERM, signal.SIGINT}


def test_a_run_that_failed_leaves_its_picture_to_be_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(beside, "_RUN", SLOW)
    metrics, drawn = tmp_path / "metrics.jsonl", tmp_path / "drawn"
    curve = LossCurve(metrics, tmp_path / "loss.png", "tiny")
    add(metrics, 1)
    curve.draw()
    until(drawn)
    first = curve._process
    add(metrics, 2)
    curve.draw()
    curve.leave()  # at once, although the first is not drawn
    (tmp_path / "go").touch()
    curve.close()
    assert first is not None
    assert first.wait(30) == 0
    assert drawn.read_text().split() == ["1", "2"]


def test_a_run_that_is_killed_leaves_a_whole_picture_or_none(tmp_path):
    metrics, path = tmp_path / "metrics.jsonl", tmp_path / "loss.png"
    add(metrics, 1)
    program = (
        "import os, signal, sys; from pathlib import Path; from ringattn.training.report.plot import LossCurve; "
        "LossCurve(Path(sys.argv[1]), Path(sys.argv[2]), 'tiny').draw(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", program, str(metrics), str(path)], check=False, stderr=subprocess.DEVNULL)
    until(path)
    assert path.read_bytes().startswith(PNG)
    assert path.read_bytes().endswith(b"IEND\xaeB`\x82")


def test_two_that_draw_one_picture_both_make_a_whole_one(tmp_path):
    metrics, path = tmp_path / "metrics.jsonl", tmp_path / "loss.png"
    add(metrics, 1)
    curves = [LossCurve(metrics, path, "tiny") for _ in range(4)]
    for curve in curves:
        curve.draw()
    for curve in curves:
        curve.close()
        assert path.read_bytes().endswith(b"IEND\xaeB`\x82")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]


def test_what_others_set_for_their_pictures_stays(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    plot_loss([{"step": 1, "loss": 1.0}], tmp_path / "loss.png", "tiny")
    assert dict(matplotlib.rcParams) == before

"""What a run tells is told in a thread, in order; the steps do not wait for disks and networks."""

import json
import sys
import threading
import time

import pytest

pytest.importorskip("transformers")

from ringattn.training.checkpoint import Place
from ringattn.training.report import telling, trackers
from ringattn.training.report.in_order import InOrder
from ringattn.training.report.metrics import MetricsFile
from ringattn.training.report.plot import LossCurve
from ringattn.training.report.records import read_metrics
from ringattn.training.report.telling import Report
from tests.training.recipe import prepared
from tests.training.report.test_metrics import metrics

SLOW = 0.3  # seconds


def steps(path):
    return [record["step"] for record in read_metrics(path)]


def report(output, *overrides):
    return Report(prepared(f"run.output={output}", *overrides), 0, 1, True)


def fail(output):
    with report(output) as one:
        one.step(metrics(1))
        raise RuntimeError("of the step")


@pytest.mark.parametrize("what", ["metrics.jsonl", "tracker"])
def test_steps_do_not_wait_for_a_slow_disk_or_network(tmp_path, monkeypatch, what):
    told = []
    write = MetricsFile.write

    def slow(self, one):
        time.sleep(SLOW)
        write(self, one)

    class Far:
        def __init__(self, output, config, step):
            pass

        def write(self, step, values):
            time.sleep(SLOW)
            told.append(step)

        def close(self):
            told.append("closed")

    if what == "tracker":
        monkeypatch.setitem(trackers.TRACKERS, "tensorboard", Far)
    else:
        monkeypatch.setattr(MetricsFile, "write", slow)
    chosen = ["run.tensorboard=true"] if what == "tracker" else []
    with report(tmp_path, *chosen) as one:
        began = time.perf_counter()
        for step in (1, 2, 3, 4):
            one.step(metrics(step))
        took = time.perf_counter() - began
    assert took < SLOW
    assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3, 4]
    if what == "tracker":
        assert told == [1, 2, 3, 4, "closed"]


def test_a_picture_has_the_steps_before_its_save_however_slow_the_disk(tmp_path, monkeypatch):
    found, write = [], MetricsFile.write

    def slow(self, one):
        time.sleep(0.05)
        write(self, one)

    monkeypatch.setattr(MetricsFile, "write", slow)
    monkeypatch.setattr(LossCurve, "draw", lambda self: found.append(steps(tmp_path / "metrics.jsonl")))
    with report(tmp_path) as one:
        one._draws = True
        for step in (1, 2, 3):
            one.step(metrics(step))
            one.saved([Place(tmp_path / "memory", 1, shared=False)])
        one.saved([Place(tmp_path / "checkpoints", 1)])
        one.step(metrics(4))
        one.back_to(2)
        one.step(metrics(3))
        one.saved([Place(tmp_path / "checkpoints", 1)])
    assert found == [[1, 2, 3], [1, 2, 3]]
    assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3]
    assert read_metrics(tmp_path / "metrics.jsonl")[2] == json.loads(json.dumps(vars(metrics(3))))


def test_what_cannot_be_written_ends_the_run_as_it_would_without_a_thread(tmp_path, monkeypatch):
    def wrong(self, one):
        raise TypeError("no number")

    monkeypatch.setattr(MetricsFile, "write", wrong)
    with pytest.raises(TypeError, match="no number"), report(tmp_path) as one:
        one.step(metrics(1))
    # Of a run that fails anyway, its own reason is heard.
    with pytest.raises(RuntimeError, match="of the step"):
        fail(tmp_path)


def test_a_run_that_failed_does_not_wait_for_a_disk_that_hangs(tmp_path, monkeypatch):
    hangs, write = threading.Event(), MetricsFile.write

    def stuck(self, one):
        hangs.wait(60)
        write(self, one)

    monkeypatch.setattr(MetricsFile, "write", stuck)
    monkeypatch.setattr(telling, "LAST_WORDS", 0.2)
    began = time.perf_counter()
    with pytest.raises(RuntimeError, match="of the step"):
        fail(tmp_path)
    assert time.perf_counter() - began < 20
    hangs.set()


def test_calls_come_in_order_and_after_one_that_raised_none_does():
    done, aside = [], InOrder("test")
    for number in range(100):
        aside(lambda number=number: done.append(number))
    aside(lambda: sys.exit(3))
    aside._thread.join(30)
    with pytest.raises(SystemExit):
        aside(lambda: done.append(-1))
    with pytest.raises(SystemExit):
        aside.close()
    assert done == list(range(100))

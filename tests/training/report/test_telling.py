"""What a run tells is told in a thread, in order; the steps do not wait for disks and networks."""

import json
import sys
import threading
import time

import pytest

pytest.importorskip("transformers")

from ringattn.training.checkpoint import Place
from ringattn.training.loop import Trainer
from ringattn.training.report import telling, trackers
from ringattn.training.report.in_order import InOrder
from ringattn.training.report.metrics import MetricsFile
from ringattn.training.report.plot import LossCurve
from ringattn.training.report.records import read_metrics
from ringattn.training.report.telling import Report
from tests.pool import Pools
from tests.training.recipe import prepared
from tests.training.report.test_metrics import metrics


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
    """They would wait for ever: nothing is written before all of them are told."""
    told, all_told = [], threading.Event()
    write = MetricsFile.write

    def slow(self, one):
        assert all_told.wait(30)
        write(self, one)

    class Far:
        def __init__(self, output, config, step):
            pass

        def write(self, step, values):
            assert all_told.wait(30)
            told.append(step)

        def close(self):
            told.append("closed")

    if what == "tracker":
        monkeypatch.setitem(trackers.TRACKERS, "tensorboard", Far)
    else:
        monkeypatch.setattr(MetricsFile, "write", slow)
    chosen = ["run.tensorboard=true"] if what == "tracker" else []
    with report(tmp_path, *chosen) as one:
        for step in (1, 2, 3, 4):
            one.step(metrics(step))
        if what == "tracker":  # a save does not wait for it
            one.written()
            assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3, 4]
            assert told == []
        all_told.set()
    assert steps(tmp_path / "metrics.jsonl") == [1, 2, 3, 4]
    if what == "tracker":
        assert told == [1, 2, 3, 4, "closed"]


def what_saves_find(output):
    """Of a run whose disk is slow: the step of each save, and the steps that metrics.jsonl has then."""
    write, found = MetricsFile.write, []

    def slow(self, one):
        time.sleep(0.05)
        write(self, one)

    def saved(self, places=None):
        found.append((self.step, steps(output / "metrics.jsonl")))

    sizes = ("data.seq_len=64", "model.config.hidden_size=32", "model.config.num_hidden_layers=1")
    trainer = Trainer(prepared(f"run.output={output}", "run.steps=4", "run.save_every=2", *sizes))
    with pytest.MonkeyPatch.context() as patch, Report(trainer.job, 0, 1, True) as one:
        patch.setattr(MetricsFile, "write", slow)
        patch.setattr(Trainer, "save", saved)
        trainer.run(one)
    return found


def test_a_save_comes_after_the_metrics_of_its_steps(pool: Pools, tmp_path):
    """A restart goes on after the save, so that a step which was not written then would be missing for ever."""
    assert pool(1).run(what_saves_find, tmp_path)[0] == [(2, [1, 2]), (4, [1, 2, 3, 4])]


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

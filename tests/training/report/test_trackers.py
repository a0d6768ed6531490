"""Trackers: the same names in all of them, by fakes and by the packages themselves where they are installed."""

import sys
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from ringattn.training.report import trackers
from ringattn.training.report.trackers import Trackers, check_trackers, numbers, wanted
from tests.training.recipe import prepared
from tests.training.report.test_metrics import metrics

NAMES = {
    "loss", "grad_norm", "lr", "tokens_per_second", "tokens_per_second_per_gpu", "peak_memory_gib", "seconds", "tokens",
    "targets", "epoch", "waited",
}  # fmt: skip


class Library:
    """Stands for trackio and wandb: what they are asked for, and a run that keeps what it is told."""

    def __init__(self, fails: str = "") -> None:
        self.asked: dict[str, Any] = {}
        self.told: list[tuple[dict[str, Any], int | None]] = []
        self.metrics: list[tuple[str, str]] = []
        self.ended, self.fails = False, fails

    def init(self, **asked: Any) -> "Library":
        if self.fails == "init":
            raise RuntimeError("no account")
        self.asked = asked
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        self.metrics.append((name, step_metric))

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        if self.fails == "log":
            raise RuntimeError("no network")
        self.told.append((values, step))

    def finish(self) -> None:
        self.ended = True


def fake(monkeypatch: pytest.MonkeyPatch, name: str, fails: str = "") -> Library:
    library = Library(fails)
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(init=library.init))
    monkeypatch.setenv("TRACKIO_DIR", "")  # so that what is set here does not outlive the test
    monkeypatch.delenv("TRACKIO_DIR")
    return library


def test_numbers_have_the_names_of_the_file():
    assert set(numbers(metrics(3))) == NAMES
    held_out = replace(metrics(3), validation={"books": 2.5}, skipped=True, loss=None)
    assert set(numbers(held_out)) == NAMES - {"loss"} | {"validation/books", "skipped"}
    assert numbers(held_out)["validation/books"] == 2.5


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_run_is_told_of_every_step_and_goes_on_as_itself(tmp_path, monkeypatch, name):
    asked = []
    for first in (1, 3):
        library = fake(monkeypatch, name)
        run = Trackers([name], tmp_path, {"run": {"steps": 4}}, first - 1)
        for step in (first, first + 1):
            run.write(metrics(step))
        run.close()
        assert library.ended
        assert [values.get("step", step) for values, step in library.told] == [first, first + 1]
        assert all(set(values) - {"step"} == NAMES for values, _ in library.told)
        assert library.metrics == ([("*", "step")] if name == "wandb" else [])
        asked.append(library.asked)
    assert asked[0] == asked[1]
    assert asked[0]["config"] == {"run": {"steps": 4}}
    assert asked[0]["resume"] == "allow"


@pytest.mark.parametrize("fails", ["init", "log"])
def test_a_tracker_that_fails_is_left_out_and_the_others_go_on(tmp_path, monkeypatch, capsys, fails):
    broken, good = fake(monkeypatch, "wandb", fails), fake(monkeypatch, "trackio")
    run = Trackers(["wandb", "trackio"], tmp_path, {}, 0)
    for step in (1, 2):
        run.write(metrics(step))
    run.close()
    assert len(good.told) == 2
    assert not broken.told
    assert capsys.readouterr().err.count("warning: the run goes on without wandb: RuntimeError: no ") == 1


def test_each_is_taken_once():
    assert wanted(None, True) == ["tensorboard"]
    assert wanted(["trackio", "tensorboard", "trackio"], True) == ["trackio", "tensorboard"]
    assert wanted([], False) == []


@pytest.mark.parametrize("value", ["wandb", ["mlflow"], [5], {"wandb": 1}])
def test_what_is_no_tracker_is_refused(value):
    with pytest.raises(ValueError, match=r"run\.trackers must be a list of tensorboard, trackio, wandb"):
        check_trackers(value, False)


def test_a_package_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"run\.trackers=\[wandb\] needs the package: pip install wandb"):
        prepared("run.trackers=[wandb]")
    with pytest.raises(ValueError, match=r"run\.tensorboard=true needs the package: pip install tensorboard"):
        check_trackers([], True)


def scalars(folder: Any) -> Mapping[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: [(one.step, one.value) for one in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_tensorboard_drops_what_comes_again(tmp_path):
    pytest.importorskip("tensorboard")
    run = Trackers(["tensorboard"], tmp_path, {}, 0)
    for step in (1, 2, 3):
        run.write(metrics(step))
    run.back_to(1)
    run.write(replace(metrics(2), loss=9.0))
    run.close()
    found = scalars(tmp_path / "tensorboard")
    assert set(found) == NAMES
    assert found["loss"] == [(1, 1.0), (2, 9.0)]


@pytest.mark.slow
def test_wandb_takes_it_without_a_network(tmp_path, monkeypatch, capsys):
    """Its file is compressed: what is in it is known to W&B alone, which must have nothing to say against it."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb = pytest.importorskip("wandb")
    run = Trackers(["wandb"], tmp_path, {"run": {"steps": 2}}, 0)
    assert run._open
    for step in (1, 2):
        run.write(replace(metrics(step), validation={"books": 2.5}))
    run.close()
    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert file.stat().st_size > 1000
    assert file.stem == f"run-{(tmp_path / 'tracker-id').read_text().strip()}"
    assert "warning" not in capsys.readouterr().err
    assert wandb.run is None


@pytest.mark.slow
def test_trackio_keeps_it_in_the_folder_of_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # it is read when trackio is imported
    pytest.importorskip("trackio")
    run = Trackers(["trackio"], tmp_path, {"run": {"steps": 2}}, 0)
    assert run._open
    for step in (1, 2):
        run.write(replace(metrics(step), validation={"books": 2.5}))
    run.close()
    (database,) = (tmp_path / "trackio").glob("*.db")
    assert all(name.encode() in database.read_bytes() for name in (*NAMES, "validation/books"))

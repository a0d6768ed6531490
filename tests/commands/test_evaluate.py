"""`ringattn evaluate`: how its ranks are started, and what comes of them. What they do: tests/training/evaluation."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from ringattn.cli import main
from ringattn.commands import _torchrun, evaluate
from ringattn.commands._torchrun import beside
from tests.commands.test_train import ALONE, VARIABLES
from tests.test_import import ROOT

# It wants a file descriptor, which captured output has not.
pytestmark = pytest.mark.filterwarnings("ignore:Unable to enable fault handler")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that what the command sets is taken back
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


def test_ranks_of_one_machine_meet_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of `ringattn train`: nothing listens to other machines."""
    told = []

    def noted(command: list[str]) -> int:
        with _torchrun.one_machine(command):
            told.append(ALONE.sub("ALONE", " ".join(command[1:])))
        return 7

    monkeypatch.setattr(evaluate, "beside", noted)
    assert main(["evaluate", "--nproc", "3", "model.path=/nowhere"]) == 7
    recipe = ROOT / "recipes" / "evaluate.py"
    assert told == [f"-m ringattn.commands._agent ALONE --nproc-per-node 3 {recipe} model.path=/nowhere"]
    assert os.environ["PYTHONPATH"] == str(ROOT)


SAYS_NO = (
    "import os, time; from ringattn.training.health import places; path = places.refusal_file(os.getpid())\n"
    "while not path.exists(): time.sleep(0.01)\n"
    "path.write_text('no'); raise SystemExit(1)"
)


@pytest.mark.parametrize(
    ("code", "expected"),
    [("", 0), ("raise SystemExit(3)", 1), ("import os; os.kill(os.getpid(), 9)", 1), (SAYS_NO, 2)],
    ids=["done", "failed", "killed", "refused"],
)
def test_the_exit_code_says_what_came_of_the_ranks(code: str, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert beside([sys.executable, "-c", code]) == expected


def test_signals_are_handed_on(tmp_path: Path) -> None:
    """And the handlers from before are back."""
    began, handler = tmp_path / "began", signal.getsignal(signal.SIGTERM)

    def tell() -> None:
        while not began.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=tell)
    thread.start()
    code = f"import pathlib, time; pathlib.Path({str(began)!r}).touch(); time.sleep(600)"
    assert beside([sys.executable, "-c", code]) == 128 + signal.SIGTERM
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is handler


@pytest.mark.slow
def test_what_cannot_be_evaluated_is_refused_with_one_message(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "--nproc", "2", f"model.run={tmp_path}"]) == 2
    said = capfd.readouterr().err
    assert said.count("error: model.run=") == 1
    assert "holds no config.yaml and model.json of a training run" in said

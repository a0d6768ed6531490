"""The examples run, on two gloo ranks, and print what they promise."""

import contextlib
import io
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from tests.pool import Pools

EXAMPLES = Path(__file__).parents[1] / "examples"
OWN_MODEL = [4.263, 0.789, 0.172, 0.065]  # in steps 0, 10, 20 and 29, with float32 on CPUs


def run_example(name: str) -> str:
    """What a rank prints. Its process, with the process group, goes on to the next test."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""):
        runpy.run_path(str(EXAMPLES / name))["main"]()
    return printed.getvalue()


def test_every_example_has_a_test_and_is_short() -> None:
    found = {path.name: path.read_text(encoding="utf-8").splitlines() for path in EXAMPLES.glob("*.py")}
    assert sorted(found) == [
        "attention.py", "captured_step.py", "hugging_face.py", "own_model.py", "trainer.py", "trl_sft.py",
        "with_accelerate.py",
    ]  # fmt: skip
    assert max(map(len, found.values())) < 90


@pytest.mark.parametrize("ranks", [1, 2])
def test_attention_is_that_of_one_rank(pool: Pools, ranks: int) -> None:
    """On one rank to the bit, on two within float32's rounding."""
    for rank, printed in enumerate(pool(ranks).run(run_example, "attention.py")):
        errors = [float(number) for number in re.findall(rf"rank {rank}: .* differs by (\S+)", printed)]
        assert len(errors) == 4
        assert max(errors) <= (1e-6 if ranks > 1 else 0.0)


def test_the_hugging_face_model_learns(pool: Pools) -> None:
    pytest.importorskip("transformers")
    first, second = pool(2).run(run_example, "hugging_face.py")
    losses = [float(number) for number in re.findall(r"loss (\S+)", first)]
    assert len(losses) == 4
    assert losses[0] > 3.5
    assert losses[-1] < 0.5
    assert second == ""


def of_accelerate(name: str) -> str:
    """Accelerate keeps the state of a process: that of a test before would be taken."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    try:
        return run_example(name)
    finally:
        AcceleratorState._reset_state(True)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_model_of_ones_own_learns_the_same_on_any_number_of_ranks(pool: Pools, ranks: int) -> None:
    first = pool(ranks).run(run_example, "own_model.py")[0]
    losses = [float(number) for number in re.findall(r"loss (\S+)", first)]
    assert losses == pytest.approx(OWN_MODEL, abs=2e-3)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("name", "needs"), [("with_accelerate.py", "accelerate"), ("trainer.py", "accelerate"), ("trl_sft.py", "trl")]
)
def test_loops_of_libraries_learn_the_same_on_one_rank_and_on_two(pool: Pools, name: str, needs: str) -> None:
    for module in ("transformers", needs):
        pytest.importorskip(module)
    curves = []
    for ranks in (1, 2):
        first, *others = pool(ranks).run(of_accelerate, name)
        curves.append([float(number) for number in re.findall(r"loss'?:? '?([\d.]+)", first)])
        assert not any("loss" in printed for printed in others)
    assert len(curves[0]) >= 4
    assert curves[0][0] > 3.5
    assert curves[0][-1] < 0.5 * curves[0][0]
    assert curves[1] == pytest.approx(curves[0], abs=2e-3)


def test_the_captured_step_says_that_it_needs_a_gpu(pool: Pools) -> None:
    assert all("needs a GPU" in printed for printed in pool(2).run(run_example, "captured_step.py"))


@pytest.mark.gpu
def test_the_captured_step_replays_what_it_captured() -> None:
    """Alone, on one device. Gradients are added in an order of their own, so bfloat16's rounding may differ."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / "captured_step.py"],
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "CUDA_VISIBLE_DEVICES": "0"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    differ = re.search(r"eager step by (\S+) at most", done.stdout)
    assert differ is not None, done.stdout
    assert float(differ[1]) <= torch.finfo(torch.bfloat16).eps

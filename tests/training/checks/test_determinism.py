"""The same numbers to the last bit: in two runs, through a kill, and of an exchange of heads on any number of ranks."""

import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("transformers")

from ringattn import Documents
from ringattn.kernels.registry import backends
from ringattn.training.checkpoint import complete_checkpoints
from ringattn.training.checks.determinism import check_backend
from ringattn.training.report.records import read_metrics
from tests.dense import Case
from tests.parallel.ranks import attend
from tests.training.fault_rows import run_with
from tests.training.recipe import prepared

STEPS = 20
RUN = ["run.deterministic=true", f"run.steps={STEPS}", "run.save_every=5", "run.keep=9", "run.straggler_every=7"]


def test_a_backend_without_equal_gradients_is_refused_by_name():
    for name, backend in backends().items():
        if backend.capability.deterministic:
            check_backend(name)
        else:
            with pytest.raises(ValueError, match=f"run.deterministic=true: parallel.backend={name} does not promise"):
                check_backend(name)
    check_backend("auto")
    assert not all(backend.capability.deterministic for backend in backends().values())


def test_the_recipe_refuses_it(tmp_path):
    able = backends()["cpu"]
    with (
        mock.patch.object(type(able), "capability", replace(able.capability, deterministic=False)),
        pytest.raises(ValueError, match="backend=cpu does not promise"),
    ):
        prepared(f"run.output={tmp_path}", "parallel.backend=cpu", "run.deterministic=true")


def bits_of(output: Path) -> list[tuple[Any, ...]]:
    records = read_metrics(output / "metrics.jsonl")
    return [tuple(record[key] for key in ("step", "loss", "grad_norm", "lr", "tokens")) for record in records]


def weights_of(output: Path) -> dict[str, torch.Tensor]:
    """What the files of the last checkpoint hold: weights, moments, random states."""
    from safetensors.torch import load_file

    folder = complete_checkpoints(output / "checkpoints")[-1]
    files = sorted(folder.glob("*.safetensors"))
    return {f"{path.name} {name}": tensor for path in files for name, tensor in load_file(path).items()}


def die(step: int) -> None:
    """Every rank is killed before a step."""
    from ringattn.training.loop import Trainer

    right = Trainer._forward

    def forward(self: Trainer, *given: Any) -> Any:
        if self.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return right(self, *given)

    Trainer._forward = forward  # type: ignore[method-assign]


@pytest.mark.slow
def test_two_runs_are_equal_to_the_last_bit_also_through_a_kill(tmp_path):
    codes, _, said = run_with(tmp_path / "one", RUN)
    assert codes == [0, 0], said
    codes, _, said = run_with(tmp_path / "two", RUN, faults=dict.fromkeys(range(2), partial(die, 12)))
    assert codes == [-signal.SIGKILL] * 2, said
    codes, _, said = run_with(tmp_path / "two", RUN)
    assert codes == [0, 0], said
    assert "from step 10" in said
    first, second = bits_of(tmp_path / "one"), bits_of(tmp_path / "two")
    assert len(first) == STEPS
    assert first == second
    weights, others = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    assert weights.keys() == others.keys()
    assert len(weights) > 20
    assert all(torch.equal(weights[name], others[name]) for name in weights)


@pytest.mark.parametrize("ulysses", [2, 4])
def test_an_exchange_of_heads_gives_the_bits_of_one_rank(pool, ulysses):
    """Each head is computed whole, with the same calls: only who computes it differs. (Rings merge partial results in
    an order that depends on the number of ranks.)"""
    case = Case(docs=Documents([40, 7, 100, 45]), heads=(8, 4), dtype=torch.float32, seed=3)
    one = pool(1).run(attend, case, 1, 1, "auto", "auto")[0]
    for found in pool(ulysses).run(attend, case, 1, ulysses, "auto", "ulysses"):
        assert torch.equal(found["out"], one["out"])
        assert torch.equal(found["lse"], one["lse"])


@pytest.mark.gpu
def test_on_a_gpu_too(pool, tmp_path):
    """Two trainers, one after the other, and the backward passes of the kernel that is chosen there."""
    found = [pool(1, "cuda").run(five_steps, tmp_path / name)[0] for name in ("one", "two")]
    assert found[0] == found[1]


def five_steps(output: Path) -> list[tuple[float, float]]:
    from ringattn.training.checks.determinism import be_deterministic
    from ringattn.training.loop import Trainer

    be_deterministic()
    try:
        trainer = Trainer(
            prepared(f"run.output={output}", "run.deterministic=true", "data.seq_len=4096", "run.steps=5")
        )
        with trainer._batches() as stream:
            return [trainer._train_step(next(stream))[:2] for _ in range(5)]
    finally:
        torch.use_deterministic_algorithms(False)

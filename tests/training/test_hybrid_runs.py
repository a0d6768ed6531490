"""A tiny Qwen3.5, whose layers carry states, trained by the recipe: one curve for all sizes of the sequence mesh."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from ringattn.training.report.records import read_metrics
from tests.training.forked import ROOT
from tests.training.test_runs import environment, finish, free_port

STEPS = 8
RUN = ["data.seq_len=384", "data.packs_per_step=2", f"run.steps={STEPS}", "run.dtype=float32", "run.log_every=1"]
RUN += ["optim.lr=1e-3", "optim.schedule=constant", "optim.warmup_ratio=0", "run.save_every=4"]
SIZES = {"1": (1, 1), "2": (2, 1), "4": (2, 2)}


def save_hybrid(folder: Path) -> None:
    from ringattn.hf.tiny import read_config, tiny_config, tiny_model

    tiny_model(tiny_config(read_config("qwen3_5_text"), vocab_size=300, rms_norm_eps=1e-3)).save_pretrained(folder)


def train(model: Path, output: Path, mesh: tuple[int, int], *overrides: str) -> list[tuple[float, float]]:
    """Losses and gradient norms of every step."""
    ring, ulysses = mesh
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ring * ulysses}", "--nnodes=1"]
    command += [f"--master-port={free_port()}", "recipes/train.py", f"model.path={model}", f"run.output={output}"]
    command += [f"parallel.ring={ring}", f"parallel.ulysses={ulysses}", *RUN, *overrides]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    text = finish(subprocess.Popen(command, cwd=ROOT, env=environment(), text=True, start_new_session=True, **pipes))
    assert "planned: " in text
    return [(row["loss"], row["grad_norm"]) for row in read_metrics(output / "metrics.jsonl") if "loss" in row]


@pytest.mark.nightly
def test_one_curve_for_every_size(tmp_path: Path) -> None:
    model = tmp_path / "model"
    save_hybrid(model)
    curves = {name: train(model, tmp_path / name, mesh) for name, mesh in SIZES.items()}
    assert len(curves["1"]) == STEPS
    assert curves["1"][-1][0] < curves["1"][0][0]
    for name in ("2", "4"):
        for one, other in zip(curves["1"], curves[name], strict=True):
            assert other == pytest.approx(one, rel=1e-5), name
    # To the fourth step on two ranks, and on from there on four.
    train(model, tmp_path / "resumed", SIZES["2"], "run.steps=4")
    resumed = train(model, tmp_path / "resumed", SIZES["4"], "run.resume=force")
    for one, other in zip(curves["1"], resumed, strict=True):
        assert other == pytest.approx(one, rel=1e-5)

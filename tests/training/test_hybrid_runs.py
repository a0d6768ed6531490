"""A tiny Qwen3.5, whose layers carry states, trained by the recipe: one curve for all sizes of the sequence mesh."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from ringattn.training.loop import Trainer
from ringattn.training.report.records import read_metrics
from tests.pool import Pools
from tests.training.forked import ROOT
from tests.training.packs.test_ahead import plans_made_here
from tests.training.recipe import prepared
from tests.training.test_runs import environment, finish, free_port

STEPS = 8
RUN = ["data.seq_len=384", "data.packs_per_step=2", f"run.steps={STEPS}", "run.dtype=float32", "run.log_every=1"]
RUN += ["optim.lr=1e-3", "optim.schedule=constant", "optim.warmup_ratio=0", "run.save_every=4"]
PLACES = ("thread", "process")
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


def steps_of(model: Path, output: Path, place: str) -> list[tuple[float, int]]:
    """The loss of every step, and how many plans its layers had to make."""
    found = []
    trainer = Trainer(prepared(f"model.path={model}", f"run.output={output}", f"data.ahead={place}", *RUN))
    with trainer._batches() as stream:
        for _ in range(5):
            batch = next(stream)
            with plans_made_here() as made:
                done = trainer._train_step(batch)
            found.append((done.loss, len(made)))
    return found


def test_layers_of_a_step_find_their_plans(pool: Pools, tmp_path: Path) -> None:
    """Of attention, of the delta rule and of its convolution, once the model ran; and the losses are the same."""
    save_hybrid(tmp_path / "model")
    steps = {place: pool(1).run(steps_of, tmp_path / "model", tmp_path / place, place)[0] for place in PLACES}
    assert [loss for loss, _ in steps["process"]] == [loss for loss, _ in steps["thread"]]
    kinds, packs = 3, 2
    assert [made for _, made in steps["thread"]] == [kinds * packs] * 5
    assert steps["process"][0][1] == kinds * packs
    assert steps["process"][-1][1] == 0


@pytest.mark.gpu
def test_plans_and_tables_that_came_to_a_gpu(pool: Pools, tmp_path: Path) -> None:
    """They were copied on a stream of their own: what the layers read of them is what they make by themselves."""
    save_hybrid(tmp_path / "model")
    workers = pool(1, "cuda")
    one, other = (
        workers.run(steps_of, tmp_path / "model", tmp_path / place, place, timeout=300)[0] for place in PLACES
    )
    assert other[-1][1] == 0
    assert [loss for loss, _ in other] == pytest.approx([loss for loss, _ in one], rel=1e-5)


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

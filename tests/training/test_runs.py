"""Whole runs of the recipe: the same curve for every mesh and engine, under torchrun, through kills and restarts."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from ringattn.training.engines.deepspeed import available as deepspeed_available
from ringattn.training.report.records import read_metrics
from tests.training.forked import ROOT, all_end, fork_rank

STEPS = 30
SMALL = [
    "model.config.hidden_size=32",
    "model.config.intermediate_size=48",
    "model.config.num_hidden_layers=2",
    "model.config.num_attention_heads=4",
    "model.config.num_key_value_heads=2",
    "data.seq_len=384",
    "data.packs_per_step=2",
    f"run.steps={STEPS}",
    "run.dtype=float32",
    "run.log_every=10",
]
LIMIT = 300  # seconds after which a run hangs; on a busy machine one takes a minute and more
needs_deepspeed = [
    pytest.mark.skipif(not deepspeed_available(), reason="deepspeed is not installed"),
    pytest.mark.slow,
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment() -> dict[str, str]:
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "HYDRA_"))}
    return clean | {
        "PYTHONPATH": os.pathsep.join([*paths, str(ROOT)]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def start(output: Path, ranks: int, *overrides: str, agent: tuple[str, ...] = ()) -> "subprocess.Popen[str]":
    where = agent or ("--nnodes=1", f"--master-port={free_port()}")
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", *where, "recipes/train.py"]
    return subprocess.Popen(
        [*command, *SMALL, f"run.output={output}", *overrides],
        cwd=ROOT,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finish(process: "subprocess.Popen[str]", code: int | None = 0) -> str:
    try:
        text, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        text, _ = process.communicate()
        pytest.fail(f"hangs:\n{text}")
    assert code is None or process.returncode == code, text
    return text


def variables_of(rank: int, ranks: int, port: int) -> dict[str, str]:
    """The environment of a rank, with what torchrun sets."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    return environment() | {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in own.items()}


def run(output: Path, ranks: int, *overrides: str) -> str:
    """A whole run without torchrun, in forked ranks: what they wrote."""
    log, port = output / "ranks.log", free_port()
    output.mkdir(exist_ok=True)
    log.unlink(missing_ok=True)
    arguments = [*SMALL, f"run.output={output}", *overrides]
    processes = [fork_rank(arguments, variables_of(rank, ranks, port), log, log) for rank in range(ranks)]
    in_time = all_end(processes, LIMIT)
    text = log.read_text()
    assert in_time, f"hangs:\n{text}"
    assert [process.exitcode for process in processes] == [0] * ranks, text
    return text


def curve(output: Path) -> list[tuple[int, float, float]]:
    return [(record["step"], record["loss"], record["grad_norm"]) for record in read_metrics(output / "metrics.jsonl")]


def assert_same_curve(found: list[tuple[int, float, float]], expected: list[tuple[int, float, float]]) -> None:
    assert [step for step, _, _ in found] == [step for step, _, _ in expected] == list(range(1, STEPS + 1))
    for (step, loss, norm), (_, expected_loss, expected_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-5), f"loss of step {step}"
        assert norm == pytest.approx(expected_norm, rel=1e-5), f"gradient norm of step {step}"


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> list[tuple[int, float, float]]:
    output = tmp_path_factory.mktemp("runs") / "one"
    text = run(output, 1)
    found = curve(output)
    assert found[0][1] == pytest.approx(5.55, abs=0.1)
    assert found[-1][1] < found[0][1] - 0.5
    assert (output / "config.yaml").is_file()
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert f"step {STEPS}/{STEPS}" in text
    return found


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (2, ()),
        (2, ("parallel.data=2", "memory.keep=attention")),
        pytest.param(2, ("memory.states_on=host", "memory.prefetch=2"), marks=pytest.mark.slow),
        pytest.param(4, ("parallel.head_chunks=2",), marks=pytest.mark.slow),
        pytest.param(4, ("memory.loss_tile=64", "memory.mlp_tile=64", "memory.keep=attention"), marks=pytest.mark.slow),
        pytest.param(2, ("engine=deepspeed", "engine.zero_stage=1"), marks=needs_deepspeed),
        pytest.param(2, ("engine=deepspeed", "engine.zero_stage=3", "parallel.data=2"), marks=needs_deepspeed),
        pytest.param(
            2,
            ("engine=deepspeed", "engine.zero_stage=3", "memory.states_on=host"),
            marks=[*needs_deepspeed, pytest.mark.nightly],  # its C++ is compiled first
        ),
        pytest.param(4, ("engine=deepspeed", "engine.zero_stage=2"), marks=needs_deepspeed),
        pytest.param(
            4,
            ("engine=deepspeed", "engine.zero_stage=1", "memory.loss_tile=64"),
            marks=[needs_deepspeed[0], pytest.mark.nightly],
        ),
        pytest.param(
            4,
            (
                "engine=deepspeed",
                "engine.zero_stage=3",
                "memory.loss_tile=64",
                "memory.mlp_tile=64",
                "memory.keep=layer",
            ),
            marks=needs_deepspeed,
        ),
    ],
    ids=lambda value: " ".join(value) or "fsdp2" if isinstance(value, tuple) else str(value),
)
def test_the_same_curve_on_every_mesh_and_engine(ranks, overrides, reference, tmp_path):
    run(tmp_path, ranks, *overrides)
    assert_same_curve(curve(tmp_path), reference)


@pytest.mark.slow
def test_two_machines_train_the_same_curve(reference, tmp_path):
    """Two agents with two ranks each stand for two machines: the ring crosses them and ulysses stays inside."""
    endpoint = f"127.0.0.1:{free_port()}"
    agents = []
    for node in range(2):
        where = (
            "--nnodes=2",
            f"--node-rank={node}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={endpoint}",
            "--rdzv-id=t",
        )
        agents.append(start(tmp_path, 2, "parallel.ulysses=2", agent=where))
    for agent in agents:
        finish(agent)
    assert_same_curve(curve(tmp_path), reference)


def wait_for_step(output: Path, step: int) -> None:
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        records = read_metrics(output / "metrics.jsonl")
        if records and records[-1]["step"] >= step:
            return
        time.sleep(0.02)
    pytest.fail(f"step {step} never came")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", pytest.param("deepspeed", marks=needs_deepspeed)])
def test_kill_and_start_again_continues_the_curve(engine, reference, tmp_path):
    overrides = (f"engine={engine}", "run.save_every=4")
    process = start(tmp_path, 2, *overrides)
    wait_for_step(tmp_path, 14)
    kill_session(process)
    finish(process, code=None)
    assert len(curve(tmp_path)) < STEPS
    text = run(tmp_path, 2, *overrides)
    resumed = int(text.split("from step ")[1].split()[0])
    assert 8 <= resumed < STEPS
    assert resumed % 4 == 0
    assert_same_curve(curve(tmp_path), reference)
    assert not list((tmp_path / "checkpoints").glob("*.partial"))
    text = run(tmp_path, 2, *overrides)
    assert f"already holds all {STEPS} steps" in text


def kill_session(process: "subprocess.Popen[str]") -> None:
    """kill -9 to every process of a run: torchrun gives each of its ranks a process group of its own."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=True)
    for pid in [*map(int, found.stdout.split()), process.pid]:
        os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
def test_sigterm_saves_and_another_number_of_ranks_goes_on(reference, tmp_path):
    process = start(tmp_path, 2, "run.save_every=0", "run.report=true")
    wait_for_step(tmp_path, 5)
    process.send_signal(signal.SIGTERM)
    text = finish(process, code=None)
    assert "start again with the same command" in text
    assert '<span class="state stopped">stopped</span>' in (tmp_path / "report.html").read_text()
    stopped = curve(tmp_path)[-1][0]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"step-{stopped:08d}"]
    text = run(tmp_path, 1, "run.save_every=0")
    assert f"from step {stopped}" in text
    assert_same_curve(curve(tmp_path), reference)


@pytest.mark.slow
def test_grouped_packs_go_on_where_they_waited_with_other_replicas(tmp_path):
    """Documents that wait for their pack are part of the checkpoint, and replicas share the packs of a step."""
    grouped = ("data.seq_len=768", "data.delay=4", "run.save_every=16")
    run(tmp_path, 1, *grouped)
    whole = curve(tmp_path)
    checkpoints = tmp_path / "checkpoints"
    marker = json.loads((checkpoints / "step-00000016" / "complete.json").read_text())
    assert marker["position"]["unusual"]
    shutil.rmtree(checkpoints / f"step-{STEPS:08d}")
    text = run(tmp_path, 2, *grouped, "parallel.data=2")
    assert "from step 16" in text
    assert_same_curve(curve(tmp_path), whole)


@pytest.mark.nightly
def test_tasks_of_srun_need_no_torchrun(tmp_path):
    variables = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "127.0.0.1"}
    tasks = []
    port = str(free_port())
    for rank in range(2):
        own = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_JOB_ID": "7", "MASTER_PORT": port}
        command = [sys.executable, "recipes/train.py", *SMALL, f"run.output={tmp_path}", "run.steps=2"]
        tasks.append(
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment() | variables | own,
                text=True,
                start_new_session=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    texts = [finish(task) for task in tasks]
    assert "2 ranks on cpu" in texts[0]
    assert "step" not in texts[1]
    assert [step for step, _, _ in curve(tmp_path)] == [1, 2]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("run.stepz=3",), ["stepz", "run"]),
        (("model=huge",), ["huge", "tiny"]),
        (("parallel.ring=3",), ["parallel.ring", "3", "2"]),
        (("data.seq_len=-4",), ["data.seq_len", "-4"]),
    ],
    ids=lambda value: value[0],
)
def test_a_refusal_is_one_message_of_rank_0(overrides, words, tmp_path):
    arguments = [*SMALL, f"run.output={tmp_path / 'out'}", *overrides]
    # Nobody listens at port 1: a process group could not start.
    ranks = [
        fork_rank(arguments, variables_of(rank, 2, port=1), tmp_path / f"stdout{rank}", tmp_path / f"stderr{rank}")
        for rank in range(2)
    ]
    assert all_end(ranks, 60)
    assert [rank.exitcode for rank in ranks] == [2, 2]
    assert [(tmp_path / name).read_text() for name in ("stdout0", "stdout1", "stderr1")] == ["", "", ""]
    told = (tmp_path / "stderr0").read_text()
    assert told.startswith("error: ")
    assert len(told.splitlines()) < 15
    assert all(word in told for word in words), told
    assert not (tmp_path / "out").exists()


def test_metrics_hold_what_a_run_is_judged_by(reference, tmp_path):
    del reference  # only so that this comes after it
    run(tmp_path, 1, "run.steps=2", "run.tensorboard=true")
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 2
    assert records[1]["tokens"] == 2 * 2 * 384
    assert records[1]["mfu"] is None
    assert records[1]["peak_memory_gib"] > 0
    assert records[1]["lr"] < records[0]["lr"]
    assert any((tmp_path / "tensorboard").iterdir())

"""The launch scripts, with stand-ins for pip, SLURM and `ringattn train`: what they call, with what, and how they
fail."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = [
    "launch/setup.sh",
    "launch/local.sh",
    "launch/test.sh",
    "launch/torchrun.sh",
    "launch/slurm.sbatch",
    ".ci/run",
]

# Stands for python3 and, copied by `-m venv`, for .venv/bin/python: it writes down what is installed and launched, and
# leaves everything else to the real one. SATISFIED: exit code of the check of the active environment.
PYTHON = f"""#!/usr/bin/env bash
case "$*" in
    "launch/satisfied.py "*) [ -n "${{SATISFIED:-}}" ] && exit "$SATISFIED"; exec {sys.executable} "$@" ;;
    "-m venv"*) mkdir -p "${{@: -1}}/bin" && cp "$0" "${{@: -1}}/bin/python"; echo "venv" >>"$CALLS" ;;
    "-m pip"*) echo "pip ${{*:3}}" >>"$CALLS"
        case "$*" in *"${{PIP_FAILS_ON:-nothing}}"*) echo "pip: no such thing"; exit 1 ;; esac ;;
    "-m ringattn train"*)
        echo "train ${{*:4}}" >>"$CALLS"
        echo "NNODES=${{NNODES:-}} NODE_RANK=${{NODE_RANK:-}} ENDPOINT=${{ENDPOINT:-}} JOB_ID=${{JOB_ID:-}}" \\
            >>"$CALLS.env"
        exit "${{TRAIN_EXIT:-0}}" ;;
    "-m pytest"*) echo "pytest ${{*:3}}" >>"$CALLS" ;;
    "-c import pip") [ "${{0##*/}}" = python ] ;;
    *) exec {sys.executable} "$@" ;;
esac
"""


class Checkout:
    """A copy of the scripts in a folder of its own, run with stand-ins on PATH."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls_file = root / "calls"
        self.bin = root / "bin"
        for name in ("launch", "bin"):
            (root / name).mkdir()
        for path in [*(ROOT / "launch").iterdir(), ROOT / "pyproject.toml"]:
            if path.is_file():
                (root / path.relative_to(ROOT)).write_bytes(path.read_bytes())
        self.program("python3", PYTHON)

    def program(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def environment(self, **variables: str) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("HOME", "TMPDIR", "LANG") if name in os.environ}
        path = f"{self.bin}:/usr/local/bin:/usr/bin:/bin"
        return {**kept, "PATH": path, "CALLS": str(self.calls_file), "CUDA_VISIBLE_DEVICES": "", **variables}

    def run(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        self.calls_file.write_text("")
        environment = self.environment(**variables)
        return subprocess.run(
            ["bash", *command], cwd=self.root, env=environment, capture_output=True, text=True, timeout=60, check=False
        )

    @property
    def calls(self) -> list[str]:
        return self.calls_file.read_text().splitlines()

    @property
    def machines(self) -> list[str]:
        """What the environment of each call of `ringattn train` says about machines."""
        return (self.root / "calls.env").read_text().splitlines()


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_valid_bash(script: str) -> None:
    subprocess.run(["bash", "-n", ROOT / script], check=True, timeout=20)


# --- set-up


def test_fresh_machine_gets_a_venv_with_torch_first(checkout: Checkout) -> None:
    done = checkout.run("launch/local.sh", SATISFIED="1")
    assert done.returncode == 0, done.stderr
    made, torch, package, launched = checkout.calls
    assert made == "venv"
    assert "-c launch/constraints.txt torch " in torch
    assert package.endswith("-c launch/constraints.txt -e .[train]")
    assert launched.split() == ["train"]
    assert "installing torch: done in" in done.stderr


def test_second_call_installs_nothing_until_a_requirement_changes(checkout: Checkout) -> None:
    checkout.run("launch/local.sh", SATISFIED="1")
    checkout.run("launch/local.sh", SATISFIED="1")
    assert [call.split()[0] for call in checkout.calls] == ["train"]
    with (checkout.root / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    checkout.run("launch/local.sh", SATISFIED="1")
    assert [call.split()[0] for call in checkout.calls] == ["pip", "pip", "train"]


def test_tests_add_their_extras_to_the_same_venv(checkout: Checkout) -> None:
    checkout.run("launch/local.sh", SATISFIED="1")
    done = checkout.run("launch/test.sh", "-k", "two words", SATISFIED="1")
    assert done.returncode == 0
    assert checkout.calls[1].endswith("-e .[dev,hf]")
    assert checkout.calls[2].endswith("--no-build-isolation -e .[deepspeed]")
    assert checkout.calls[3] == "pytest -k two words"


def test_failing_install_shows_its_output_and_stops(checkout: Checkout) -> None:
    done = checkout.run("launch/local.sh", SATISFIED="1", PIP_FAILS_ON=".[train]")
    assert done.returncode == 1
    assert "pip: no such thing" in done.stderr
    assert "installing ringattn[train]: failed with exit code 1" in done.stderr
    assert not any(call.startswith("train") for call in checkout.calls)
    checkout.run("launch/local.sh", SATISFIED="1")  # nothing was stamped: it is tried again
    assert sum(call.startswith("pip") for call in checkout.calls) == 2


def test_tests_run_without_deepspeed_but_its_engine_does_not(checkout: Checkout) -> None:
    done = checkout.run("launch/test.sh", SATISFIED="1", PIP_FAILS_ON=".[deepspeed]")
    assert done.returncode == 0
    assert "going on without deepspeed" in done.stderr
    assert checkout.calls[-1].startswith("pytest")
    checkout.run("launch/test.sh", SATISFIED="1")
    assert len(checkout.calls) == 1  # not tried at every call
    done = checkout.run("launch/local.sh", "engine=deepspeed", SATISFIED="1", PIP_FAILS_ON=".[deepspeed]")
    assert done.returncode == 1
    assert not any(call.startswith("train") for call in checkout.calls)


def test_active_environment_is_used_when_it_has_everything(checkout: Checkout) -> None:
    done = checkout.run("launch/local.sh", SATISFIED="0")
    assert done.returncode == 0, done.stderr
    assert [call.split()[0] for call in checkout.calls] == ["train"]
    assert not (checkout.root / ".venv").exists()


def test_active_environment_that_lacks_something_is_named_and_left_alone(checkout: Checkout) -> None:
    checkout.program("python3", PYTHON.replace('exec {sys.executable} "$@" ;;', "exit 1 ;;"))
    (checkout.root / "launch/satisfied.py").write_text("print('einops>=0.8'); raise SystemExit(1)")
    done = checkout.run("launch/local.sh", VIRTUAL_ENV="/somewhere")
    assert "the active environment lacks einops>=0.8: using .venv" in done.stderr
    assert checkout.calls[0] == "venv"


def test_unknown_extra_is_refused(checkout: Checkout) -> None:
    done = checkout.run("launch/local.sh", EXTRAS="fa9")
    assert done.returncode == 2
    assert "there is no extra 'fa9' in pyproject.toml, only train, " in done.stderr
    assert checkout.calls == []


def test_old_python_is_refused(checkout: Checkout) -> None:
    checkout.program("oldpython", "#!/bin/sh\ncase $1 in --version) echo Python 3.8.1 ;; *) exit 1 ;; esac\n")
    done = checkout.run("launch/local.sh", PYTHON="oldpython")
    assert done.returncode == 1
    assert "Python 3.11 or newer is needed, found oldpython: Python 3.8.1" in done.stderr


def test_real_check_agrees_with_this_environment() -> None:
    check = [sys.executable, "launch/satisfied.py"]
    done = subprocess.run(check, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_real_check_names_what_is_missing(checkout: Checkout) -> None:
    (checkout.root / "pyproject.toml").write_text(
        '[project]\ndependencies = ["pytest>=8", "absent-thing; python_version < \'3\'"]\n'
        '[project.optional-dependencies]\nnew = ["pytest>=9999"]\nnone = ["ringattn-absent-thing>=2"]\n'
    )
    found = {}
    for extras in ([], ["new"], ["none"]):
        command = [sys.executable, "launch/satisfied.py", *extras]
        found[" ".join(extras)] = subprocess.run(command, cwd=checkout.root, capture_output=True, text=True).stdout
    assert found[""] == ""
    assert found["new"].startswith("pytest>=9999 (found ")
    assert found["none"] == "ringattn-absent-thing>=2\n"


# --- local.sh


def test_local_help(checkout: Checkout) -> None:
    done = checkout.run("launch/local.sh", "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: bash launch/local.sh [options] [hydra overrides]")
    assert checkout.calls == []


def test_local_passes_options_overrides_and_exit_code(checkout: Checkout) -> None:
    arguments = ["--nproc", "3", "run.steps=3", "data.files=[a b,c]"]
    done = checkout.run("launch/local.sh", *arguments, SATISFIED="0", TRAIN_EXIT="7")
    assert done.returncode == 7
    assert checkout.calls == ["train --nproc 3 run.steps=3 data.files=[a b,c]"]


def test_local_is_this_machine_alone(checkout: Checkout) -> None:
    done = checkout.run("launch/local.sh", SATISFIED="0", NNODES="2")
    assert done.returncode == 0, done.stderr
    assert checkout.machines[0].startswith("NNODES= ")


# --- torchrun.sh


def test_torchrun_by_arguments_and_by_environment(checkout: Checkout) -> None:
    arguments = ["--nodes", "2", "--node-rank", "1", "--endpoint", "a:29400", "--nproc-per-node", "4", "--id", "x"]
    done = checkout.run("launch/torchrun.sh", *arguments, "parallel.ring=2", SATISFIED="0")
    assert done.returncode == 0, done.stderr
    assert checkout.calls == [f"train {' '.join(arguments)} parallel.ring=2"]
    variables = {"NNODES": "2", "NODE_RANK": "1", "ENDPOINT": "a:29400", "JOB_ID": "x"}
    done = checkout.run("launch/torchrun.sh", "parallel.ring=2", SATISFIED="0", **variables)
    assert done.returncode == 0, done.stderr
    assert checkout.calls == ["train parallel.ring=2"]
    assert checkout.machines[-1] == "NNODES=2 NODE_RANK=1 ENDPOINT=a:29400 JOB_ID=x"
    assert checkout.run("launch/torchrun.sh", "--nodes=2", SATISFIED="0").returncode == 0


@pytest.mark.parametrize("arguments", [(), ("--node-rank", "0"), ("--nodse", "2"), ("parallel.ring=2",)])
def test_torchrun_without_a_number_of_nodes_is_refused(checkout: Checkout, arguments: tuple[str, ...]) -> None:
    done = checkout.run("launch/torchrun.sh", *arguments, SATISFIED="0")
    assert done.returncode == 2
    assert done.stderr.startswith("torchrun.sh: missing: --nodes (or NNODES)\nusage: bash launch/torchrun.sh")
    assert checkout.calls == []


# --- slurm.sbatch


SRUN = """#!/usr/bin/env bash
echo "srun $*" >>"$CALLS"
while [[ $1 == --* ]]; do shift; done
for node in 0 1; do
    SLURM_NODEID=$node "$@" &
done
wait
"""
WAITING_SRUN = """#!/usr/bin/env bash
trap 'echo "srun got TERM" >>"$CALLS"; exit 15' TERM
echo ready >>"$CALLS"
for _ in {1..300}; do sleep 0.1; done
"""
SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*" >>"$CALLS"
[ "$1" != hostnames ] && [ "$2" = hostnames ] && printf 'node7\\nnode8\\n'
exit 0
"""
JOB = {
    "SLURM_JOB_ID": "31234",
    "SLURM_JOB_NODELIST": "node[7-8]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_CPUS_ON_NODE": "96",
    "SATISFIED": "0",
    "NPROC": "2",
}


def test_slurm_starts_one_torchrun_per_node_with_the_first_host_as_endpoint(checkout: Checkout) -> None:
    checkout.program("srun", SRUN)
    checkout.program("scontrol", SCONTROL)
    done = checkout.run("launch/slurm.sbatch", "a=1", "b=[2, 3]", SLURM_SUBMIT_DIR=str(checkout.root), **JOB)
    assert done.returncode == 0, done.stderr
    assert checkout.calls[0] == "scontrol show hostnames node[7-8]"
    assert checkout.calls[1].startswith("srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=96 ")
    assert [call for call in checkout.calls if call.startswith("train")] == ["train a=1 b=[2, 3]"] * 2
    assert sorted(checkout.machines) == [
        f"NNODES=2 NODE_RANK={rank} ENDPOINT=node7:21234 JOB_ID=31234" for rank in range(2)
    ]


@pytest.mark.parametrize(("number", "requeued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_slurm_forwards_signals_and_requeues_at_the_time_limit(
    checkout: Checkout, number: signal.Signals, requeued: bool
) -> None:
    checkout.program("srun", WAITING_SRUN)
    checkout.program("scontrol", SCONTROL)
    checkout.calls_file.write_text("")
    environment = checkout.environment(SLURM_SUBMIT_DIR=str(checkout.root), **JOB)
    job = subprocess.Popen(["bash", "launch/slurm.sbatch"], cwd=checkout.root, env=environment)
    try:
        deadline = time.monotonic() + 20
        while "ready" not in checkout.calls and time.monotonic() < deadline:
            time.sleep(0.05)
        job.send_signal(number)
        assert job.wait(timeout=20) == 15
    finally:
        job.kill()
    assert "srun got TERM" in checkout.calls
    assert ("scontrol requeue 31234" in checkout.calls) == requeued


def test_slurm_passes_a_failure_on_without_requeue(checkout: Checkout) -> None:
    checkout.program("srun", "#!/bin/sh\nexit 9\n")
    checkout.program("scontrol", SCONTROL)
    done = checkout.run("launch/slurm.sbatch", SLURM_SUBMIT_DIR=str(checkout.root), **JOB)
    assert done.returncode == 9
    assert not any("requeue" in call for call in checkout.calls)


def test_slurm_must_be_submitted_from_the_repository(checkout: Checkout, tmp_path: Path) -> None:
    done = checkout.run("launch/slurm.sbatch", SLURM_SUBMIT_DIR=str(tmp_path / "bin"), **JOB)
    assert done.returncode == 2
    assert "is not the root of the repository: submit from there" in done.stderr


# --- with the real `ringattn train` and torchrun


@pytest.mark.slow
def test_two_agents_on_one_machine_meet(checkout: Checkout) -> None:
    """Two nodes of two ranks: every rank knows its place, node by node."""
    (checkout.root / "recipes").mkdir()
    (checkout.root / "recipes/train.py").write_text(
        "import os, sys\nprinted = '--cfg' in sys.argv\n"
        "names = ['RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE', 'GROUP_RANK']\n"
        "line = ' '.join(['place', *(os.environ.get(n, '') for n in names), *sys.argv[1:]])\n"
        "printed or os.write(1, f'{line}\\n'.encode())  # in one piece: the ranks share a pipe\n"
    )
    for name in ("ringattn", "configs"):
        (checkout.root / name).symlink_to(ROOT / name)
    checkout.program("python3", PYTHON.replace('"-m ringattn train"*', '"never"'))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    environment = checkout.environment(SATISFIED="0", NNODES="2", NPROC="2", ENDPOINT=endpoint, OMP_NUM_THREADS="1")
    agents = [
        subprocess.Popen(
            ["bash", "launch/torchrun.sh", "--node-rank", str(rank), "run.steps=1"],
            cwd=checkout.root,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (1, 0)
    ]
    try:
        text = "".join(agent.communicate(timeout=100)[0] for agent in agents)
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0]
    places = sorted(line.split()[1:] for line in text.splitlines() if line.startswith("place"))
    assert places == [[str(r), "4", str(r % 2), "2", str(r // 2), "run.steps=1"] for r in range(4)]

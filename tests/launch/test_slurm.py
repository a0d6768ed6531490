"""`launch/slurm.sbatch`: one torchrun a node, signals, and when it queues itself again."""

import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.launch.checkout import Checkout

SRUN = """#!/usr/bin/env bash
echo "srun $*" >>"$CALLS"
while [[ $1 == --* ]]; do shift; done
for node in 0 1; do
    SLURM_NODEID=$node "$@" &
done
wait
"""


FAILING_SRUN = """#!/bin/sh
echo "srun $*" >>"$CALLS"
exit "$SRUN_EXIT"
"""
PREEMPTED = "JobId=31234 JobState=RUNNING PreemptTime=2026-11-29T14:43:22 Partition=low"
NOT_PREEMPTED = "JobId=31234 JobState=RUNNING PreemptTime=None Partition=low"


WAITING_SRUN = """#!/usr/bin/env bash
echo ready >>"$CALLS"
for _ in {1..300}; do [ ! -e "$CALLS.stop" ] || exit 15; sleep 0.1; done
"""
SCANCEL = """#!/bin/sh
echo "scancel $*" >>"$CALLS"
touch "$CALLS.stop"
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


def started(checkout: Checkout, *arguments: str, srun: str = SRUN, scontrol: str = SCONTROL, **variables: str):
    checkout.program("srun", srun)
    checkout.program("scontrol", scontrol)
    return checkout.run("launch/slurm.sbatch", *arguments, SLURM_SUBMIT_DIR=str(checkout.root), **JOB | variables)


def test_slurm_looks_at_the_nodes_and_starts_one_torchrun_each_with_the_first_host_as_endpoint(
    checkout: Checkout,
) -> None:
    done = started(checkout, "a=1", "b=[2, 3]", PREFLIGHT_OPTIONS="--slow 70")
    assert done.returncode == 0, done.stderr
    assert checkout.calls[0] == "scontrol show hostnames node[7-8]"
    sruns = [call for call in checkout.calls if call.startswith("srun")]
    assert all(" --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=96 " in call for call in sruns)
    assert ["launch/preflight.sh" in call for call in sruns] == [True, False]
    looks = [call for call in checkout.calls if call.startswith("preflight")]
    assert looks == ["preflight --output /shared/run --hosts node7,node8 --slow 70"] * 2
    assert [call for call in checkout.calls if call.startswith("train")] == ["train a=1 b=[2, 3]"] * 2
    assert sorted(checkout.machines) == [
        f"NNODES=2 NODE_RANK={rank} ENDPOINT=node7:21234 JOB_ID=31234" for rank in range(2)
    ]


def test_slurm_does_not_train_on_nodes_that_are_not_fit(checkout: Checkout) -> None:
    done = started(checkout, srun=FAILING_SRUN, SRUN_EXIT="1", ENDING="failed yes 5")
    assert done.returncode == 1
    assert "the nodes cannot run this job" in done.stderr
    assert len([call for call in checkout.calls if call.startswith("srun")]) == 1
    assert not any("requeue" in call for call in checkout.calls)


@pytest.mark.parametrize(
    ("ending", "restarts", "state", "requeued"),
    [
        ("failed yes 40", "7", NOT_PREEMPTED, False),  # no further than before, again
        ("failed yes 40", "2", NOT_PREEMPTED, True),
        ("failed yes 41", "7", NOT_PREEMPTED, True),
        ("failed no 41", "0", NOT_PREEMPTED, False),
        ("stopped yes 41", "0", NOT_PREEMPTED, False),  # by somebody who knows why
        ("stopped yes 41", "9", PREEMPTED, True),
        ("unknown yes 0", "0", PREEMPTED, True),
        ("unknown yes 0", "0", NOT_PREEMPTED, False),
    ],
)
def test_slurm_requeues_by_how_the_run_ended(
    checkout: Checkout, ending: str, restarts: str, state: str, requeued: bool
) -> None:
    """Before, the newest checkpoint was of step 40; the stand-in answers 40 where no time is asked for."""
    before = checkout.bin / "python3"
    answer = 'case "$3" in "") echo "failed yes 40" ;; *) echo "$ENDING" ;; esac ;;'
    before.write_text(before.read_text().replace('echo "${ENDING:-unknown yes 0}" ;;', answer))
    scontrol = SCONTROL.replace("exit 0", f'[ "$2" != job ] || echo "{state}"\nexit 0')
    variables = {"PREFLIGHT": "off", "SRUN_EXIT": "9", "ENDING": ending, "SLURM_RESTART_COUNT": restarts}
    done = started(checkout, srun=FAILING_SRUN, scontrol=scontrol, **variables)
    assert done.returncode == 9
    assert ("scontrol requeue 31234" in checkout.calls) == requeued, done.stderr


def signalled(checkout: Checkout, number: signal.Signals, **variables: str) -> tuple[int, str]:
    """Exit code and messages of a job that is signalled while srun runs. With TERM, SLURM itself tells the ranks."""
    for name, text in (("srun", WAITING_SRUN), ("scontrol", SCONTROL), ("scancel", SCANCEL)):
        checkout.program(name, text)
    checkout.calls_file.write_text("")
    environment = checkout.environment(SLURM_SUBMIT_DIR=str(checkout.root), **JOB | variables)
    job = subprocess.Popen(
        ["bash", "launch/slurm.sbatch"], cwd=checkout.root, env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 20
        while "ready" not in checkout.calls and time.monotonic() < deadline:
            time.sleep(0.05)
        job.send_signal(number)
        if number == signal.SIGTERM:
            checkout.calls_file.with_name("calls.stop").touch()
        _, told = job.communicate(timeout=20)
    finally:
        job.kill()
    return job.returncode, told


@pytest.mark.parametrize(
    ("number", "ending", "requeued"),
    [
        (signal.SIGUSR1, "stopped yes 5", True),
        (signal.SIGUSR1, "unknown yes 0", True),
        (signal.SIGUSR1, "failed no 5", False),
        (signal.SIGTERM, "stopped yes 5", False),
    ],
)
def test_slurm_tells_the_ranks_and_requeues_at_the_time_limit(
    checkout: Checkout, number: signal.Signals, ending: str, requeued: bool
) -> None:
    code, told = signalled(checkout, number, PREFLIGHT="off", ENDING=ending)
    assert code == 15, told
    assert ("scancel --signal=TERM 31234" in checkout.calls) == (number == signal.SIGUSR1)
    assert ("scontrol requeue 31234" in checkout.calls) == requeued


def test_a_signal_while_the_nodes_are_looked_at_is_no_verdict_on_them(checkout: Checkout) -> None:
    code, told = signalled(checkout, signal.SIGTERM)
    assert code == 15
    assert "cannot run this job" not in told


def test_slurm_must_be_submitted_from_the_repository(checkout: Checkout, tmp_path: Path) -> None:
    done = checkout.run("launch/slurm.sbatch", SLURM_SUBMIT_DIR=str(tmp_path / "bin"), **JOB)
    assert done.returncode == 2
    assert "is not the root of the repository: submit from there" in done.stderr

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

"""`launch/slurm.sbatch` on a real SLURM: looked at, trained, preempted, requeued, finished; USR1; refused."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from ringattn.training.report.records import read_metrics
from tests.launch.cluster import Cluster, unavailable
from tests.training.forked import ROOT
from tests.training.test_runs import SMALL, STEPS, assert_same_curve, curve, run

why = unavailable()
pytestmark = pytest.mark.skipif(why is not None, reason=str(why))

LIMIT = 180  # seconds for what takes a fraction of it on an idle machine
JOB = ("--nodes=1", "--gpus-per-node=0", "--partition=low")
CHECKS = {"PREFLIGHT_OPTIONS": "--device cpu --slow 1 --free 1 --timeout 60"}
HERE = {"PYTHON": sys.executable, "NPROC": "2", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("slurm")) as one:
        yield one


def steps(output: Path) -> int:
    records = read_metrics(output / "metrics.jsonl") if (output / "metrics.jsonl").exists() else []
    return records[-1]["step"] if records else 0


@pytest.mark.nightly
def test_a_job_is_looked_at_preempted_requeued_and_finished(cluster, tmp_path):
    """Preempted by a job of a higher partition, with a time of grace for a checkpoint; the curve is of one run."""
    output, log, began = tmp_path / "run", tmp_path / "job.log", time.monotonic()
    overrides = [*SMALL, f"run.output={output}", "run.save_every=0"]
    job = cluster.submit(ROOT, log, *JOB, "launch/slurm.sbatch", *overrides, **HERE, **CHECKS)
    cluster.wait_for(lambda: steps(output) >= 5, LIMIT, "5 steps are not done", log)
    assert "A run can start." in log.read_text()
    other = cluster.submit(tmp_path, tmp_path / "other.log", "--partition=high", "--exclusive", "--wrap", "sleep 1")
    cluster.wait_for(lambda: cluster.job(other)["JobState"] == "COMPLETED", LIMIT, "the other job is not done", log)
    stopped = steps(output)
    assert stopped < STEPS, "the job was not preempted in time to show anything"
    assert [path.name for path in (output / "checkpoints").iterdir()] == [f"step-{stopped:08d}"]
    cluster.wait_for(lambda: cluster.job(job)["JobState"] == "COMPLETED", LIMIT, "the job is not done", log)
    assert cluster.job(job)["Restarts"] == "1"
    assert f"from step {stopped}" in log.read_text()
    print(f"preempted after step {stopped}, done after {time.monotonic() - began:.1f} s", file=sys.__stderr__)
    (tmp_path / "alone").mkdir()
    run(tmp_path / "alone", 2)
    assert_same_curve(curve(output), curve(tmp_path / "alone"))


@pytest.mark.nightly
def test_the_warning_before_the_time_limit_saves_and_requeues_and_a_cancelled_job_stays_so(cluster, tmp_path):
    """USR1 comes as SLURM sends it before the limit, here at once: time limits are of whole minutes."""
    output, log = tmp_path / "run", tmp_path / "job.log"
    overrides = [*SMALL, f"run.output={output}", "run.save_every=0", "run.steps=5000"]
    job = cluster.submit(ROOT, log, *JOB, "launch/slurm.sbatch", *overrides, **HERE, PREFLIGHT="off")
    cluster.wait_for(lambda: steps(output) >= 3, LIMIT, "3 steps are not done", log)
    cluster.call("scancel", "--batch", "--signal=USR1", job)
    cluster.wait_for(lambda: cluster.job(job)["Restarts"] == "1", LIMIT, "the job is not requeued", log)
    stopped = steps(output)
    assert "time limit: job" in log.read_text()
    assert [path.name for path in (output / "checkpoints").iterdir()] == [f"step-{stopped:08d}"]
    cluster.wait_for(lambda: steps(output) > stopped, LIMIT, "the job does not go on", log)
    cluster.call("scancel", job)
    cluster.wait_for(lambda: cluster.job(job)["JobState"] == "CANCELLED", LIMIT, "the job is not cancelled", log)
    time.sleep(3)
    assert cluster.job(job)["JobState"] == "CANCELLED"


@pytest.mark.nightly
def test_a_job_that_is_refused_is_not_requeued(cluster, tmp_path):
    log = tmp_path / "job.log"
    job = cluster.submit(
        ROOT, log, *JOB, "launch/slurm.sbatch", *SMALL, f"run.output={tmp_path / 'run'}", "parallel.ring=3", **HERE,
        PREFLIGHT="off",
    )  # fmt: skip
    cluster.wait_for(
        lambda: cluster.job(job)["JobState"] in ("FAILED", "COMPLETED"), LIMIT, "the job does not end", log
    )
    assert cluster.job(job)["JobState"] == "FAILED"
    assert "parallel.ring" in log.read_text()
    assert "goes back to the queue" not in log.read_text()

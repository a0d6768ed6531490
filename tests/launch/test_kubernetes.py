"""Manifests for Kubernetes and SkyPilot: what their schemas say, and that their parts fit each other and the recipe."""

import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir

from tests.launch.checkout import ROOT, Checkout

FOLDER = ROOT / "launch" / "kubernetes"
OLDEST = "1.31.0"  # podFailurePolicy is stable from here on
EXIT_CODES = {"done": 0, "failed": 1, "refused": 2, "stopped": 75}  # of ringattn train


def documents(name: str) -> dict[str, Any]:
    """The objects of a file by their kind."""
    found = list(yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8")))
    assert len({one["kind"] for one in found}) == len(found)
    return {one["kind"]: one for one in found}


def job_of_kubeflow() -> dict[str, Any]:
    """The Job that Kubeflow's JobSet would make of the runtime, as far as it is written there."""
    [replicated] = documents("trainjob.yaml")["TrainingRuntime"]["spec"]["template"]["spec"]["replicatedJobs"]
    metadata = {"name": replicated["name"], **replicated["template"].get("metadata", {})}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": replicated["template"]["spec"]}


JOBS = {"job.yaml": lambda: documents("job.yaml")["Job"], "trainjob.yaml": job_of_kubeflow}


@pytest.mark.parametrize("version", [OLDEST, "latest"])
def test_kubernetes_takes_every_object(version):
    """Of Kubeflow's own kinds, whose schemas are not Kubernetes', the Job that stands in them."""
    validator = pytest.importorskip("kubernetes_validate")
    wanted = validator.latest_version() if version == "latest" else version.rpartition(".")[0]
    for one in [*documents("job.yaml").values(), job_of_kubeflow()]:
        validator.validate(one, wanted, strict=True)
    broken = documents("job.yaml")["Job"]
    broken["spec"]["completionz"] = 2
    with pytest.raises(validator.ValidationError):
        validator.validate(broken, wanted, strict=True)


@pytest.mark.parametrize("name", JOBS)
def test_exit_codes_decide_what_is_started_again(name):
    """Only what would happen again ends a job for good; what the node did is not counted."""
    spec = JOBS[name]()["spec"]
    rules = spec["podFailurePolicy"]["rules"]
    [container] = spec["template"]["spec"]["containers"]
    ending = [rule["onExitCodes"]["values"] for rule in rules if rule["action"] == "FailJob"]
    assert ending == [[EXIT_CODES["refused"]]]
    assert {rule["onExitCodes"]["containerName"] for rule in rules if "onExitCodes" in rule} == {container["name"]}
    assert {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]} in rules
    assert spec["template"]["spec"]["restartPolicy"] == "Never"


@pytest.mark.parametrize("name", JOBS)
def test_pods_have_time_and_room(name):
    """To save a checkpoint before they are killed, and for what NCCL and copies of the state put into shared memory."""
    pod = JOBS[name]()["spec"]["template"]["spec"]
    [container] = pod["containers"]
    grace = yaml.safe_load((ROOT / "configs" / "run" / "default.yaml").read_text(encoding="utf-8")).get("grace", 170)
    assert pod["terminationGracePeriodSeconds"] >= math.ceil(grace) + 30
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    assert mounts["/runs"]["persistentVolumeClaim"]["claimName"] == "ringattn-runs"
    probe = container["startupProbe"]
    assert probe["exec"]["command"] == ["test", "/runs/llama/config.yaml", "-nt", "/tmp/started"]
    assert probe["periodSeconds"] * probe["failureThreshold"] > 900  # of start.sh's preflight


def test_pods_of_the_job_find_and_reach_each_other_and_nobody_else_does():
    found = documents("job.yaml")
    job, service, policy = found["Job"], found["Service"], found["NetworkPolicy"]
    pod = job["spec"]["template"]
    [container] = pod["spec"]["containers"]
    variables = {one["name"]: one.get("value") for one in container["env"]}
    port = service["spec"]["ports"][0]["port"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert pod["spec"]["subdomain"] == service["metadata"]["name"]
    assert variables["ENDPOINT"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}:{port}"
    assert int(variables["NNODES"]) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert job["spec"]["completionMode"] == "Indexed"
    labels = pod["metadata"]["labels"]
    assert service["spec"]["selector"] == policy["spec"]["podSelector"]["matchLabels"] == labels
    assert policy["spec"]["ingress"] == [{"from": [{"podSelector": {"matchLabels": labels}}]}]
    assert job_of_kubeflow()["spec"]["template"]["metadata"]["labels"] == labels
    claim = found["PersistentVolumeClaim"]
    assert claim["metadata"]["name"] == "ringattn-runs"
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


def test_the_train_job_names_its_runtime_and_as_many_nodes():
    found = documents("trainjob.yaml")
    runtime, job = found["TrainingRuntime"], found["TrainJob"]
    assert {one["apiVersion"] for one in found.values()} == {"trainer.kubeflow.org/v1alpha1"}
    assert job["spec"]["runtimeRef"] == {"kind": "TrainingRuntime", "name": runtime["metadata"]["name"]}
    assert job["spec"]["trainer"]["numNodes"] == runtime["spec"]["mlPolicy"]["numNodes"]
    assert job["spec"]["trainer"]["command"] == ["bash", "/opt/ringattn/launch/kubernetes/start.sh"]
    assert (FOLDER / "start.sh").is_file()


def overrides() -> dict[str, list[str]]:
    [container] = documents("job.yaml")["Job"]["spec"]["template"]["spec"]["containers"]
    sky = yaml.safe_load((ROOT / "launch" / "skypilot.yaml").read_text(encoding="utf-8"))
    line = next(line for line in sky["run"].splitlines() if "launch/torchrun.sh" in line)
    return {
        "job": container["args"],
        "trainjob": documents("trainjob.yaml")["TrainJob"]["spec"]["trainer"]["args"],
        "skypilot": [word.strip("'") for word in line.split()[2:]],
    }


def test_all_start_the_same_recipe_with_overrides_that_it_knows():
    found = overrides()
    assert found["job"] == found["trainjob"] == found["skypilot"]
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        cfg = compose("train", overrides=found["job"])
    assert cfg.run.output == "/runs/llama"


def test_skypilot_goes_on_after_what_may_come_further():
    sky = yaml.safe_load((ROOT / "launch" / "skypilot.yaml").read_text(encoding="utf-8"))
    again = sky["resources"]["job_recovery"]["recover_on_exit_codes"]
    assert again == [EXIT_CODES["failed"], EXIT_CODES["stopped"]]
    for script in ("setup", "run"):
        subprocess.run(["bash", "-n"], input=sky[script], text=True, check=True, timeout=20)


PYTHON = """#!/bin/sh
echo "$* NNODES=$NNODES NODE_RANK=$NODE_RANK ENDPOINT=$ENDPOINT PET=$(env | grep -c ^PET_)" >>"$CALLS"
case "$*" in *preflight*) exit "${PREFLIGHT_EXIT:-0}" ;; esac
"""
OF_JOB = {"NNODES": "2", "NODE_RANK": "1", "ENDPOINT": "ringattn-0.ringattn:29500"}
OF_KUBEFLOW = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "ringattn-0.ringattn"}
OF_KUBEFLOW |= {"PET_MASTER_PORT": "29500", "PET_NPROC_PER_NODE": "8"}
WHERE = "NNODES=2 NODE_RANK=1 ENDPOINT=ringattn-0.ringattn:29500 PET=0"


@pytest.mark.parametrize("variables", [OF_JOB, OF_KUBEFLOW], ids=["job", "kubeflow"])
def test_a_container_looks_and_then_trains(checkout: Checkout, variables: dict[str, str]) -> None:
    checkout.program("python", PYTHON)
    start = str(FOLDER / "start.sh")
    done = checkout.run(start, "a=[1, 2]", **variables)
    assert done.returncode == 0, done.stderr
    preflight, train = checkout.calls
    assert preflight == f"-m ringattn preflight --output /runs --timeout 900 {WHERE}"
    assert train == f"-m ringattn train a=[1, 2] {WHERE}"
    assert Path("/tmp/started").exists()
    assert checkout.run(start, PREFLIGHT_EXIT="1", **variables).returncode == 1
    assert len(checkout.calls) == 1
    assert checkout.run(start, PREFLIGHT="off", **variables).returncode == 0
    assert checkout.calls == [f"-m ringattn train {WHERE}"]


def test_a_container_without_a_place_says_what_is_missing(checkout: Checkout) -> None:
    checkout.program("python", PYTHON)
    done = checkout.run(str(FOLDER / "start.sh"), NNODES="2")
    assert done.returncode == 1
    assert "set NODE_RANK" in done.stderr
    assert checkout.calls == []

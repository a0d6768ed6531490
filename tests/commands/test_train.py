"""`ringattn train`: what it becomes, with what environment, and what it refuses. Whole runs: tests/test_wheel.py."""

import os
import re
import sys
from pathlib import Path

import pytest
import torch

from ringattn.cli import main
from ringattn.commands import _torchrun, train
from ringattn.training.health.launcher import Launcher
from tests.test_import import ROOT

RECIPE = str(ROOT / "recipes" / "train.py")
# Where the ranks of one machine meet: in a file of a temporary folder, and on the loopback.
ALONE = re.compile(
    "--nnodes 1 --rdzv-backend c10d --rdzv-endpoint .*/ringattn-.*/rendezvous --rdzv-conf store_type=file "
    "--local-addr 127.0.0.1 --rdzv-id ringattn"
)
SHARED = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
VARIABLES = ("NPROC", "NNODES", "NODE_RANK", "ENDPOINT", "JOB_ID", "OMP_NUM_THREADS", "PYTHONPATH", SHARED)

# It wants a file descriptor, which captured output has not.
pytestmark = pytest.mark.filterwarnings("ignore:Unable to enable fault handler")


class Became(Exception):
    """In place of torchrun."""


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that what the command sets is taken back
        monkeypatch.delenv(name)

    def run(launcher: Launcher) -> int:
        assert launcher.command[0] == sys.executable
        raise Became(launcher)

    monkeypatch.setattr(Launcher, "run", run)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # as the recipe sets it
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(train, "find_spec", lambda name: name)


def became(*arguments: str) -> str:
    with pytest.raises(Became) as caught:
        main(["train", *arguments])
    launcher = caught.value.args[0]
    return ALONE.sub("ALONE", " ".join(launcher.command[1:]).replace("--shutdown-timeout 170 ", ""))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["train", *arguments])
    assert caught.value.code == 2
    return capsys.readouterr().err


# --- ranks


def test_two_ranks_on_the_cpu_share_its_cores(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(7)), raising=False)
    assert became() == f"-m ringattn.commands._agent ALONE --nproc-per-node 2 {RECIPE}"
    assert os.environ[SHARED] == "1"
    assert os.environ["OMP_NUM_THREADS"] == "3"
    assert capsys.readouterr().err == "ringattn: 0 GPUs: 2 ranks\n"
    became("--nproc", "9")
    assert os.environ["OMP_NUM_THREADS"] == "3"  # what is set stays


def test_more_ranks_than_cores_have_a_thread_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    became("--nproc", "3")
    assert os.environ["OMP_NUM_THREADS"] == "1"


def test_one_rank_for_each_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for there in (False, True):
        monkeypatch.setattr(_torchrun, "installed", lambda name, there=there: there and name == "flash-attn-4")
        assert "--nproc-per-node 4 " in became()
        told = capsys.readouterr().err
        assert told.startswith("ringattn: 4 GPUs: 4 ranks\n")
        assert ("FlashAttention 4 is not installed" in told) is not there


def test_the_number_of_ranks_is_the_options_or_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPROC", "3")
    assert "--nproc-per-node 3 " in became()
    assert "--nproc-per-node 5 " in became("--nproc", "5")
    assert "--nproc-per-node 6 " in became("--nproc-per-node=6")


@pytest.mark.parametrize("wrong", ["0", "two", "-1"])
def test_a_wrong_number_of_ranks_is_refused(
    wrong: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    message = f"--nproc/--nproc-per-node: expected an integer from 1 to 4096, got '{wrong}'"
    assert message in refused(capsys, "--nproc", wrong)
    monkeypatch.setenv("NPROC", wrong)
    assert message in refused(capsys)


def test_ranks_of_a_checkout_find_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    became()
    assert os.environ["PYTHONPATH"] == str(ROOT)
    monkeypatch.setenv("PYTHONPATH", "/a")
    became()
    assert os.environ["PYTHONPATH"] == os.pathsep.join([str(ROOT), "/a"])


# --- the configuration


def test_overrides_and_options_may_stand_in_any_order() -> None:
    command = became("run.steps=3", "--nproc", "2", "+model.config.x='a b'", "~optim.eps")
    assert command.endswith(f" {RECIPE} run.steps=3 +model.config.x='a b' ~optim.eps")
    assert became("--nproc", "2", "--", "run.steps=3").endswith(f" {RECIPE} run.steps=3")


def test_a_wrong_override_is_one_error_before_any_rank_starts(capsys: pytest.CaptureFixture[str]) -> None:
    told = refused(capsys, "run.stepz=3")
    assert told.startswith("error: Could not override 'run.stepz'.\nThere is no key 'run.stepz'; did you mean")
    told = refused(capsys, "model=huge")
    assert told.startswith("error: ")
    assert "Could not find 'model/huge'" in told


def test_own_files_stand_beside_the_shipped_ones_and_over_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "own.yaml").write_text("name: own\n")
    (tmp_path / "mine.yaml").write_text("defaults: [train, _self_]\nrun: {steps: 7}\n")
    own = ("--config-dir", str(tmp_path))
    command = became(*own, "--config-name", "mine", "model=own")
    assert command.endswith(
        f"{RECIPE} --config-name mine --config-path {tmp_path} --config-dir {ROOT / 'configs'} model=own"
    )
    (tmp_path / "optim").mkdir()
    (tmp_path / "optim" / "adamw.yaml").write_text("name: of-mine\n")
    assert main(["train", *own, "--config-name", "mine", "model=own", "--cfg", "job"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("model:\n  name: own\ndata:\n  name: stdlib\n")
    assert "\noptim:\n  name: of-mine\nengine:\n" in out
    assert "\nrun:\n  steps: 7\n  seed: 0\n" in out
    assert "Could not override 'optim.eps'" in refused(capsys, *own, "optim.eps=1")
    assert "Cannot find primary config 'other'" in refused(capsys, *own, "--config-name", "other")


def test_what_is_printed_starts_no_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, begin, part in (
        (("--cfg", "job", "run.steps=3"), "model:\n  name: tiny\n", "\nrun:\n  steps: 3\n"),
        (("-c", "job", "-p", "run", "--resolve"), "# @package run\nsteps: 160\n", "output: outputs/tiny-stdlib\n"),
        (("run.steps=3", "--info", "defaults"), "", "| run/default "),
    ):
        assert main(["train", *arguments]) == 0
        out = capsys.readouterr().out
        assert out.startswith(begin)
        assert part in out
    assert refused(capsys, "--cfg", "job", "run.stepz=3").startswith("error: Could not override 'run.stepz'.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--nodse 2", "unrecognized arguments: --nodse"),
        ("--multirun run.seed=1,2", "unrecognized arguments: --multirun"),
        ("--config-dir /nowhere", "argument --config-dir: expected a folder, got '/nowhere'"),
        ("--cfg job --info all", "--cfg and --info exclude each other"),
        ("--resolve", "--package and --resolve go with --cfg only"),
        ("--cfg every", "argument --cfg/-c: invalid choice: 'every'"),
    ],
)
def test_wrong_options(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(capsys, *arguments.split()).splitlines()[-1]


def test_without_transformers_only_the_configuration_is_to_be_had(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "find_spec", lambda name: None)
    assert refused(capsys).endswith(
        "training needs transformers, which is not installed: pip install 'ringattn[train]'\n"
    )
    assert main(["train", "--cfg", "job"]) == 0


# --- several machines


def test_machines_by_options_and_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    by_options = became("--nodes", "2", "--node-rank", "1", "--endpoint", "a:29400", "--nproc", "4", "--id", "x")
    assert by_options == (
        "-m ringattn.commands._agent --nnodes 2 --rdzv-backend c10d --rdzv-endpoint a:29400 --rdzv-conf is_host=false "
        f"--rdzv-id x --nproc-per-node 4 {RECIPE}"
    )
    for name, value in {"NNODES": "2", "NODE_RANK": "1", "ENDPOINT": "a:29400", "NPROC": "4", "JOB_ID": "x"}.items():
        monkeypatch.setenv(name, value)
    assert became() == by_options
    assert "is_host=true" in became("--node-rank", "0")
    monkeypatch.delenv("JOB_ID")
    assert "--rdzv-id ringattn " in became()
    monkeypatch.delenv("NNODES")
    assert "ALONE" in became()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--nodes 2", "missing: --node-rank (or NODE_RANK) --endpoint (or ENDPOINT)"),
        ("--nodes 2 --endpoint a:1", "missing: --node-rank (or NODE_RANK)"),
        ("--node-rank 0 --endpoint a:1", "missing: --nodes (or NNODES)"),
        ("--nodes two --node-rank 0 --endpoint a:1", "--nodes: expected an integer from 1 to 4096, got 'two'"),
        ("--nodes 2 --node-rank 2 --endpoint a:1", "must be an integer from 0 to 1 for --nodes 2, got '2'"),
        ("--nodes 2:1 --node-rank 0 --endpoint a:1", "expected MIN:MAX, got '2:1'"),
        ("--nodes 1:2 --node-rank 1 --endpoint a:1", "--nodes 1:2 lets a run go on with fewer machines, which needs"),
        ("--max-restarts -1", "expected an integer of at least 0, got '-1'"),
        ("run.grace=0", "run.grace must be a number of seconds of at least 1, got 0"),
        ("--nodes 2 --node-rank 0 --endpoint a", "--endpoint must be HOST:PORT, got 'a'"),
        ("--nodes 2 --node-rank", "--node-rank: expected one argument"),
    ],
)
def test_machines_that_cannot_meet(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(capsys, *arguments.split()).splitlines()[-1]


def test_machines_may_be_fewer_and_ranks_start_again() -> None:
    where = ("--node-rank", "1", "--endpoint", "a:29400")
    command = became("--nodes", "1:2", *where, "--max-restarts", "3", "run.elastic=true", "--nproc", "2")
    assert "--nnodes 1:2 --rdzv-backend c10d" in command
    assert f"--max-restarts 3 {RECIPE}" in command
    assert "--max-restarts" not in became()


def test_torchrun_waits_as_long_as_the_ranks_may_take() -> None:
    with pytest.raises(Became) as caught:
        main(["train", "run.grace=40", "run.output=/tmp/x/y"])
    launcher = caught.value.args[0]
    assert launcher.grace == 40
    assert launcher.output == Path("/tmp/x/y")
    options = train.patience(40.2)
    assert options in ([], ["--shutdown-timeout", "41"])
    assert all(option in launcher.command for option in train.patience(40))

"""`ringattn preflight`: what it is told, and whole runs of it on one machine."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ringattn.cli import main, make_parser
from ringattn.commands.preflight import expected, options_of, place, render
from tests.training.forked import ROOT
from tests.training.test_runs import free_port

LIMIT = 120


def parsed(*arguments: str) -> Any:
    return make_parser().parse_args(["preflight", *arguments])


@pytest.mark.parametrize(
    ("arguments", "variables", "found"),
    [
        ((), {}, (0, 1, None, "ringattn")),
        (("--nodes", "2", "--node-rank", "1", "--endpoint", "a:1"), {}, (1, 2, "a:1", "ringattn")),
        ((), {"NNODES": "4", "NODE_RANK": "3", "ENDPOINT": "[::1]:9", "JOB_ID": "x"}, (3, 4, "[::1]:9", "x")),
        (("--id", "y"), {"NNODES": "1", "NODE_RANK": "0", "ENDPOINT": "b:2", "JOB_ID": "x"}, (0, 1, "b:2", "y")),
        (
            (),
            {
                "SLURM_STEP_NODELIST": "gpu[7-8]",
                "SLURM_STEP_NUM_NODES": "2",
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_NODEID": "1",
                "SLURM_JOB_ID": "2705",
            },
            (1, 2, "gpu7:30005", "2705"),
        ),
    ],
)
def test_where_a_node_stands_is_told_by_options_then_variables_then_slurm(arguments, variables, found):
    assert place(parsed(*arguments), variables) == found


@pytest.mark.parametrize(
    ("arguments", "variables", "words"),
    [
        (("--nodes", "2", "--node-rank", "2", "--endpoint", "a:1"), {}, "--node-rank (or NODE_RANK) must be"),
        (("--nodes", "2", "--endpoint", "a:1"), {}, "integer from 0 to 1, got ''"),
        (("--nodes", "2", "--node-rank", "0", "--endpoint", "a"), {}, "must be HOST:PORT, got 'a'"),
        (("--endpoint", "a:1"), {}, "missing: --nodes"),
        ((), {"NNODES": "two"}, "NNODES must be an integer from 1 to 4096, got 'two'"),
        (("--id", "a/../b"), {}, "--id must be of letters"),
        ((), {"TORCHELASTIC_RUN_ID": "none"}, "without torchrun"),
        (
            (),
            {"SLURM_STEP_NODELIST": "a", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "8"},
            "one task on each node",
        ),
    ],
)
def test_what_cannot_be_is_refused(arguments, variables, words, capsys):
    with pytest.raises(SystemExit) as refused:
        place(parsed(*arguments), variables)
    assert refused.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--hosts", "a,b"), "--hosts must name 1 nodes, got 2"),
        (("--machine", "nowhere"), "--machine must be H200, H100, A100, CPU or the path"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(arguments, words, capsys):
    with pytest.raises(SystemExit) as refused:
        options_of(parsed("--device", "cpu", *arguments), (0, 1, None, "x"))
    assert refused.value.code == 2
    assert words in capsys.readouterr().err


def test_speeds_of_cpus_are_expected_only_where_they_were_named(monkeypatch, tmp_path):
    monkeypatch.setenv("RINGATTN_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("RINGATTN_MACHINE", raising=False)
    assert expected(None, "cpu") is None
    assert expected("CPU", "cpu").name == "CPU"
    monkeypatch.setenv("RINGATTN_MACHINE", "H100")
    assert expected(None, "cpu").name == "H100"


def test_the_page_ends_with_what_is_wrong():
    problem = {"text": "node 1 (b) did not come, or stopped answering", "nodes": [1]}
    checks = [
        {"name": "nodes", "seen": "1 of 2", "problems": [problem], "remarks": []},
        {"name": "versions", "seen": "torch 9", "problems": [], "remarks": []},
    ]
    page = render({"checks": checks, "ok": False}, 2).splitlines()
    assert page[0] == "Preflight of 2 nodes"
    assert page[-3:] == ["  - node 1 (b) did not come, or stopped answering", "", "1 found: mend or leave out."]


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a machine without a GPU")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(SystemExit) as refused:
        main(["preflight", "--device", "cuda"])
    assert refused.value.code == 2


def started(tmp_path: Path, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "ringattn", "preflight", "--device", "cpu", "--slow", "1", "--free", "1"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    return subprocess.Popen(
        [*command, "--output", str(tmp_path / "out"), *arguments],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT), "RINGATTN_CACHE_DIR": str(tmp_path / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.nightly
def test_a_machine_alone_passes_and_leaves_nothing(tmp_path):
    done = started(tmp_path, "--json")
    out, err = done.communicate(timeout=LIMIT)
    assert done.returncode == 0, out + err
    found = json.loads(out)
    assert found["ok"]
    assert [len(rank["links"]) for rank in found["nodes"]["0"]["ranks"]] == [1, 1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.nightly
def test_nodes_meet_and_the_one_that_does_not_come_is_named(tmp_path):
    """Two of three come, on one machine; both say that something is wrong, and the first what."""
    where = ("--nodes", "3", "--endpoint", f"127.0.0.1:{free_port()}", "--hosts", "red,green,blue", "--timeout", "15")
    nodes = [started(tmp_path, *where, "--node-rank", str(node)) for node in (2, 0)]
    (_, _), (page, _) = [node.communicate(timeout=LIMIT) for node in nodes]
    assert [node.returncode for node in nodes] == [1, 1]
    assert "  - node 1 (green) did not come, or stopped answering\n" in page
    assert "links between  ok         2 pairs" in page, page
    assert "every node reaches every other" in page
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.nightly
def test_without_node_0_a_node_gives_up_and_says_so(tmp_path):
    port = free_port()
    node = started(tmp_path, "--nodes", "2", "--node-rank", "1", "--endpoint", f"127.0.0.1:{port}", "--timeout", "2")
    out, err = node.communicate(timeout=LIMIT)
    assert node.returncode == 1
    assert out == ""
    assert f"node 0 does not answer at 127.0.0.1:{port} within 2 s" in err

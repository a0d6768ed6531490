"""The console script: what a person and a program read, and the exit codes."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ringattn.cli import join_negative, main
from ringattn.commands import _machine
from ringattn.kernels import registry
from ringattn.kernels.registry import explain
from ringattn.kernels.spec import CallSpec
from ringattn.kernels.tuning import tuned_backend
from tests.caches import clear_caches
from tests.test_import import ROOT

SMALL = ["--heads", "4/2", "--head-dim", "16", "--device", "cpu"]
TOPOLOGY = """\
\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\x1b[0m
GPU0\t X \tNV18\tSYS\tPIX\t0-31
GPU1\tNV18\t X \tSYS\tNODE\t0-31
GPU2\tSYS\tSYS\t X \tNODE\t32-63
NIC0\tPIX\tNODE\tNODE\t X

Legend:
"""


@pytest.fixture(autouse=True)
def no_choice(monkeypatch: pytest.MonkeyPatch, fresh_caches: None) -> None:
    for name in [name for name in os.environ if name.startswith("RINGATTN_")]:
        monkeypatch.delenv(name)


def report(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, dict[str, Any]]:
    code = main(["doctor", *SMALL, "--json", *argv])
    return code, json.loads(capsys.readouterr().out)


def test_doctor_agrees_with_the_registry(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, spec in (
        ([], CallSpec("cpu", torch.bfloat16, 16, 16, 4, 2)),
        (["--softcap", "30", "--dtype", "float32"], CallSpec("cpu", torch.float32, 16, 16, 4, 2, softcap=30.0)),
        (["--value-dim", "8", "--window", "-1,0"], CallSpec("cpu", torch.bfloat16, 16, 8, 4, 2, window=True)),
    ):
        code, found = report(capsys, *argv)
        assert code == 0
        assert {row["name"]: row["accepted"] for row in found["backends"]} == {
            name: reason is None for name, reason in explain(spec).items()
        }
        assert found["auto"] == registry.choose(spec).name
        assert all((row["stage"] is None) == (row["reason"] is None) == row["accepted"] for row in found["backends"])


def test_doctor_is_readable_in_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *SMALL, "--window", "7,0", "--softcap", "30", "--deterministic"]) == 0
    text = capsys.readouterr().out
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "heads 4/2, head dim 16, window 7,0, softcap 30, deterministic" in text
    assert text.rstrip().endswith("this call can be trained.")
    for name in registry.backends():
        assert f"\n  {name}" in text


def test_the_backend_of_the_environment_is_what_auto_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for value, code, auto in (("reference", 0, "reference"), ("fa4", 1, None), ("nope", 1, None)):
        monkeypatch.setenv("RINGATTN_BACKEND", value)
        got, found = report(capsys)
        assert (got, found["auto"]) == (code, auto)
        assert f"RINGATTN_BACKEND={value}" in found["warnings"][0]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--heads", "6/4"),
        ("--heads", "8/"),
        ("--heads", "0"),
        ("--head-dim", "0"),
        ("--value-dim", "x"),
        ("--window", "4"),
        ("--window", "-2,0"),
        ("--softcap", "-1"),
        ("--softcap", "nan"),
        ("--dropout", "1"),
        ("--dtype", "int8"),
        ("--device", "tpu"),
    ],
)
def test_a_wrong_value_is_one_error_that_names_the_option(
    option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["doctor", option, value])
    assert caught.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"ringattn doctor: error: argument {option}: ")
    assert value in last


def test_negative_values_belong_to_the_option_before() -> None:
    assert join_negative(["doctor", "--window", "-1,0", "--json"]) == ["doctor", "--window=-1,0", "--json"]
    assert join_negative(["--softcap", "-1", "-h"]) == ["--softcap=-1", "-h"]
    assert join_negative(["-1,0"]) == ["-1,0"]


def test_help_loads_no_kernel_package() -> None:
    """Whatever torch itself loads is not ours to forbid."""
    statement = (
        "import sys, torch\nbefore = set(sys.modules)\nimport ringattn.cli\n"
        "try: ringattn.cli.main(['doctor', '--help'])\nexcept SystemExit: pass\n"
        "print('LOADED', *sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    done = subprocess.run([sys.executable, "-c", statement], cwd=ROOT, capture_output=True, text=True, timeout=120)
    shown, _, loaded = done.stdout.partition("LOADED")
    assert "--softcap" in shown
    assert "ringattn" in loaded.split()
    assert not set(loaded.split()) & {"flash_attn", "flash_attn_interface", "triton", "xformers", "transformers"}


def test_the_module_runs_as_the_script_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["ringattn", "--help"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("ringattn", run_name="__main__")
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "doctor" in shown
    assert "tune" in shown


def test_links_are_read_from_the_topology_matrix() -> None:
    kinds = _machine.topology(TOPOLOGY)
    assert (kinds[0, 1], kinds[0, 2], kinds[1, 2]) == ("NV18", "SYS", "SYS")
    assert max(column for _, column in kinds) == 3
    assert _machine.topology("") == {}


def test_gpus_and_links_are_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    device = SimpleNamespace(name="H200", total_memory=139 * 2**30, major=9, minor=0)
    monkeypatch.setattr(_machine, "gpus", lambda: [gpu(i, device) for i in range(3)])
    monkeypatch.setattr(_machine, "_run", lambda *command: TOPOLOGY if "topo" in command else "570.1\n")
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: {a, b} == {0, 1})
    assert main(["doctor", *SMALL]) == 0
    text = capsys.readouterr().out
    assert "0  H200, 139.0 GiB, compute capability 9.0" in text
    assert "links  NV18, peer access: 0-1 (1)" in text
    assert "links  SYS, no peer access: 0-2 1-2 (2)" in text
    assert "driver 570.1" in text


def gpu(index: int, device: Any) -> dict[str, Any]:
    memory = device.total_memory / 2**30
    return {"index": index, "name": device.name, "memory_gib": memory, "compute_capability": "9.0"}


def test_tune_measures_and_keeps_the_fastest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("RINGATTN_CACHE_DIR", str(tmp_path))
    argv = ["tune", *SMALL, "--dtype", "float32", "--length", "64", "--documents", "2"]
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["best"] == {"backend": "cpu"}
    assert Path(found["stored"]).parent == tmp_path
    assert [row["choice"] for row in found["tried"] if row["result"] == "timed"] == [{"backend": "cpu"}]
    assert main(argv) == 0
    assert "fastest: cpu; kept in" in capsys.readouterr().out
    assert main([*argv, "--what", "flex"]) == 1
    assert "No candidate can do this call." in capsys.readouterr().out

    clear_caches()
    events = tuned_backend.tuner().listeners
    kinds: list[str] = []
    events.append(lambda event: kinds.append(event.kind))
    spec = CallSpec("cpu", torch.float32, 16, 16, 4, 2)
    assert tuned_backend.tuned_backend(spec, [65, 63]).name == "cpu"
    assert kinds == ["disk"]

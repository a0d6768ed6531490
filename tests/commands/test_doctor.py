"""`ringattn doctor`: the first thing that is missing, and whether anything can train."""

import json
from typing import Any

import pytest
import torch

from ringattn.cli import main
from ringattn.commands import doctor
from ringattn.kernels import registry, selftest
from ringattn.kernels.backends.fa4 import FlashAttention4
from ringattn.kernels.spec import CallSpec, Capability
from tests.recurrent.fake_packages import install


@pytest.fixture(autouse=True)
def nothing_asked_for(monkeypatch: pytest.MonkeyPatch, fresh_caches: None) -> None:
    """The environment names no backend."""
    monkeypatch.delenv("RINGATTN_BACKEND", raising=False)


class Ladder:
    """A backend that can be stopped at each rung."""

    name = "ladder"
    capability = Capability(devices=("cuda",), compute_capability=((9, 0), (99, 0)))
    absent: str | None = None

    def missing(self) -> str | None:
        return self.absent


RUNGS = [
    ("package", "is not installed: pip install it"),
    ("package", "is installed but its forward lacks softcap"),
    ("device", "needs a CUDA device for this call, and there is none"),
    ("capability", "needs compute capability 9.0 to below 99.0, got 8.0"),
    ("call", "has no softcap"),
    ("self-test", "is wrong at head dims 80/80 (relative error of dv 1)"),
]


@pytest.mark.parametrize("rung", range(len(RUNGS)), ids=[f"{stage}-{why.split()[1]}" for stage, why in RUNGS])
def test_the_first_missing_rung_is_told(monkeypatch: pytest.MonkeyPatch, rung: int) -> None:
    """Every rung after the first missing one is missing too, and is not told."""
    backend: Any = Ladder()
    backend.absent = RUNGS[rung][1] if rung < 2 else None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: rung > 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0) if rung <= 3 else (9, 0))
    monkeypatch.setattr(selftest, "failure", lambda backend, spec: RUNGS[5][1])
    spec = CallSpec("cuda", torch.bfloat16, 80, 80, 4, 2, softcap=30.0 if rung <= 4 else 0.0)
    assert doctor.diagnose(backend, spec) == RUNGS[rung]


def test_a_backend_that_passes_every_rung_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(selftest, "failure", lambda backend, spec: None)
    backend: Any = Ladder()
    assert doctor.diagnose(backend, CallSpec("cuda", torch.bfloat16, 64, 64, 4, 2)) is None


def test_a_wrong_device_is_told_by_what_the_backend_runs_on() -> None:
    if FlashAttention4().missing() is None:
        pytest.skip("asks for a machine without the package")
    cpu = next(backend for backend in registry.builtin() if backend.name == "cpu")
    stage, reason = doctor.diagnose(cpu, CallSpec("cuda", torch.float32, 16, 16, 4, 2)) or ("", "")
    assert (stage, reason) == ("device", "runs on cpu tensors only, got cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a machine without a GPU")
def test_the_doctor_fails_where_nothing_can_train(capsys: pytest.CaptureFixture[str]) -> None:
    call = ["doctor", "--heads", "4/2", "--head-dim", "16", "--device", "cuda"]
    assert main([*call, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["auto"] is None
    assert not any(row["accepted"] for row in found["backends"])
    assert main(call) == 1
    assert capsys.readouterr().out.endswith("cannot be trained here: no backend does it exactly.\n")


def test_the_reference_on_gpus_counts_with_a_warning() -> None:
    findings = [
        {"name": "fa4", "accepted": False, "stage": "call", "reason": "has no dropout"},
        {"name": "reference", "accepted": True, "stage": None, "reason": None},
    ]
    picked = doctor.pick(findings)
    assert picked["auto"] == "reference"
    assert "many times slower" in doctor.warnings_of("cuda", picked)[0]
    assert doctor.warnings_of("cpu", picked) == []


def test_kernels_of_layers_with_a_state(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    small = [
        "--device",
        "cpu",
        "--heads",
        "4/2",
        "--head-dim",
        "16",
        "--recurrent-heads",
        "4/2",
        "--recurrent-dim",
        "8",
    ]
    assert main(["doctor", *small]) == 0
    assert "delta rule" not in capsys.readouterr().out
    assert main(["doctor", *small, "--recurrent", "delta"]) == 0
    told = capsys.readouterr().out
    assert (
        "Kernels for delta rule with a decay a head, 2 key heads of 8 and 4 value heads of 8, bfloat16 on cpu" in told
    )
    assert "call: runs on cuda tensors only, got cpu" in told
    install(monkeypatch)
    for rule, accepted in (("delta", ["fla", "torch", "tokens"]), ("mamba2", ["mamba", "fla", "torch", "tokens"])):
        assert main(["doctor", *small, "--recurrent", rule, "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)["recurrent"]["kernels"]
        assert [row["name"] for row in rows if row["accepted"]] == accepted
        assert all(row["stage"] == "call" for row in rows if not row["accepted"])

"""`ringattn memory`: the tables for people and programs, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from ringattn.cli import main
from ringattn.memory.planning.choice import plan_run
from ringattn.memory.planning.limits import GIB, Limits
from ringattn.memory.planning.shapes import RunShape
from tests.memory.planning.shapes_of import llama_8b

CALL = ["memory", "--machine", "H200", "--gpus", "2", "--ring", "2", "--layers", "8"]


def report(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert main([*CALL, *argv, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([*CALL, *argv])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_it_says_what_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, "--seq-len", "128K", "--keep", "attention", "--host-memory", "256", "--mlp-tile", "none")
    fixed = {"keep": "attention", "mlp_tile": None}
    choice = plan_run(llama_8b(8), RunShape(131072, ring=2, fused=True), fixed, Limits(140 * GIB, 256 * GIB))
    assert found["settings"] == choice.settled.values
    assert found["fixed"] == ["keep", "mlp_tile"]
    assert found["memory"]["backward"]["total"] == choice.plan.peak("backward").total
    for phase in found["memory"].values():
        assert phase["total"] == sum(phase["items"].values())
    assert found["seconds"] == choice.time.items
    assert found["run"]["local_tokens"] == 65536 + 128
    assert {one["key"] for one in found["alternatives"]} == {"loss_tile", "every", "states_on", "reshard", "prefetch"}


def test_margin_and_compiler_count(capsys: pytest.CaptureFixture[str]) -> None:
    usual = report(capsys, "--seq-len", "128K", "--keep", "attention")
    assert usual["memory"] != report(capsys, "--seq-len", "128K", "--keep", "attention", "--compile", "none")["memory"]
    wide = report(capsys, "--seq-len", "128K", "--keep", "attention", "--margin", "0.25")["limits"]["device"]
    assert usual["limits"]["device"] - wide == pytest.approx(0.2 * 140 * GIB)
    with pytest.raises(SystemExit):
        main([*CALL, "--seq-len", "128K", "--margin", "1"])
    assert "expected a share, a number from 0 up to 1, got '1'" in capsys.readouterr().err


def test_people_get_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*CALL, "--seq-len", "65536"]) == 0
    text = capsys.readouterr().out
    for word in ("llama_8b: 2.8", "65,536 tokens", "kept by layers", "matrix products", "MFU", "Instead", "limits:"):
        assert word in text


def test_open_degrees_and_the_longest(capsys: pytest.CaptureFixture[str]) -> None:
    open_ones = ["memory", "--machine", "H200", "--gpus", "4", "--model", "tiny", "--json"]
    assert main([*open_ones, "--seq-len", "8192"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["run"]["ring"] * found["run"]["ulysses"] == 4
    assert main([*open_ones, "--longest", "--gpu-memory", "4"]) == 0
    tokens = json.loads(capsys.readouterr().out)["run"]["tokens"]
    assert tokens % 4096 == 0
    with pytest.raises(SystemExit):
        main([*open_ones, "--seq-len", str(int(tokens * 1.03)), "--gpu-memory", "4"])
    assert "do not fit 4 GPUs" in capsys.readouterr().err


def test_open_chunks_are_chosen_where_one_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["--keep", "layer", "--mlp-tile", "4096", "--loss-tile", "1024", "--states-on", "host", "--every", "1"]
    one = report(capsys, "--longest", "--head-chunks", "1", *quick)
    assert (one["run"]["head_chunks"], "head_chunks" in one["fixed"]) == (1, True)
    found = report(capsys, "--longest", *quick)
    assert found["run"]["tokens"] > one["run"]["tokens"]
    assert found["run"]["head_chunks"] > 1
    assert "head_chunks" not in found["fixed"]
    assert {a["value"] for a in found["alternatives"] if a["key"] == "head_chunks"} < {1, 2, 4, 8}
    asked = str(found["run"]["tokens"])
    told = refused(capsys, "--seq-len", asked, "--head-chunks", "1", *quick)
    assert "it would fit with parallel.head_chunks=" in told
    assert main([*CALL, "--seq-len", asked, "--head-chunks", "8", *quick]) == 0
    assert "head_chunks=8*" in capsys.readouterr().out


def test_a_folder_of_a_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from transformers import Qwen3Config

    Qwen3Config(hidden_size=64, intermediate_size=96, num_hidden_layers=3, vocab_size=97).save_pretrained(tmp_path)
    assert main(["memory", "--machine", "H200", "--model", str(tmp_path), "--seq-len", "4096", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"]["name"] == tmp_path.name
    assert found["model"]["layers"] == 3


def test_a_picture(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "new" / "memory.png"
    assert main([*CALL, "--seq-len", "32K", "--states-on", "host", "--draw", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--seq-len", "1.5M"], "expected tokens from 1"),
        ([], "expected --seq-len, or --longest"),
        (["--seq-len", "1M", "--longest"], "expected --seq-len, or --longest"),
        (["--seq-len", "1M", "--model", "gpt9"], "llama_8b, qwen3_8b, tiny or the folder"),
        (["--seq-len", "1M", "--gpu-memory", "0"], "expected GiB"),
        (["--seq-len", "1M", "--loss-tile", "0"], "expected tokens from 1"),
        (["--seq-len", "1M", "--every", "0"], "every must be an integer of at least 1"),
        (["--seq-len", "1M", "--gpus", "3"], "--gpus 3"),
        (["--seq-len", "4M"], "do not fit 2 GPUs"),
        (["--seq-len", "1M", "--head-chunks", "3"], "--head-chunks 3 must divide the key heads of a rank"),
        (
            ["--seq-len", "1M", "--ring", "1", "--ulysses", "2", "--head-chunks", "8"],
            "with ulysses 2 there may be 1, 2, 4",
        ),
        (["--seq-len", "1M", "--keep", "all", "--host-layers", "2"], "host_layers=2"),
    ],
)
def test_wrong_options_are_named(capsys: pytest.CaptureFixture[str], argv: list[str], told: str) -> None:
    assert told in refused(capsys, *argv)


def test_names_of_machines_are_taken_in_any_case(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["memory", "--model", "tiny", "--gpus", "2", "--seq-len", "4096", "--json", "--machine"]
    told = []
    for name in ("A100", "a100"):
        assert main([*argv, name]) == 0
        told.append(json.loads(capsys.readouterr().out))
    assert told[0] == told[1]
    assert told[0]["machine"]["name"] == "A100"

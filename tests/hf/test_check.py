"""`ringattn check`: what it prints and returns, for models that are exact, refused, or wrong."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("transformers")

from ringattn.cli import main
from ringattn.commands.check import render
from ringattn.hf.check import Finding, Request, examine
from ringattn.hf.tiny import read_config, tiny_config
from ringattn.mask import Mask
from tests.parallel.ranks import mesh_of
from tests.pool import Pools


def test_an_exact_model_in_processes_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_config(read_config("granite_swa"), vocab_size=50).save_pretrained(tmp_path)
    assert main(["check", "--model", str(tmp_path), "--ring", "2", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert all(finding["ok"] for finding in findings)
    names = [finding["name"] for finding in findings]
    assert {"supported", "attention once per layer", "sinks in use", "window in use"} <= set(names)
    assert sum(name.endswith("= documents alone") for name in names) == 6
    assert sum(name.startswith("no leak") for name in names) == 3


def test_wrong_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, words in (
        (["--model", "no_such_model"], "got 'no_such_model'"),
        (["--model", "llama", "--real"], "--real needs a folder"),
        (["--model", "llama", "--ring", "0"], "integer >= 1"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["check", *argv])
        assert words in capsys.readouterr().err


def findings_of(request: Request, sabotage: str | None) -> list[Finding]:
    mesh = mesh_of(request.ring, request.ulysses)
    if sabotage is None:
        return list(examine(request, mesh))
    target, change = SABOTAGE[sabotage]
    with mock.patch(target, change):
        return list(examine(request, mesh))


def without_window(module: Any, kwargs: dict[str, Any], note: Any) -> Mask:
    kwargs.pop("sliding_window")
    return Mask()


def one_document(batch: Any, rows: int, size: int) -> Any:
    from ringattn import Documents

    return Documents([rows * size])


SABOTAGE = {
    "dead window": ("ringattn.hf.attention._mask_of", without_window),
    "leak": ("ringattn.hf.batch.documents_of", one_document),
}


def test_every_kind_of_wrongness_shows(pool: Pools) -> None:
    request = Request("mistral", ring=1, ulysses=1)
    wrong = {f.name for f in pool(1).run(findings_of, request, "dead window")[0] if not f.ok}
    assert {"features of every layer", "plain = documents alone", "packed = documents alone"} <= wrong
    wrong = {f.name for f in pool(1).run(findings_of, request, "leak")[0] if not f.ok}
    assert {"packed = documents alone", "no leak from document 1"} <= wrong
    assert "plain = documents alone" not in wrong


def test_bfloat16_is_judged_by_its_own_rounding(pool: Pools) -> None:
    findings = pool(2).run(findings_of, Request("gemma2", 2, 1, dtype="bfloat16", policy="zigzag"), None)[0]
    assert [finding for finding in findings if not finding.ok] == []


def test_a_refused_model_says_why(pool: Pools) -> None:
    request = Request("qwen3_next", 1, 1)
    findings = pool(1).run(findings_of, request, None)[0]
    assert [(finding.name, finding.ok) for finding in findings] == [("supported", False)]
    text = render(request, [vars(finding) for finding in findings])
    assert "✗ supported" in text
    assert "linear_attention" in text
    assert "NOT exact: 1 of 1" in text

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


@pytest.mark.slow
def test_an_exact_model_in_processes_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_config(read_config("granite_swa"), vocab_size=50).save_pretrained(tmp_path)
    assert main(["check", "--model", str(tmp_path), "--ring", "2", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert all(finding["ok"] for finding in findings)
    names = [finding["name"] for finding in findings]
    assert {"supported", "attention once per layer", "sinks in use", "window in use"} <= set(names)
    assert sum(name.endswith("= documents alone") for name in names) == 6
    assert sum(name.startswith("no leak") for name in names) == 3
    assert "common prefixes = sequences alone" in names


def test_wrong_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, words in (
        (["--model", "no_such_model"], "got 'no_such_model'"),
        (["--model", "llama", "--real"], "--real needs a folder"),
        (["--model", "llama", "--ring", "0"], "an integer from 1 to 64, got '0'"),
        (["--model", str(tmp_path / "missing")], "expected a folder with a config.json"),
        (["--model", str(tmp_path)], "expected a folder with a config.json"),
        (["--model", ""], "expected a folder with a config.json"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["check", *argv])
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("{", "is not a valid JSON file"),
        ("[1]", "Should have a `model_type` key"),
        ("{}", "Should have a `model_type` key"),
        ('{"model_type": "nope"}', "model type `nope`"),
        ('{"model_type": "llama", "num_attention_heads": "x"}', "'num_attention_heads' expected int, got str"),
        ('{"model_type": "llama", "hidden_size": 64, "num_attention_heads": 7}', "not a multiple"),
        ('{"model_type": "mine", "auto_map": {"AutoConfig": "x.Y"}}', "custom code"),
    ],
)
def test_configurations_that_cannot_be_read(
    config: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line that names the folder, at once: no question whether its code may run."""
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(SystemExit, match="2"), mock.patch("builtins.input", side_effect=AssertionError("asked")):
        main(["check", "--model", str(tmp_path)])
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("ringattn check: error: --model: ")
    assert str(tmp_path) in last
    assert words in last


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("t5", "T5Config is of an encoder-decoder"),
        ("whisper", "WhisperConfig is of an encoder-decoder"),
        ("encoder-decoder", "EncoderDecoderConfig is of an encoder-decoder"),
        ("vit", "ViTConfig is of no causal language model"),
        ("clip", "CLIPTextConfig is of no causal language model"),
        ("qwen2_vl", "Qwen2VLTextConfig is of no causal language model"),
        ("musicgen", "MusicgenConfig is of an encoder-decoder"),
    ],
)
def test_models_that_are_no_decoders(model: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused by name before any process starts."""
    with mock.patch("ringattn.commands.check.launched", side_effect=AssertionError("started")):
        assert main(["check", "--model", model, "--device", "cpu", "--json"]) == 1
    (finding,) = json.loads(capsys.readouterr().out)
    assert (finding["name"], finding["ok"]) == ("supported", False)
    assert words in finding["detail"]
    assert "Model type should be one of" not in finding["detail"]


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


def one_branch(trees: Any) -> Any:
    from ringattn import Documents

    return Documents([len(trees.tokens)])


SABOTAGE = {
    "flat trees": ("ringattn.trees.trees.Trees.docs", property(one_branch)),
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
    wrong = {f.name for f in pool(1).run(findings_of, request, "flat trees")[0] if not f.ok}
    assert wrong == {"common prefixes = sequences alone"}


def test_bfloat16_is_judged_by_its_own_rounding(pool: Pools) -> None:
    findings = pool(2).run(findings_of, Request("gemma2", 2, 1, dtype="bfloat16", policy="zigzag"), None)[0]
    assert [finding for finding in findings if not finding.ok] == []


def test_a_refused_model_says_why(pool: Pools) -> None:
    request = Request("mamba", 1, 1)
    findings = pool(1).run(findings_of, request, None)[0]
    assert [(finding.name, finding.ok) for finding in findings] == [("supported", False)]
    text = render(request, [vars(finding) for finding in findings])
    assert "✗ supported" in text
    assert "linear_attention" in text
    assert "NOT exact: 1 of 1" in text

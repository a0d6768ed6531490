"""`ringattn data`: what it prints and draws, and what it refuses."""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from ringattn.cli import main
from ringattn.training.data.report import look_at, samples
from tests.training.chat_tokenizers import TALK, chat_tokenizer

COMMON = ["data.seq_len=64", "run.steps=4", "data.packs_per_step=2"]


@pytest.fixture
def chats(tmp_path) -> list[str]:
    chat_tokenizer("gemma").save_pretrained(tmp_path / "t")
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": TALK}) + "\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "plain \x1b[31m text " * 20}) + "\n")
    sources = f"data.sources=[{{path: {tmp_path}/a.jsonl, kind: chat}}, {{path: {tmp_path}/b.jsonl}}]"
    own = ["data=sources", sources, f"data.tokenizer={tmp_path}/t", f"data.cache={tmp_path}/cache"]
    return [*own, "model.config.vocab_size=320", f"run.output={tmp_path}/out", *COMMON]


@pytest.mark.parametrize("more", [[], ["data.streaming=true"], ["data.packing=best_fit", "data.pad=true"]])
def test_it_tells_and_draws_what_is_learned(more, chats, tmp_path, capsys, monkeypatch):
    if more == ["data.streaming=true"]:
        chats[1] = chats[1].replace("kind: chat", "kind: chat, weight: 1").replace("b.jsonl}", "b.jsonl, weight: 1}")
    assert main(["data", "--draw", str(tmp_path / "x.png"), *chats, *more]) == 0
    out = capsys.readouterr().out
    assert "the first 8 packs" in out
    assert "a.jsonl" in out
    assert "«It is 5." in out
    assert "<start_of_turn>user\nWhat is the sum" in out
    assert "«What" not in out
    assert "\x1b" not in out
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_colours_stand_around_what_is_learned(chats):
    import argparse

    from ringattn.commands.data import _composed

    cfg, chosen = _composed(argparse.Namespace(config_dir=None, config_name="train"), chats)
    data = look_at(cfg, chosen)
    coloured = next(one for one in samples(data, 9, colour=True) if "a.jsonl" in one)
    assert "\033[32mIt is 5.<end_of_turn>\n\033[0m" in coloured
    assert data.facts.targets == sum(plan.targets for plan in data.facts.plans)
    assert data.facts.packed == 8 * 64
    assert data.facts.padding == 0


@pytest.mark.parametrize("more", [[], ["data.share_prefixes=true"]])
def test_it_tells_what_common_prefixes_save(more, tmp_path, capsys):
    lines = [json.dumps({"text": "a system prompt of forty-eight bytes is put before " + name}) for name in "abcd"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    own = ["data=text", f"data.files=[{tmp_path}/a.jsonl]", f"data.cache={tmp_path}/cache", "data.seq_len=212"]
    own += ["data.tokenizer=bytes", "run.steps=1", "data.packs_per_step=1"]
    assert main(["data", "--no-draw", *own, *more]) == 0
    out = capsys.readouterr().out
    told = re.search(r"share_prefixes=true (leaves|would leave) out ([\d.]+)% of the tokens of the first 1 packs", out)
    assert told
    assert told[1] == ("leaves" if more else "would leave")
    assert 60 < float(told[2]) < 75  # three of four prompts, which are nearly all there is


def test_plain_text_and_the_standard_library_are_shown_too(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("some text")
    own = ["data=text", f"data.files=[{tmp_path}/a.txt]", f"data.cache={tmp_path}/cache", *COMMON]
    assert main(["data", "--no-draw", *own]) == 0
    assert "«ome text»" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["data=sources"], "data.sources is empty"),
        (["data=text", "data.files=[/no/such]"], "'/no/such' matches no file"),
        (["data.nothing=1"], "data.nothing"),
    ],
)
def test_what_cannot_be_read_is_refused_in_a_line(arguments, words, capsys):
    assert main(["data", "--no-draw", *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--draw", "x.pdf"], ["--nonsense"], ["--config-dir", "/no/such"]])
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        main(["data", *arguments])
    assert error.value.code == 2


def test_a_folder_of_own_configurations(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "mine.yaml").write_text(
        f"defaults: [train, {{override data: text}}, _self_]\n"
        f"data: {{files: [{tmp_path}/a.txt], cache: {tmp_path}/c}}\n"
        "run: {steps: 2}\n"
    )
    assert main(["data", "--no-draw", "--config-dir", str(tmp_path), "--config-name", "mine", "data.seq_len=8"]) == 0
    assert "packs of 8 tokens" in capsys.readouterr().out
    assert Path(tmp_path / "c").is_dir()

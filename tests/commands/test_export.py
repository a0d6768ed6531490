"""`ringattn export`: what stands in the folder beside the weights, and what cannot be exported."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from ringattn.cli import main
from ringattn.training.export import folder
from ringattn.training.resuming.best import BestSteps
from tests.pool import Pools
from tests.training.export.small_runs import TEMPLATE, save_tokenizer, written
from tests.training.recipe import save_model


@pytest.fixture(scope="module")
def run(pool: Pools, tmp_path_factory: Any) -> Path:
    """A run with checkpoints of steps 1 to 3, of a saved model with a tokenizer."""
    base = tmp_path_factory.mktemp("models") / "my-base"
    save_model(base, vocab_size=300)
    save_tokenizer(base)
    (base / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "do_sample": True}))
    texts = base.parent / "secret-place" / "books"
    texts.mkdir(parents=True)
    (texts / "one.txt").write_text("a few words in a book " * 50)
    output = base.parent / "run"
    data = ("data=text", f"data.files=[{texts}]", f"data.cache={base.parent / 'cache'}")
    written(pool, 2, output, f"model.path={base}", *data, steps=(1, 2, 3))
    losses = [5.0, 4.0, 3.0]
    lines = [
        {"step": n, "loss": loss, "validation": {"books": 10 - n if n < 3 else 9.5}} for n, loss in enumerate(losses, 1)
    ]
    (output / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return output


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def refused(capsys: Any, *argv: object) -> str:
    with pytest.raises(SystemExit) as error:
        main(["export", *map(str, argv)])
    assert error.value.code == 2
    return str(capsys.readouterr().err)


def test_the_folder_and_its_card(run: Path, tmp_path: Path, capsys: Any) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    out = tmp_path / "my-model"
    tasks = {
        "needle": {"step": 3, "mean": 0.95},
        "position": {"step": 3, "mean": {"full": 2.5}},
        "old": {"step": 1, "mean": 1},
    }
    (run / "evaluation").mkdir()
    (run / "evaluation" / "evaluation.json").write_text(json.dumps({"tasks": tasks}))
    assert main(["export", str(run), str(out)]) == 0
    assert capsys.readouterr().out.startswith(f"{out}: step 3, 21 tensors, ")
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer("word3 word4")["input_ids"] == [5, 6]
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.model_max_length == 512
    generation = GenerationConfig.from_pretrained(out)
    assert (generation.temperature, generation.eos_token_id) == (0.6, 1)
    card = (out / "README.md").read_text()
    for words in (
        "# my-model", "library_name: transformers", "continued from `my-base`", "packs of 147 tokens", "step 3 of 160",
        "| files | `books` |", "llama3", "| training loss, mean of the last 3 steps | 4.0000 nats a token |",
        "| validation loss of books (step 3) | 9.5000 nats a token |", "| torch | ", "| needle | 95.0% right |",
        "| position | 2.5000 nats a token (full) |",
    ):  # fmt: skip
        assert words in card, f"{words!r} is not in\n{card}"
    assert "| old |" not in card
    assert "secret-place" not in card, "paths tell of the machine"


def test_which_checkpoint(run: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["export", str(run), str(tmp_path / "one"), "--step", "1"]) == 0
    assert "step 1," in capsys.readouterr().out
    assert "books (step 1) | 9.0000" in (tmp_path / "one" / "README.md").read_text()
    assert main(["export", str(run), str(tmp_path / "best"), "--best"]) == 0
    assert "step 2," in capsys.readouterr().out
    assert "no checkpoint of step 7, only of steps 1, 2, 3" in refused(capsys, run, tmp_path / "7", "--step", 7)
    assert "not allowed with" in refused(capsys, run, tmp_path / "7", "--step", 1, "--best")


def test_the_best_steps(run: Path) -> None:
    assert BestSteps(run, 2)([1, 2, 3, 4]) == [2, 1]
    assert BestSteps(run, 5)([1, 3]) == [1, 3]
    assert BestSteps(run, 0)([1, 3]) == []


def test_a_damaged_checkpoint_is_passed_over(copied: Path, tmp_path: Path, capsys: Any) -> None:
    part = copied / "checkpoints" / "step-00000003" / "rank-00001.safetensors"
    whole = part.read_bytes()
    part.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert main(["export", str(copied), str(tmp_path / "out")]) == 0
    told = capsys.readouterr()
    assert "step 2," in told.out
    assert "warning: not taken: " in told.err
    assert "rank-00001.safetensors is damaged" in told.err
    assert "is damaged" in refused(capsys, copied, tmp_path / "3", "--step", 3)
    assert not (tmp_path / "3").exists()


def test_what_cannot_be_exported(copied: Path, tmp_path: Path, capsys: Any) -> None:
    out, empty = tmp_path / "out", tmp_path / "empty"
    empty.mkdir()
    assert "is no folder" in refused(capsys, tmp_path / "nowhere", out)
    assert "holds no config.yaml" in refused(capsys, empty, out)
    assert "is not empty" in refused(capsys, copied, copied)
    assert "is not empty" in refused(capsys, copied, copied / "config.yaml")
    assert "has no factors of model.lora" in refused(capsys, copied, out, "--adapter")
    (copied / "metrics.jsonl").unlink()
    assert "no checkpoint is of a step with a validation loss" in refused(capsys, copied, out, "--best")
    shutil.rmtree(copied / "checkpoints")
    assert "holds no checkpoint" in refused(capsys, copied, out)
    (copied / "model.json").unlink()
    assert "holds no model.json" in refused(capsys, copied, out)
    assert not out.exists()


def test_tokenizers(copied: Path, tmp_path: Path, capsys: Any) -> None:
    out, config = tmp_path / "out", copied / "config.yaml"
    base = next(line.split(": ")[1] for line in config.read_text().splitlines() if "tokenizer:" in line)
    config.write_text(config.read_text().replace(f"tokenizer: {base}", "tokenizer: /no/where"))
    assert "/no/where is not there; give the folder" in refused(capsys, copied, out)
    save_tokenizer(tmp_path / "large", 301)
    assert "has 301 tokens, the model knows 300" in refused(capsys, copied, out, "--tokenizer", tmp_path / "large")
    (tmp_path / "broken").mkdir()
    assert "broken cannot be read" in refused(capsys, copied, out, "--tokenizer", tmp_path / "broken")
    assert main(["export", str(copied), str(out), "--tokenizer", base]) == 0
    config.write_text(config.read_text().replace("tokenizer: /no/where", "tokenizer: bytes"))
    assert main(["export", str(copied), str(tmp_path / "bytes")]) == 0
    assert not (tmp_path / "bytes" / "tokenizer.json").exists()
    assert "there is no tokenizer" in (tmp_path / "bytes" / "README.md").read_text()


def test_it_is_complete_or_absent(run: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    out = tmp_path / "deep" / "out"
    out.mkdir(parents=True)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device", "model.safetensors")

    with monkeypatch.context() as patched:
        patched.setattr(folder, "write_weights", fail)
        assert main(["export", str(run), str(out)]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert [*out.parent.iterdir()] == [out]
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        assert main(["export", str(run), str(out)]) == 1
    assert "GB are needed, 0.00 GB are free" in capsys.readouterr().err
    (out.parent / "out.partial").mkdir()
    assert main(["export", str(run), str(out)]) == 0
    assert [*out.parent.iterdir()] == [out]


def test_numbers_too_large_for_a_dtype(run: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    from ringattn.training.export.trained import TrainedWeights

    merged = TrainedWeights.merged
    monkeypatch.setattr(TrainedWeights, "merged", lambda self, name: merged(self, name) * 1e8)
    assert "too large for float16" in refused(capsys, run, tmp_path / "out", "--dtype", "float16")
    assert [*tmp_path.iterdir()] == []


def test_an_empty_folder_that_one_stands_in(run: Path, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main(["export", str(run), "."]) == 0
    assert (tmp_path / "here" / "config.json").is_file()
    assert "# here" in (tmp_path / "here" / "README.md").read_text()


def test_a_mixture_with_chats(copied: Path, tmp_path: Path) -> None:
    """The template that the chats were written in goes along."""
    from omegaconf import OmegaConf
    from transformers import AutoTokenizer

    cfg = OmegaConf.load(copied / "config.yaml")
    (tmp_path / "template.jinja").write_text("mine")
    sources = [{"path": "/secret/chats.jsonl", "kind": "chat", "weight": 3}, {"hub": "who/what", "weight": 1.5}]
    more = {
        "name": "sources",
        "sources": sources,
        "loss_on": "assistant",
        "chat_template": str(tmp_path / "template.jinja"),
    }
    OmegaConf.save(OmegaConf.merge(cfg, {"data": more}), copied / "config.yaml")
    assert main(["export", str(copied), str(tmp_path / "out")]) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "mine"
    card = (tmp_path / "out" / "README.md").read_text()
    for words in ("| `chats.jsonl` | chat, weight 3 |", "| `what` | text, weight 1.5 |", "| loss on | assistant |"):
        assert words in card, card

"""`recipes/evaluate.py`, on runs and saved models, in forked ranks: results, pictures, refusals."""

import json
import math
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir

pytest.importorskip("transformers")

from ringattn.hf.tiny import read_config, tiny_config, tiny_model
from ringattn.training.evaluation.measures import position_edges
from ringattn.training.evaluation.pictures import draw_by_length, draw_heat_map, draw_positions, tokens_of
from ringattn.training.evaluation.prepared import Evaluation, cells, prepare
from ringattn.training.evaluation.tasks import Example
from ringattn.training.start.launched import Launch
from tests.training.forked import all_end, fork_rank
from tests.training.recipe import CONFIGS, save_model, started
from tests.training.test_runs import environment

SMALL = ("lengths=[500]", "hops=1", "samples=1", "depths=[0.0,1.0]", "wording=plain", "distractors=2", "needles=3")
ALL = (
    "lengths=[480,500]",
    "hops=1",
    "samples=2",
    "depths=[0.0,0.5,1.0]",
    "wording=plain",
    "distractors=2",
    "needles=3",
)
ALL = "tasks=[position,window,needle,multi_needle,variable_tracking,logprobs]"


def evaluated(folder: Path, ranks: int, *arguments: str) -> str:
    """What the recipe writes on its screen, with as many ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "ranks.log"
    log.unlink(missing_ok=True)
    own = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        fork_rank(
            arguments,
            environment() | own | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            log,
            log,
            script="recipes/evaluate.py",
        )
        for rank in range(ranks)
    ]
    assert all_end(processes, 200), log.read_text()
    text = log.read_text()
    assert [process.exitcode for process in processes] == [0] * ranks, text
    return text


def prepared(*overrides: str) -> Evaluation:
    with initialize_config_dir(str(CONFIGS), version_base=None):
        return prepare(compose("evaluate", list(overrides)), Launch("single", 0, 1, 0, 1, "127.0.0.1", 0))


def write_texts(folder: Path) -> Path:
    path = folder / "texts.jsonl"
    texts = ["the grass is green. " * 20, "the sky is blue. ", "a", "", "here we go, there and back again. " * 3]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def token_logprobs(model: Any, text: str) -> list[float]:
    ids = torch.tensor([list(text.encode())])
    with torch.no_grad():
        logits = model(ids).logits[0]
    return torch.log_softmax(logits[:-1], -1).gather(1, ids[0, 1:, None])[:, 0].tolist()


@pytest.mark.slow
def test_a_saved_model_on_one_two_and_three_ranks(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", vocab_size=256).eval()
    texts = write_texts(tmp_path)
    base = (f"model.path={tmp_path}/model", f"texts.files=[{texts}]", "windows=[8]", "bins=4", *SMALL)
    documents = [json.loads(line)["text"] for line in texts.read_text().splitlines()]
    expected = [token_logprobs(model, one) if len(one) > 1 else [] for one in documents]
    results = {}
    for ranks, more in (
        (1, ("generate=true", ALL)),
        (2, ("generate=true", ALL)),
        (3, ("parallel.data=3", "tasks=[window,needle,logprobs]")),
    ):
        output = tmp_path / f"out{ranks}"
        text = evaluated(output, ranks, *base, f"output={output}", f"texts.cache={tmp_path}/cache", *more)
        assert "done: " in text
        results[ranks] = found = json.loads((output / "evaluation.json").read_text())["tasks"]
        assert sorted(found) == sorted(more[-1][7:-1].split(","))
        for name in {*found} - {"logprobs"}:
            assert (output / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        lines = [json.loads(line) for line in (output / "logprobs.jsonl").read_text().splitlines()]
        assert [line["document"] for line in lines] == list(range(5))
        for line, document, values in zip(lines, documents, expected, strict=True):
            assert line["tokens"] == list(document.encode())
            assert line["logprobs"][:1] == [None][: len(document)]
            assert line["logprobs"][1:] == pytest.approx(values, rel=1e-4, abs=1e-4)
        window = found["window"]
        assert abs(window["mean"]["full"] - window["mean"]["window 8"]) > 1e-3
        assert window["mean"]["full"] * sum(window["targets"]) == pytest.approx(-sum(map(sum, expected)), rel=1e-4)
    assert results[1]["window"]["loss"]["full"] == pytest.approx(results[1]["position"]["loss"]["full"])
    for ranks in (2, 3):
        for name in {*results[ranks]} & {"needle", "multi_needle", "variable_tracking"}:
            for key in {"right", "right_generated", "logprob"} & {*results[ranks][name]}:
                one, other = (torch.tensor(results[number][name][key]) for number in (ranks, 1))
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_training_run_by_its_newest_checkpoint(tmp_path: Path) -> None:
    """The mean loss of a text is the run's own validation loss, and a file of one task leaves others as they were."""
    texts = write_texts(tmp_path)
    run = tmp_path / "run"
    tiny = (
        "model.config.hidden_size=32",
        "model.config.intermediate_size=48",
        "model.config.num_attention_heads=4",
        "model.config.num_key_value_heads=2",
        "model.config.max_position_embeddings=600",
        "data.seq_len=600",
        "run.steps=3",
    )
    code, out, err = started(tmp_path, *tiny, f"run.output={run}", f"data.validation={{validation: {texts}}}")
    assert code == 0, out + err
    validation = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["validation"]["validation"]
    of_texts = (f"texts.files=[{texts}]", f"texts.cache={tmp_path}/cache", "tasks=[position]", "max_length=600")
    evaluated(tmp_path, 2, f"model.run={run}", *SMALL, *of_texts)
    evaluated(tmp_path, 1, f"model.run={run}", *SMALL, "tasks=[multi_needle]")
    summary = json.loads((run / "evaluation" / "evaluation.json").read_text())["tasks"]
    assert summary["position"]["mean"]["full"] == pytest.approx(validation, rel=1e-5)
    assert summary["multi_needle"]["step"] == 3
    assert summary["multi_needle"]["model"] == "tiny after step 3"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ((), "got neither"),
        (("model.path=/nowhere",), "model.path='/nowhere' is no folder"),
        (("model.path={model}", "model.run=/tmp"), "got both"),
        (("model.run={model}",), "holds no config.yaml and model.json"),
        (("model.path={model}", "tasks=[needles]"), "tasks must be some of position, window"),
        (("model.path={model}", "tasks=[]"), "tasks must be a list that is not empty"),
        (("model.path={model}", "tasks=[logprobs]"), "logprobs need texts"),
        (("model.path={model}", "tasks=[needle]", "lengths=[50]"), "task needle: needles, question and answer have"),
        (("model.path={model}", "tasks=[needle]", "lengths=[400,600]"), "max_position_embeddings=512"),
        (("model.path={model}", "tasks=[needle]", "depths=[1.5]"), "depths must be numbers from 0 to 1, got 1.5"),
        (("model.path={model}", "tasks=[needle]", "samples=0"), "samples must be an integer of at least 1, got 0"),
        (("model.path={model}", "asked=5"), "asked=5 must be at most needles=4"),
        (("model.path={model}", "parallel.ring=2", "tasks=[needle]"), "parallel: "),
        (("model.path={model}", "tasks=[position]", "texts.files=[/nowhere/*]"), "texts.files: '/nowhere/\\*' matches"),
        (("model.path={model}", "tasks=[needle]", "+model.config.hidden=3"), "model.config.hidden"),
        (("model.path={model}", "wording=plain", "distractors=8", "tasks=[needle]", "lengths=[400]"), "9 needles need"),
        (("model.path={small}", "tasks=[needle]", "lengths=[500]"), "256 tokens, more than the 200"),
    ],
)
def test_refusals(tmp_path: Path, overrides: tuple[str, ...], words: str) -> None:
    save_model(tmp_path / "model", vocab_size=256)
    save_model(tmp_path / "small", vocab_size=200)
    filled = [one.format(model=tmp_path / "model", small=tmp_path / "small") for one in overrides]
    with pytest.raises(ValueError, match=words):
        prepared(f"output={tmp_path}/out", f"texts.cache={tmp_path}/cache", *filled)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "more"), [("qwen3_5_text", {}), ("lfm2", {"layer_types": ["conv", "full_attention", "conv", "conv"]})]
)
def test_what_layers_that_carry_a_state_cannot_be_asked(tmp_path: Path, family: str, more: dict[str, Any]) -> None:
    tiny_model(tiny_config(read_config(family), **more, vocab_size=300)).save_pretrained(tmp_path)
    given = (f"model.path={tmp_path}", f"texts.files=[{write_texts(tmp_path)}]", "lengths=[400]", "samples=1")
    named = r".* has \w+ at model\.layers\.\d.*, whose state "
    with pytest.raises(ValueError, match=r"tasks=\[window\]:" + named):
        prepared(*given, "tasks=[position,window]")
    with pytest.raises(ValueError, match="generate=true:" + named):
        prepared(*given, "tasks=[needle]", "generate=true")
    prepared(*given, "tasks=[position]", "generate=true")


def test_a_longer_length_can_be_asked_for(tmp_path: Path) -> None:
    save_model(tmp_path / "model", vocab_size=256)
    job = prepared(
        f"model.path={tmp_path}/model", "tasks=[needle]", "lengths=[900]", "+model.config.max_position_embeddings=1000"
    )
    assert job.source.config.max_position_embeddings == 1000
    assert len(job.examples["needle"]) == 110
    assert job.settings.output.name == "evaluation-model"


def test_cells_are_means_over_samples() -> None:
    def example(length: int, depth: float) -> Example:
        ids = torch.zeros(2, dtype=torch.int64).numpy()
        return Example(ids, (ids,), (), length, depth)

    examples = [example(8, 0.5), example(8, 0.5), example(16, 0.5), example(8, 1.0)]
    table = cells(examples, [1.0, 0.0, 1.0, 0.25], [0.5, 1.0], [8, 16])
    assert table[0] == [0.5, 1.0]
    assert table[1][0] == 0.25
    assert math.isnan(table[1][1])
    alone = [example(8, math.nan), example(16, math.nan)]
    assert cells(alone, [1.0, 0.5], [math.nan], [8, 16]) == [[1.0, 0.5]]


def test_edges_and_numbers_of_tokens() -> None:
    assert position_edges(8, 3) == [1, 2, 4, 8]
    assert position_edges(2, 32) == [1, 2]
    assert position_edges(1, 4) == [1, 2]
    assert [tokens_of(x) for x in (512, 1024, 1536, 131072, 1 << 20)] == ["512", "1K", "1.5K", "128K", "1M"]


def test_pictures_of_odd_results(tmp_path: Path) -> None:
    draw_heat_map(tmp_path / "a.png", [64], [0.0], [[math.nan]], "nothing")
    draw_positions(tmp_path / "b.png", [1, 2], {"full": [math.nan]}, "nothing")
    draw_by_length(tmp_path / "c.png", [64], {"scored": [0.5]}, "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png", "c.png"]

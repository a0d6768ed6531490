"""Whole runs on sources with weights, cached and streamed: killed anywhere, they go on with the same losses."""

import json
import random
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")

from ringattn.training.report.records import read_metrics
from tests.training.chat_tokenizers import chat_tokenizer
from tests.training.forked import fork_rank
from tests.training.test_runs import SMALL, curve, free_port, run, variables_of

STEPS = 16


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Chats, texts with a record that is none, and ids, which end while the others go on."""
    folder, draw = tmp_path_factory.mktemp("data"), random.Random(0)
    chat_tokenizer("qwen3").save_pretrained(folder / "t")

    def words(count: int) -> str:
        return " ".join(draw.choice(["the", "sum", "of", "two", "and", "three"]) for _ in range(count))

    turns = [[("user", words(20)), ("assistant", words(draw.randint(1, 60)))] for _ in range(60)]
    chats = [{"messages": [{"role": role, "content": said} for role, said in talk]} for talk in turns]
    texts = [{"text": words(int(size))} for size in np.random.default_rng(0).lognormal(3, 1, 50)]
    ids = [{"input_ids": [draw.randrange(256) for _ in range(90)], "m": [0] * 45 + [1] * 45} for _ in range(20)]
    for name, rows in (("chats", chats), ("texts", texts), ("ids", ids)):
        for part in range(2):
            lines = "".join(json.dumps(row) + "\n" for row in rows[part::2])
            lines += '{"text": null}\n' if name == "texts" else ""
            (folder / name).mkdir(exist_ok=True)
            (folder / name / f"{part}.jsonl").write_text(lines)
    return folder


def overrides(data: Path, *more: str) -> list[str]:
    sources = (
        f"{{path: {data}/chats, kind: chat, weight: 2}}, {{path: {data}/texts, weight: 1}}, "
        f"{{path: {data}/ids, kind: ids, mask_field: m, weight: 0.5, max_tokens: 1000, epochs: 1}}"
    )
    own = ["data=sources", f"data.sources=[{sources}]", f"data.tokenizer={data}/t", f"data.cache={data}/cache"]
    own += ["data.on_error=skip"]
    return [*own, "model.config.vocab_size=320", f"run.steps={STEPS}", "run.save_every=2", *more]


# How packs are made, and ranks that go on; a source has two files.
RULES = {
    "cached, best fit": (("data.packing=best_fit", "data.lookahead=20"), 1),
    "streamed": (("data.streaming=true", "data.curriculum=[[0, 96], [5, 384]]"), 1),
    "streamed, more ranks than files": (("data.streaming=true", "data.packing=best_fit"), 3),
}


@pytest.mark.nightly
@pytest.mark.parametrize("rule", RULES)
def test_killed_and_on_other_ranks_the_losses_are_the_same(rule, data, tmp_path):
    rules, ranks_after = RULES[rule]
    arguments = overrides(data, *rules)
    run(tmp_path / "whole", 1, *arguments)
    expected = curve(tmp_path / "whole")
    assert len(expected) == STEPS
    assert expected[-1][1] < expected[0][1]

    output, log = tmp_path / "killed", tmp_path / "ranks.log"
    own, port = [*SMALL, f"run.output={output}", *arguments, "parallel.data=2"], free_port()
    ranks = [fork_rank(own, variables_of(rank, 2, port), log, log) for rank in range(2)]
    killed_after, deadline = random.randint(3, STEPS - 4), time.monotonic() + 200
    while len(read_metrics(output / "metrics.jsonl") if (output / "metrics.jsonl").exists() else []) < killed_after:
        assert time.monotonic() < deadline, log.read_text()
        assert all(rank.exitcode is None for rank in ranks), log.read_text()
        time.sleep(0.05)
    for rank in ranks:
        rank.kill()
        rank.join()
    said = run(output, ranks_after, *arguments)
    assert "from step" in said
    found = curve(output)
    assert [step for step, _, _ in found] == list(range(1, STEPS + 1))
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=2e-5), f"step {one[0]}, killed after {killed_after}"

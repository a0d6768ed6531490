"""Validation during a run: exact, and without a trace in the curve."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

pytest.importorskip("transformers")

from ringattn.training.data.corpus import Corpus, corpus_of
from ringattn.training.evaluation.validation import plans
from ringattn.training.loop import Trainer
from ringattn.training.report.records import read_metrics
from tests.pool import Pools
from tests.training.recipe import prepared, started

TINY = (
    "model.config.hidden_size=32",
    "model.config.intermediate_size=48",
    "model.config.num_attention_heads=4",
    "model.config.num_key_value_heads=2",
    "data.seq_len=96",
    "run.dtype=float32",
)


def corpus(*lengths: int, seed: int = 0) -> Corpus:
    generator = np.random.default_rng(seed)
    return corpus_of([generator.integers(0, 256, length).astype(np.uint8) for length in lengths], 256)


def write_texts(folder: Path) -> tuple[Path, Path]:
    """A set of three documents, one longer than a pack, and one of a single document."""
    generator = np.random.default_rng(0)
    books, code = folder / "books.jsonl", folder / "code.txt"
    texts = ["".join(chr(97 + value) for value in generator.integers(0, 26, size)) for size in (150, 10, 60, 33)]
    books.write_text("".join(f'{{"text": "{text}"}}\n' for text in texts[:3]))
    code.write_text(texts[3])
    return books, code


def plain_loss(model: Any, documents: list[bytes], seq_len: int) -> float:
    """Mean over all targets of documents that are split where packs of `seq_len` tokens end."""
    total, count, room = 0.0, 0, seq_len
    for document in documents:
        ids, begin = torch.tensor(list(document)), 0
        while begin < len(ids):
            stop = min(len(ids), begin + room)
            targets = ids[begin + 1 : stop + 1]
            with torch.no_grad():
                logits = model(ids[begin:stop][None]).logits[0, : len(targets)]
            total += float(cross_entropy(logits, targets, reduction="sum"))
            count, room, begin = count + len(targets), room - (stop - begin) or seq_len, stop
    return total / count


def losses_of(folder: Path, overrides: tuple[str, ...], ranks: int) -> tuple[dict[str, float] | None, dict[str, Any]]:
    trainer = Trainer(prepared(*overrides, f"run.output={folder}/run", ranks=ranks))
    state = torch.get_rng_state()
    found = trainer.validation.losses(10)
    assert torch.equal(state, torch.get_rng_state())
    assert trainer.engine.model.training
    assert trainer.validation.losses(9) is None
    weights = {name: tensor.full_tensor().clone() for name, tensor in trainer.engine.model.state_dict().items()}
    return found, weights


@pytest.mark.parametrize(("ranks", "overrides"), [(1, ()), (2, ()), (2, ("parallel.data=2", "memory.loss_tile=16"))])
def test_the_mean_over_all_targets(pool: Pools, tmp_path: Path, ranks: int, overrides: tuple[str, ...]) -> None:
    from transformers import LlamaForCausalLM

    books, code = write_texts(tmp_path)
    sets = (f"data.validation={{books: {books}, code: {code}}}", "run.evaluate_every=10")
    found = pool(ranks).run(losses_of, tmp_path, (*TINY, *sets, *overrides), ranks)
    job = prepared(*TINY, f"run.output={tmp_path}/other")
    model = LlamaForCausalLM(job.model_config).eval()
    model.load_state_dict(found[0][1])
    texts = [eval(line)["text"].encode() for line in books.read_text().splitlines()]
    expected = {"books": plain_loss(model, texts, 96), "code": plain_loss(model, [code.read_bytes()], 96)}
    for losses, _ in found:
        assert losses == pytest.approx(expected, rel=1e-5)


def test_packs_of_one_pass_hold_every_token_once() -> None:
    some = corpus(150, 0, 10, 60, 33)
    found = [*plans(some, 96)]
    assert [plan.tokens for plan in found] == [96, 96, 61]
    assert sum(plan.targets for plan in found) == 149 + 9 + 59 + 32
    spans = sorted((one.document, one.start, one.stop) for plan in found for one in plan.segments)
    assert spans == [(0, 0, 96), (0, 96, 150), (2, 0, 10), (3, 0, 32), (3, 32, 60), (4, 0, 33)]
    assert [*plans(corpus(0), 96)] == []


def test_files_that_are_not_there_are_refused_by_their_key(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.validation\[0\].path: '/nowhere/\*' matches no file"):
        prepared("data.validation=[/nowhere/*]", f"run.output={tmp_path}/run")
    (tmp_path / "one").write_text("x")
    with pytest.raises(
        ValueError, match=r"data\.validation\[0\]: none of the 1 documents of 'one' has a target: .* two tokens"
    ):
        prepared(f"data.validation=[{tmp_path}/one]", f"run.output={tmp_path}/run")


def test_a_set_that_is_trained_on_is_told(tmp_path: Path) -> None:
    books, _ = write_texts(tmp_path)
    data = ("data=text", f"data.files=[{books}]", f"data.cache={tmp_path}/cache", f"data.validation=[{books}]")
    job = prepared(*data, f"run.output={tmp_path}/run")
    assert any("3 of the 3 documents of " in note and "are also in the training data" in note for note in job.notes)


@pytest.mark.slow
def test_the_curve_is_the_same_with_and_without(tmp_path: Path) -> None:
    books, code = write_texts(tmp_path)
    steps = (*TINY, "run.steps=6", "run.save_every=3", "data.packs_per_step=2")
    curves = []
    for name, more in (
        ("without", ()),
        (
            "with",
            (f"data.validation={{books: {books}, code: {code}}}", "run.evaluate_every=2", "run.tensorboard=true"),
        ),
    ):
        output = tmp_path / name
        code_of, out, err = started(tmp_path, *steps, f"run.output={output}", *more)
        assert code_of == 0, out + err
        curves.append([{**record} for record in read_metrics(output / "metrics.jsonl")])
    without, with_sets = curves
    assert [one["loss"] for one in without] == [one["loss"] for one in with_sets]
    assert [one["validation"] is not None for one in with_sets] == [False, True, False, True, False, True]
    assert set(with_sets[-1]["validation"]) == {"books", "code"}
    assert with_sets[-1]["validation"]["books"] < with_sets[1]["validation"]["books"]
    assert "books" in out

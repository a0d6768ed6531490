"""transformers.Trainer: the same curve, evaluation and continuation at every sequence size."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate (pip install 'ringattn[hf]')")

from ringattn import init_mesh
from ringattn.hf.tiny import read_config, tiny_config, tiny_model
from tests.hf.families import GQA
from tests.parallel.ranks import mesh_of
from tests.pool import Pools


class Rows(torch.utils.data.Dataset):
    """Rows of two packed documents, of many lengths."""

    def __init__(self, seed: int, rows: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.rows = []
        for _ in range(rows):
            first, second = torch.randint(4, 20, (2,), generator=generator).tolist()
            ids = torch.randint(3, 97, (first + second,), generator=generator).tolist()
            self.rows.append({"input_ids": ids, "labels": ids, "seq_idx": [0] * first + [1] * second})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def padded(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows of one size; padding is in no document."""
    size = max(len(feature["input_ids"]) for feature in features)

    def filled(name: str, value: int) -> torch.Tensor:
        return torch.tensor([feature[name] + [value] * (size - len(feature[name])) for feature in features])

    return {"input_ids": filled("input_ids", 0), "labels": filled("labels", -100), "seq_idx": filled("seq_idx", -1)}


def trained(folder: str, data: int, ring: int, ulysses: int, resume: bool, batch: int) -> dict[str, Any]:
    """Losses of 6 steps of 2 micro-batches, evaluation losses, and the last weights."""
    from transformers import TrainingArguments

    from ringattn.hf.trainer import SequenceTrainer

    mesh = mesh_of(ring, ulysses) if data == 1 else init_mesh(data, ring, ulysses, device_type="cpu")
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=3,
        gradient_accumulation_steps=2,
        max_steps=6,
        learning_rate=3e-3,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=3,
        save_steps=3,
        use_cpu=True,
        report_to=[],
        seed=1,
        disable_tqdm=True,
        max_grad_norm=1.0,
    )
    trainer = SequenceTrainer(
        tiny_model(tiny_config(read_config("gpt_oss"), **GQA)),
        arguments,
        mesh=mesh,
        policy="zigzag",
        train_dataset=Rows(0, 40),
        eval_dataset=Rows(1, 7),
        data_collator=padded,
    )
    trainer.train(resume_from_checkpoint=str(Path(folder, "checkpoint-3")) if resume else None)
    history = trainer.state.log_history
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "layers.1" in name}
    return {
        "loss": [(entry["step"], entry["loss"]) for entry in history if "loss" in entry],
        "eval": [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry],
        "weights": weights,
    }


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for key in ("loss", "eval"):
        assert [step for step, _ in found[key]] == [step for step, _ in expected[key]]
        for (_, a), (_, b) in zip(found[key], expected[key], strict=True):
            assert a == pytest.approx(b, rel=2e-5)
    for name, weight in expected["weights"].items():
        assert (found["weights"][name] - weight).norm() <= 1e-3 * weight.norm(), name


@pytest.fixture(scope="module")
def alone(pool: Pools, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    folder = str(tmp_path_factory.mktemp("alone"))
    return folder, pool(1).run(trained, folder, 1, 1, 1, False, 2)[0]


@pytest.mark.parametrize(("data", "ring", "ulysses", "batch"), [(1, 2, 1, 2), (1, 1, 2, 2), (2, 1, 1, 1)])
def test_the_same_curve(
    pool: Pools, alone: tuple[str, dict[str, Any]], tmp_path: Path, data: int, ring: int, ulysses: int, batch: int
) -> None:
    """The last one: two replicas of one row each make the same batches as one of two rows."""
    expected = alone[1]
    assert [step for step, _ in expected["loss"]] == list(range(1, 7))
    assert [step for step, _ in expected["eval"]] == [3, 6]
    assert expected["loss"][-1][1] < expected["loss"][0][1]
    for found in pool(data * ring * ulysses).run(trained, str(tmp_path), data, ring, ulysses, False, batch):
        same(found, expected)


def test_resume_in_the_middle_at_another_sequence_size(pool: Pools, alone: tuple[str, dict[str, Any]]) -> None:
    folder, expected = alone
    same(pool(2).run(trained, folder, 1, 2, 1, True, 2)[0], expected)


def refused(what: str, folder: str) -> None:
    from transformers import TrainingArguments

    from ringattn.hf.trainer import SequenceTrainer

    keywords: dict[str, Any] = {"compute_metrics": lambda _: {}} if what == "compute_metrics" else {}
    smoothing = 0.1 if what == "label_smoothing_factor" else 0.0
    arguments = TrainingArguments(folder, use_cpu=True, report_to=[], label_smoothing_factor=smoothing)
    model = tiny_model(tiny_config(read_config("llama")))
    rows = Rows(0, 2)
    trainer = SequenceTrainer(
        model, arguments, mesh=mesh_of(1, 1), train_dataset=rows, data_collator=padded, **keywords
    )
    trainer.predict(rows)


@pytest.mark.parametrize("what", ["compute_metrics", "label_smoothing_factor", "predict"])
def test_what_needs_all_logits_is_refused(pool: Pools, what: str, tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match=what):
        pool(1).run(refused, what, str(tmp_path))


def different_batches(kind: str) -> None:
    from ringattn.hf.trainer.agreement import agree

    mesh = mesh_of(2, 1)
    ids = torch.arange(6)
    if mesh.sequence_rank == 1:
        ids = ids.flip(0) if kind == "order" else ids[:4] if kind == "length" else ids
    agree([{"input_ids": ids[None]}], mesh)


@pytest.mark.parametrize("kind", ["order", "length"])
def test_ranks_with_different_batches(pool: Pools, kind: str) -> None:
    pool(2).run(different_batches, "same")
    with pytest.raises(ValueError, match="got different batches: input_ids of batch 0 differ on ranks 0 to 1"):
        pool(2).run(different_batches, kind)

"""What worker processes of the Trainer's tests run: a tiny model, rows, and one training with its history."""

import gc
from functools import cache
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset

from ringattn import SequenceMesh, init_mesh
from ringattn.hf.tiny import read_config, tiny_config, tiny_model
from tests.hf.families import GQA

Row = dict[str, Any]


@cache
def mesh(data: int, ring: int) -> SequenceMesh:
    return init_mesh(data, ring, 1, device_type="cpu")


def small_model(seed: int = 0, family: str = "llama", **changes: Any) -> Any:
    """Two layers: enough for attention to pass things on."""
    changes = {"num_hidden_layers": 2} | GQA | changes
    return tiny_model(tiny_config(read_config(family), **changes), seed)


def make_rows(count: int, seed: int = 0) -> list[Row]:
    """Rows of one document each, of many lengths; no two are equal."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(6, 20, (count,), generator=generator).tolist()
    ids = [torch.randint(3, 97, (length,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": row, "labels": row} for row in ids]


class Rows(Dataset):
    def __init__(self, count: int, seed: int = 0) -> None:
        self.rows = make_rows(count, seed)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]


class Stream(IterableDataset):
    """The same without a length."""

    def __init__(self, count: int, seed: int = 0) -> None:
        self.rows = make_rows(count, seed)

    def __iter__(self) -> Any:
        return iter(self.rows)


def collate(rows: list[Row]) -> dict[str, torch.Tensor]:
    """Right padded rows with a mask."""
    size = max(len(row["input_ids"]) for row in rows)

    def filled(values: list[list[int]], padding: int) -> torch.Tensor:
        return torch.tensor([value + [padding] * (size - len(value)) for value in values])

    return {
        "input_ids": filled([row["input_ids"] for row in rows], 0),
        "labels": filled([row["labels"] for row in rows], -100),
        "attention_mask": filled([[1] * len(row["input_ids"]) for row in rows], 0),
    }


def arguments(folder: str, **changes: Any) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(**(QUIET | {"output_dir": folder} | changes))


QUIET: dict[str, Any] = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "num_train_epochs": 1,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "use_cpu": True,
    "report_to": [],
    "disable_tqdm": True,
    "seed": 1,
}


def trainer_of(where: SequenceMesh, folder: str, changes: dict[str, Any] | None = None, **keywords: Any) -> Any:
    """A SequenceTrainer for rows; keywords of its own win."""
    from ringattn.hf.trainer import SequenceTrainer

    gc.freeze()  # Accelerate collects garbage before every training, else among all modules
    defaults: dict[str, Any] = {"data_collator": collate, "policy": "contiguous"}
    if "model_init" not in keywords:
        defaults["model"] = small_model()
    return SequenceTrainer(args=arguments(folder, **(changes or {})), mesh=where, **(defaults | keywords))


def history(trainer: Any) -> dict[str, Any]:
    """Steps with losses and gradient norms, evaluations, and the weights of the last layer."""
    log = trainer.state.log_history
    return {
        "loss": [(entry["step"], entry["loss"]) for entry in log if "loss" in entry],
        "norm": [(entry["step"], float(entry["grad_norm"])) for entry in log if "grad_norm" in entry],
        "eval": [(entry["step"], entry["eval_loss"]) for entry in log if "eval_loss" in entry],
        "steps": trainer.state.global_step,
        "weights": {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "layers.1." in n},
    }


def same_history(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["steps"] == expected["steps"]
    for key in ("loss", "norm", "eval"):
        assert [step for step, _ in found[key]] == [step for step, _ in expected[key]], key
        for (step, a), (_, b) in zip(found[key], expected[key], strict=True):
            assert abs(a - b) <= 2e-5 * abs(b) * (10 if key == "norm" else 1), (key, step, a, b)
    for name, weight in expected["weights"].items():
        assert (found["weights"][name] - weight).norm() <= 1e-3 * weight.norm(), name


def failure(call: Any) -> str:
    """What a call raises, in words."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"

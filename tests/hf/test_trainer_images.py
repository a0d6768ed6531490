"""Images through `SequenceTrainer`, against the stock Trainer in one process, each document alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate (pip install 'ringattn[hf]')")

from tests.hf.test_blocks import gemma3
from tests.hf.test_trainer_runs import taken_for_a_gpu
from tests.hf.trainer_runs import Row, arguments, history, mesh, same_history, trainer_of
from tests.hf.vision_models import IMAGE, VIDEO, qwen2_5_vl
from tests.pool import Pools

# Images of each row: of eight rows half have none, and two have several.
IMAGES = [0, 1, 3, 0, 0, 2, 0, 1]
GRIDS = torch.tensor([[1, 4, 4], [1, 4, 8]])  # of 4 and 8 tokens
IMAGES_OF = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
COMMON = {"input_ids": 0, "labels": -100, "attention_mask": 0}


class Gemma:
    """Images of 4 tokens, marked by token_type_ids."""

    make, marks = staticmethod(gemma3), "token_type_ids"

    @staticmethod
    def images(count: int, generator: torch.Generator) -> tuple[list[int], dict[str, Tensor]]:
        return [4] * count, {"pixel_values": torch.randn(count, 3, 16, 16, generator=generator)}


class Qwen:
    """Images of 4 and 8 tokens, told by image_grid_thw; positions count on several axes."""

    make, marks = staticmethod(qwen2_5_vl), "mm_token_type_ids"

    @staticmethod
    def images(count: int, generator: torch.Generator) -> tuple[list[int], dict[str, Tensor]]:
        grid = GRIDS[torch.randint(0, 2, (count,), generator=generator)]
        patches = grid.prod(-1)
        pixels = torch.randn(int(patches.sum()), 3 * 2 * 14 * 14, generator=generator)
        return (patches // 4).tolist(), {"pixel_values": pixels, "image_grid_thw": grid}


class QwenVideos(Qwen):
    """Its videos of 8 tokens, in two frames: of a row with several the first is an image, the others are videos."""

    @staticmethod
    def images(count: int, generator: torch.Generator) -> tuple[list[int], dict[str, Tensor]]:
        first = min(count, 1) if count > 1 else 0
        sizes, values = Qwen.images(first, generator)
        videos = count - first
        pixels = torch.randn(videos * 32, 3 * 2 * 14 * 14, generator=generator)
        grid = torch.tensor([[2, 4, 4]]).repeat(videos, 1)
        return sizes + [8] * videos, (values if first else {}) | {"pixel_values_videos": pixels, "video_grid_thw": grid}


FAMILIES: dict[str, Any] = {"gemma3": Gemma, "qwen2_5_vl": Qwen, "qwen2_5_vl videos": QwenVideos}


def make_rows(family: str, images: list[int] = IMAGES) -> list[Row]:
    """Rows of one document each, as a processor makes them, and a column that no model takes."""
    kind, generator = FAMILIES[family], torch.Generator().manual_seed(3)
    rows = []
    for count in images:
        ids = torch.randint(3, 97, (int(torch.randint(5, 9, (1,), generator=generator)),), generator=generator).tolist()
        sizes, values = kind.images(count, generator)
        for place, size in enumerate(sizes):
            video = kind is QwenVideos and (place > 0 or count == 1)
            ids += [VIDEO if video else IMAGE] * size + torch.randint(3, 97, (3,), generator=generator).tolist()
        row = {
            "input_ids": ids,
            "labels": [-100 if token in (IMAGE, VIDEO) else token for token in ids],
            "source": "a book",
        }
        rows.append(
            row | {kind.marks: [{IMAGE: 1, VIDEO: 2}.get(token, 0) for token in ids]} | (values if count else {})
        )
    return rows


def collate(rows: list[Row]) -> dict[str, Tensor]:
    """Padded rows; images of all rows end to end, and no such keys where there are none."""
    size = max(len(row["input_ids"]) for row in rows)
    batch: dict[str, Tensor] = {}
    for name in (name for name in rows[0] if name not in IMAGES_OF):
        batch[name] = torch.tensor([row[name] + [COMMON.get(name, 0)] * (size - len(row[name])) for row in rows])
    batch["attention_mask"] = torch.tensor(
        [[1] * len(row["input_ids"]) + [0] * (size - len(row["input_ids"])) for row in rows]
    )
    for name in IMAGES_OF:
        if found := [row[name] for row in rows if name in row]:
            batch[name] = torch.cat(found)
    return batch


def packed(rows: list[Row]) -> dict[str, Tensor]:
    """All documents in one row."""
    images = {name: x for name, x in collate(rows).items() if name in IMAGES_OF}
    alone = [
        {name: x for name, x in collate([row]).items() if name not in (*IMAGES_OF, "attention_mask")} for row in rows
    ]
    numbers = [number for number, row in enumerate(rows) for _ in row["input_ids"]]
    tokens = {name: torch.cat([row[name] for row in alone], 1) for name in alone[0]}
    return tokens | images | {"seq_idx": torch.tensor([numbers])}


STEPS: dict[str, Any] = {"num_train_epochs": 2, "max_grad_norm": 1.0, "eval_strategy": "epoch", "seed": 3}


def alone(folder: str, family: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Of the stock Trainer without ringattn: rows one by one, four of them a step."""
    from transformers import Trainer

    rows = make_rows(family)
    changes = STEPS | {"gradient_accumulation_steps": 4} | changes
    options = arguments(folder, **changes)
    trainer = Trainer(
        FAMILIES[family].make(), options, train_dataset=rows, eval_dataset=rows[1:2], data_collator=collate
    )
    trainer.model_accepts_loss_kwargs = True  # Qwen's is said not to, and its steps would be means of means
    trainer.train()
    return history(trainer)


def on_mesh(
    folder: str, family: str, data: int, ring: int, batch: int, changes: dict[str, Any], collator: Any = collate
) -> dict[str, Any]:
    rows = make_rows(family)
    steps: dict[str, Any] = {
        "gradient_accumulation_steps": max(1, 4 // batch // data),
        "per_device_train_batch_size": batch,
    }
    trainer = trainer_of(
        mesh(data, ring),
        folder,
        STEPS | steps | changes,
        model=FAMILIES[family].make(),
        train_dataset=rows,
        eval_dataset=rows[1:2],
        data_collator=collator,
    )
    trainer.train()
    return history(trainer)


# Replicas, sequence ranks, rows of a batch.
MESHES = [(1, 1, 2), (1, 2, 1), (1, 4, 4), (2, 2, 1), (2, 1, 2)]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_curve_of_documents_alone(pool: Pools, tmp_path: Any, family: str) -> None:
    (truth,) = pool(1).run(alone, str(tmp_path), family, {})
    for data, ring, batch in MESHES:
        for found in pool(data * ring).run(on_mesh, str(tmp_path), family, data, ring, batch, {}):
            same_history(found, truth)


@pytest.mark.parametrize("family", FAMILIES)
def test_documents_in_one_row(pool: Pools, tmp_path: Any, family: str) -> None:
    (truth,) = pool(1).run(alone, str(tmp_path), family, {})
    for found in pool(2).run(on_mesh, str(tmp_path), family, 1, 2, 4, {}, packed):
        same_history(found, truth)


def test_rows_by_length(pool: Pools, tmp_path: Any) -> None:
    """Rows are drawn here as on any mesh, and not as the stock Trainer draws them."""
    changes = {"train_sampling_strategy": "group_by_length"}
    (truth,) = pool(1).run(on_mesh, str(tmp_path), "qwen2_5_vl", 1, 1, 4, changes)
    for found in pool(4).run(on_mesh, str(tmp_path), "qwen2_5_vl", 2, 2, 1, changes):
        same_history(found, truth)


def without_images(rows: list[Row]) -> dict[str, Any]:
    """As a collator of text has it."""
    from transformers import DataCollatorWithFlattening

    return DataCollatorWithFlattening()([{name: row[name] for name in ("input_ids", "labels")} for row in rows])


def without(*names: str) -> Callable[[list[Row]], dict[str, Any]]:
    return lambda rows: {name: x for name, x in collate(rows).items() if name not in names}


REFUSALS: dict[str, tuple[str, Callable[[list[Row]], dict[str, Any]], type[Exception], str]] = {
    "no pixels": ("gemma3", without_images, ValueError, "input_ids have .* tokens of images .* no pixel_values: its"),
    "grids alone": ("qwen2_5_vl", without("pixel_values"), ValueError, "image_grid_thw: the batch has no pixel_values"),
    "no types": ("qwen2_5_vl", without("mm_token_type_ids"), ValueError, "its processor's mm_token_type_ids"),
    "other types": (
        "qwen2_5_vl",
        lambda rows: collate(rows) | {"mm_token_type_ids": torch.zeros_like(collate(rows)["input_ids"])},
        ValueError,
        "0 runs of image tokens and image_grid_thw 7 images",
    ),
}


def refused(folder: str, name: str) -> Any:
    family, collator, _, _ = REFUSALS[name]
    return on_mesh(folder, family, 1, 2, 8, {}, collator)["loss"]


@pytest.mark.parametrize("name", REFUSALS)
def test_batches_that_lost_something_are_refused(pool: Pools, tmp_path: Any, name: str) -> None:
    _, _, error, words = REFUSALS[name]
    with pytest.raises(error, match=words) as refusal:
        pool(2).run(refused, str(tmp_path), name)
    assert "failed too" in str(refusal.value.__cause__)


def empty(rows: list[Row]) -> dict[str, Tensor]:
    """Images of none, where some collators leave the keys out."""
    return {"pixel_values": torch.zeros(0, 3, 16, 16)} | collate(rows)


def test_no_images_as_an_empty_tensor(pool: Pools, tmp_path: Any) -> None:
    (truth,) = pool(1).run(alone, str(tmp_path), "gemma3", {})
    for found in pool(2).run(on_mesh, str(tmp_path), "gemma3", 2, 1, 1, {}, empty):
        same_history(found, truth)


def fsdp(folder: str) -> dict[str, Any]:
    """Layers of the tower are gathered by both replicas, of which one has images and the other none."""
    layers = ["Gemma3DecoderLayer", "SiglipEncoderLayer"]
    changes = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": layers}, "use_cpu": False}
    with taken_for_a_gpu():
        return on_mesh(folder, "gemma3", 2, 1, 1, changes) | {"weights": {}}


def test_replicas_without_images_run_a_sharded_tower(pool: Pools, tmp_path: Any) -> None:
    (truth,) = pool(1).run(alone, str(tmp_path), "gemma3", {})
    for found in pool(2).run(fsdp, str(tmp_path)):
        same_history(found, truth | {"weights": {}})


@pytest.mark.slow
def test_checkpointed_layers_and_micro_batches_without_images(pool: Pools, tmp_path: Any) -> None:
    """There the stock Trainer has gradients of all parameters waited for, and a tower without images gives none."""
    (truth,) = pool(1).run(alone, str(tmp_path), "gemma3", {})
    for found in pool(2).run(on_mesh, str(tmp_path), "gemma3", 1, 2, 1, {"gradient_checkpointing": True}):
        same_history(found, truth)
    changes = {"ddp_find_unused_parameters": False, "num_train_epochs": 1}
    (truth,) = pool(1).run(alone, str(tmp_path), "gemma3", {"num_train_epochs": 1})
    # Of two replicas one has an image in every micro-batch of this order, and lends it to the other.
    for found in pool(2).run(on_mesh, str(tmp_path), "gemma3", 2, 1, 1, changes):
        same_history(found, truth)
    with pytest.raises(ValueError, match="ddp_find_unused_parameters=False, and a micro-batch has no image"):
        pool(2).run(on_mesh, str(tmp_path), "gemma3", 1, 2, 1, changes)

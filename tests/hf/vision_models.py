"""Tiny multimodal models with batches of images and videos for them, and what stock transformers makes of these."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ringattn import Documents
from tests.hf.test_blocks import gemma3, paligemma
from tests.hf.test_images import llava, wide

transformers = pytest.importorskip("transformers")

# Ids of tokens that stand for features.
IMAGE = 100
VIDEO = 101


def qwen2_5_vl() -> Any:
    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "vocab_size": 120, "max_position_embeddings": 512}
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}}
    vision = {"depth": 2, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "intermediate_size": 32}
    vision |= {"fullatt_block_indexes": [1], "window_size": 56}
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO
    )
    return wide(transformers.Qwen2_5_VLForConditionalGeneration(config))


def deep_qwen3_vl() -> Any:
    """Its features enter before three layers of four: embeddings, and what two layers of the tower give."""
    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "vocab_size": 120, "max_position_embeddings": 512, "head_dim": 16}
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}}
    vision = {"depth": 3, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "intermediate_size": 32}
    vision |= {"patch_size": 14, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64}
    config = transformers.Qwen3VLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO
    )
    return wide(transformers.Qwen3VLForConditionalGeneration(config))


def fixed(marks: str, size: int, tokens: int) -> Callable[[list[int]], dict[str, Tensor]]:
    """A batch with images of so many tokens at these places."""

    def make(places: list[int]) -> dict[str, Tensor]:
        batch = text_batch()
        for place in places:
            batch["input_ids"][0, place : place + tokens] = IMAGE
        generator = torch.Generator().manual_seed(2)
        batch["pixel_values"] = torch.randn(len(places), 3, size, size, generator=generator)
        if marks:
            batch[marks] = (batch["input_ids"] == IMAGE).long()
        return batch

    return make


def prefixes(places: list[int]) -> dict[str, Tensor]:
    """PaliGemma's: an image and the words after it see each other, what is learned comes after them."""
    batch = fixed("", 16, 16)(places)
    types = torch.ones_like(batch["input_ids"])
    for place in places:
        types[0, place : place + 20] = 0
    return batch | {"token_type_ids": types}


def gridded(places: list[int]) -> dict[str, Tensor]:
    """Qwen's: images of 4 and of 8 tokens in turns, whose patches stand end to end."""
    batch, grid = text_batch(), torch.tensor([[1, 4, 4], [1, 4, 8]])[torch.arange(len(places)) % 2]
    for place, (_, height, width) in zip(places, grid.tolist(), strict=True):
        batch["input_ids"][0, place : place + height * width // 4] = IMAGE
    pixels = torch.randn(int(grid.prod(-1).sum()), 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(2))
    positions = torch.cat([torch.arange(size) for size in DOCS.lengths]).expand(3, 1, -1).clone()
    positions[1:] //= 2
    return batch | {"pixel_values": pixels, "image_grid_thw": grid, "position_ids": positions}


def with_videos(places: list[int]) -> dict[str, Tensor]:
    """Images at these places, and videos of 16, 8 and 16 tokens in the first and the last document."""
    batch, grid = gridded(places), torch.tensor([[2, 4, 8], [1, 4, 8], [4, 4, 4]])
    for start, stop in ((20, 36), (50, 58), (140, 148), (149, 157)):  # the last in two parts
        batch["input_ids"][0, start:stop] = VIDEO
    generator = torch.Generator().manual_seed(4)
    pixels = torch.randn(int(grid.prod(-1).sum()), 3 * 2 * 14 * 14, generator=generator)
    return batch | {"pixel_values_videos": pixels, "video_grid_thw": grid}


DOCS = Documents([70, 40, 50])


def text_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids, labels = (torch.randint(3, 97, (1, DOCS.total), generator=generator) for _ in range(2))
    return {"input_ids": ids, "labels": labels}


# Model, its batch, places of images. Three images on two and on four ranks: some have none.
MODELS: dict[str, tuple[Callable[[], Any], Callable[[list[int]], dict[str, Tensor]], list[int]]] = {
    "gemma3": (gemma3, fixed("token_type_ids", 16, 4), [3, 20, 112]),
    "paligemma": (lambda: paligemma("gemma"), prefixes, [0, 70, 110]),
    "llava": (lambda: with_token(llava()), fixed("", 16, 16), [3, 19, 120]),
    "qwen2_5_vl": (qwen2_5_vl, gridded, [2, 6, 80, 120, 130]),
    "qwen3_vl": (deep_qwen3_vl, gridded, [2, 6, 80, 120, 130]),
    "qwen2_5_vl videos": (qwen2_5_vl, with_videos, [2, 6, 80, 120, 130]),
    "qwen3_vl videos": (deep_qwen3_vl, with_videos, [2, 6, 80, 120, 130]),
}


def with_token(model: Any) -> Any:
    model.config.image_token_id = IMAGE
    return model


def alone(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The mean loss over all targets and its gradients, each document by itself with its own images."""
    losses, image, rows, video, video_rows = [], 0, 0, 0, 0
    for start, size in zip(DOCS.starts, DOCS.lengths, strict=True):
        part = {name: x[..., start : start + size] for name, x in batch.items() if x.shape[-1] == DOCS.total}
        labels = part.pop("labels")
        count = int(((part["input_ids"][0] == IMAGE).sum()) / tokens_of(batch))
        if "image_grid_thw" in batch:
            count = sum(start <= place < start + size for place in MODELS["qwen2_5_vl"][2])
            grid = batch["image_grid_thw"][image : image + count]
            patches = int(grid.prod(-1).sum())
            images = {"pixel_values": batch["pixel_values"][rows : rows + patches], "image_grid_thw": grid}
            rows += patches
        else:
            images = {"pixel_values": batch["pixel_values"][image : image + count]}
        image += count
        given = images if count else {}
        if count := sum(start <= place < start + size for place in (20, 50, 140) if "video_grid_thw" in batch):
            grid = batch["video_grid_thw"][video : video + count]
            patches = int(grid.prod(-1).sum())
            videos = batch["pixel_values_videos"][video_rows : video_rows + patches]
            given = given | {"pixel_values_videos": videos, "video_grid_thw": grid}
            video, video_rows = video + count, video_rows + patches
        logits = model(**part, **given, use_cache=False).logits[0]
        losses.append(nn.functional.cross_entropy(logits[:-1], labels[0, 1:], reduction="sum"))
    assert image == len(batch.get("image_grid_thw", batch["pixel_values"]))
    loss = sum(losses) / (DOCS.total - len(DOCS))
    loss.backward()
    return gradients(model, loss)


def tokens_of(batch: dict[str, Tensor]) -> float:
    return float((batch["input_ids"] == IMAGE).sum()) / len(batch["pixel_values"])


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    found = {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}
    model.zero_grad()
    return {"loss": loss.detach()} | found

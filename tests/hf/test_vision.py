"""Images of a batch, each computed on one rank, against stock transformers in one process: loss and all gradients."""

import copy
import io
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from ringattn import Documents
from ringattn.hf import parallelize, shard_batch
from ringattn.hf.axes import with_axes
from tests.hf.test_blocks import averaged, gemma3, paligemma
from tests.hf.test_images import llava, wide
from tests.parallel.ranks import mesh_of
from tests.pool import Pools

transformers = pytest.importorskip("transformers")

IMAGE = 100  # the id of tokens that stand for features


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


VIDEO = 101


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


@mock.patch.object(Tensor, "float", Tensor.double)  # norms of Gemma compute in float32 and would hide what is exact
def both(name: str, ranks: int, frozen: str) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """Of documents alone, of all ranks together, and how many images this rank computed."""
    mesh, (make, make_batch, places) = mesh_of(ranks, 1), MODELS[name]
    model = make().double()
    batch = {key: x.double() if x.is_floating_point() else x for key, x in make_batch(places).items()}
    for key, parameter in model.named_parameters():
        if "vision" in key or "visual" in key or (frozen == "projector too" and "projector" in key):
            parameter.requires_grad_(frozen == "nothing")
    model.set_attn_implementation("sdpa")  # eager attention has its softmax in float32
    truth = alone(model, batch)
    handle = parallelize(model, mesh, backend="reference")
    local = shard_batch(batch, DOCS, mesh, needs=handle.needs)
    sizes: list[int] = []
    part = next(x for key, x in model.named_modules() if key.endswith(("vision_tower", "visual")))
    hook = part.register_forward_pre_hook(lambda _, args, kw: sizes.append(rows_in(args, kw)), with_kwargs=True)
    targets, items, _ = (local.pop(key) for key in ("shift_labels", "num_items_in_batch", "labels"))
    logits = model(**local).logits[0]  # the loss of transformers is in float32
    loss = nn.functional.cross_entropy(logits, targets[0], reduction="sum") / items * ranks
    loss.backward()
    averaged(model, mesh)
    torch.distributed.all_reduce(loss.detach(), group=mesh.sequence_group)
    got = gradients(model, loss / ranks)
    handle.undo()
    hook.remove()
    again = alone(model, batch)
    assert all(torch.equal(again[key], x) for key, x in truth.items())
    return truth, got, sum(sizes)


def rows_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    return len(args[0] if args else kwargs["pixel_values"])


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(("name", "frozen"), [*((name, "nothing") for name in MODELS), ("gemma3", "tower")])
def test_images_dealt_out_are_those_of_one_process(pool: Pools, name: str, frozen: str, ranks: int) -> None:
    if (name, ranks) == ("paligemma", 2):
        frozen = "projector too"
    results = pool(ranks).run(both, name, ranks, frozen)
    for truth, got, _ in results:
        # A frozen tower has no gradient; what is trained has one on every rank, of an image or of none.
        assert set(truth) == set(got)
        assert any("vision" in key or "visual" in key for key in got) == (frozen == "nothing")
        for key, value in truth.items():
            torch.testing.assert_close(got[key], value, rtol=1e-12, atol=1e-12 * max(1.0, float(value.abs().max())))
    if name == "gemma3":
        computed = [count for *_, count in results]
        assert computed == {1: [3], 2: [2, 1], 4: [1, 1, 1, 1]}[ranks]  # the fourth one's counts nowhere


def sharded_by_fsdp() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One image, whose features one rank computes: weights of the tower are gathered on both."""
    mesh, model = mesh_of(2, 1), gemma3()
    batch = MODELS["gemma3"][1]([20])
    truth = alone(model, batch)
    handle = parallelize(model, mesh)
    for part in (model.model.vision_tower, *model.model.language_model.layers, model):
        fully_shard(part)
    out = model(**shard_batch(batch, DOCS, mesh, needs=handle.needs))
    out.loss.backward()
    got = {name: x.grad.full_tensor() for name, x in model.named_parameters() if x.grad is not None}
    return truth, got | {"loss": out.loss.detach()}


def test_towers_sharded_by_fsdp_are_gathered_where_no_image_is(pool: Pools) -> None:
    for truth, got in pool(2).run(sharded_by_fsdp):
        assert set(truth) == set(got)
        for key, value in truth.items():
            torch.testing.assert_close(got[key], value, rtol=1e-4, atol=1e-5 * max(1.0, float(value.abs().max())))


def copied() -> None:
    mesh, model = mesh_of(1, 1), gemma3()
    batch = MODELS["gemma3"][1]([3, 20, 112])
    handle = parallelize(model, mesh)
    local = shard_batch(batch, DOCS, mesh, needs=handle.needs)
    other = copy.deepcopy(model)
    for parameter in other.model.vision_tower.parameters():
        nn.init.zeros_(parameter)
    assert not torch.equal(model(**local).loss, other(**local).loss)  # each asks its own tower
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    handle = parallelize(loaded, mesh)
    assert torch.equal(model(**local).loss, loaded(**shard_batch(batch, DOCS, mesh, needs=handle.needs)).loss)
    handle.undo()
    assert "get_image_features" not in loaded.model.__dict__


def test_copies_have_towers_of_their_own(pool: Pools) -> None:
    pool(1).run(copied)


def test_positions_of_videos_are_those_of_each_document() -> None:
    """Frames of a video are runs of their own here, so that runs do not tell how many videos there are."""
    rule = deep_qwen3_vl().model.get_rope_index
    images, videos = torch.tensor([[1, 4, 4], [1, 4, 8]]), torch.tensor([[2, 4, 8], [1, 4, 8], [4, 4, 4]])
    types = torch.zeros(1, DOCS.total, dtype=torch.int64)
    for kind, start, size in ((1, 2, 4), (2, 20, 8), (2, 30, 8), (2, 50, 8), (1, 80, 8)):
        types[0, start : start + size] = kind
    for start in (115, 120, 125, 130):
        types[0, start : start + 4] = 2
    batch = {"input_ids": torch.arange(DOCS.total)[None], "mm_token_type_ids": types}
    grids = {"image_grid_thw": images, "video_grid_thw": videos}
    found = with_axes(batch | grids, DOCS, rule)["position_ids"]
    for (start, stop), image, video in (
        ((0, 70), images[:1], videos[:2]),
        ((70, 110), images[1:], None),
        ((110, 160), None, videos[2:]),
    ):
        part = {name: x[:, start:stop] for name, x in batch.items()}
        right, _ = rule(**part, image_grid_thw=image, video_grid_thw=video)
        assert torch.equal(found[:, :, start:stop], right)
    with pytest.raises(ValueError, match="a video must be in one document"):
        with_axes(batch | grids, Documents([25, 85, 50]), rule)


def refused(name: str) -> None:
    """On two ranks, before anything is sent."""
    model_name, change, _, _ = REFUSALS[name]
    make, make_batch, places = MODELS[model_name]
    model, mesh = make(), mesh_of(2, 1)
    batch = change(make_batch(places))
    handle = parallelize(model, mesh)
    if batch.pop("directly", None) is not None:
        pixels = batch.pop("pixel_values")
        batch["input_ids"] = batch["input_ids"].clamp(max=IMAGE - 1)
        model(**shard_batch(batch, DOCS, mesh, needs=handle.needs), pixel_values=pixels)
    docs = batch.pop("docs", DOCS)
    needs = None if batch.pop("no needs", None) else handle.needs
    local = shard_batch(batch, docs, mesh, needs=needs)
    model(**local)


def without(*names: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda batch: {name: x for name, x in batch.items() if name not in names}


def with_ids(batch: dict[str, Any], places: slice, value: int) -> dict[str, Any]:
    ids = batch["input_ids"].clone()
    ids[0, places] = value
    return batch | {"input_ids": ids}


Change = Callable[[dict[str, Any]], dict[str, Any]]
REFUSALS: dict[str, tuple[str, Change, type[Exception], str]] = {
    "no needs": ("gemma3", lambda batch: batch | {"no needs": True}, NotImplementedError, "needs=handle.needs"),
    "no types": ("gemma3", without("token_type_ids"), NotImplementedError, "pixel_values without token_type_ids"),
    "no axes": ("qwen2_5_vl", without("position_ids"), ValueError, r"position_ids must be \(axes, B, S\) beside pixel"),
    "not dealt out": ("gemma3", lambda batch: batch | {"directly": True}, NotImplementedError, "come from shard_batch"),
    "of nobody": ("llava", lambda batch: with_ids(batch, slice(134, 136), 5), ValueError, "46 tokens .* 3 images"),
    "too few tokens": (
        "llava",
        lambda batch: with_ids(batch, slice(3, 6), 5),
        ValueError,
        "30 tokens in input_ids, and 32 features|15 tokens",
    ),
    "patches": ("qwen2_5_vl", lambda batch: with_ids(batch, slice(2, 3), 5), ValueError, "27 tokens .* patches"),
    "embeddings": (
        "llava",
        lambda batch: without("input_ids")(batch) | {"inputs_embeds": torch.zeros(1, DOCS.total, 64)},
        ValueError,
        "pixel_values need input_ids",
    ),
    "in padding": (
        "llava",
        lambda batch: batch | {"docs": Documents([70, 40], total=160)},
        ValueError,
        "images in padding",
    ),
    "sounds": (
        "qwen2_5_vl",
        lambda batch: batch | {"input_features": torch.zeros(4, 4)},
        NotImplementedError,
        "input_features: not taken by this model, whose get_image_features takes pixel_values, image_grid_thw; get_vid",
    ),
    "no grid": (
        "qwen2_5_vl",
        lambda batch: batch | {"pixel_values_videos": torch.zeros(4, 4)},
        ValueError,
        "pixel_values_videos of this model need video_grid_thw",
    ),
    "no video tokens": (
        "qwen2_5_vl",
        lambda batch: batch | {"pixel_values_videos": torch.zeros(4, 4), "video_grid_thw": torch.tensor([[1, 2, 2]])},
        ValueError,
        "pixel_values_videos are 1 videos, and input_ids have no tokens",
    ),
    "a grid alone": (
        "qwen2_5_vl",
        lambda batch: batch | {"video_grid_thw": torch.tensor([[1, 2, 2]])},
        ValueError,
        "video_grid_thw: the batch has no pixel_values_videos",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_other_images_are_refused_on_both_ranks(pool: Pools, name: str) -> None:
    _, _, error, words = REFUSALS[name]
    with pytest.raises(error, match=words) as refusal:
        pool(2).run(refused, name)
    assert "failed too" in str(refusal.value.__cause__)

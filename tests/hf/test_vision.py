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
from tests.hf.test_blocks import averaged, gemma3
from tests.hf.vision_models import DOCS, IMAGE, MODELS, alone, deep_qwen3_vl, gradients
from tests.parallel.ranks import mesh_of
from tests.pool import Pools


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


@pytest.mark.parametrize(
    ("name", "frozen", "ranks"),
    [
        *((name, "nothing", ranks) for name in MODELS for ranks in ((2, 4) if "videos" in name else (1, 2, 4))),
        *(("gemma3", "tower", ranks) for ranks in (1, 2, 4)),
    ],
)
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

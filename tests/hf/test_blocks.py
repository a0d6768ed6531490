"""Models whose images and prefixes see each other, over ranks, against each document alone in stock transformers."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ringattn import Documents, Mask, MeshShape, SequenceMesh
from ringattn.hf import parallelize, shard_batch, shifted_labels
from ringattn.hf.images import embedding_needs
from ringattn.hf.tiny import read_config, tiny_config
from tests.hf.test_images import VISION, wide
from tests.parallel.ranks import mesh_of
from tests.pool import Pools

transformers = pytest.importorskip("transformers")

DOCS = Documents([21, 14, 30])
HIDDEN = 64


def text(family: str, **changes: Any) -> Any:
    return tiny_config(read_config(family), vocab_size=120, **changes)


def gemma3() -> Any:
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    config = transformers.Gemma3Config(
        text_config=text("gemma3_text", num_hidden_layers=3, layer_types=layers, sliding_window=6),
        vision_config=transformers.SiglipVisionConfig(**VISION, image_size=16, patch_size=4, vision_use_head=False),
        mm_tokens_per_image=4,
        image_token_id=100,
    )
    return wide(transformers.Gemma3ForConditionalGeneration(config))


def gemma4() -> Any:
    small = text("gemma4_text", sliding_window=6, hidden_size_per_layer_input=0, use_bidirectional_attention="vision")
    config = transformers.Gemma4Config(
        text_config=small,
        vision_config=None,
        audio_config=None,
        image_token_id=100,
        video_token_id=101,
        audio_token_id=102,
    )
    return wide(transformers.Gemma4ForConditionalGeneration(config))


def paligemma(family: str, **changes: Any) -> Any:
    config = transformers.PaliGemmaConfig(
        text_config=text(family, **changes),
        vision_config=transformers.SiglipVisionConfig(**VISION, image_size=16, patch_size=4),
        projection_dim=HIDDEN,
        image_token_index=100,
    )
    return wide(transformers.PaliGemmaForConditionalGeneration(config))


def molmo2() -> Any:
    text_config = {"hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    text_config |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 120, "additional_vocab_size": 8}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"num_key_value_heads": 2, "head_dim": 16, "image_size": [28, 28]}
    adapter = {"hidden_size": 32, "text_hidden_size": HIDDEN, "intermediate_size": 32, "num_attention_heads": 2}
    adapter |= {"num_key_value_heads": 2, "head_dim": 16, "vision_feature_layer": [0, 1]}
    config = transformers.Molmo2Config(
        text_config=text_config, vision_config=vision, adapter_config=adapter, image_token_id=100
    )
    return wide(transformers.Molmo2ForConditionalGeneration(config))


def one_image_each() -> Tensor:
    types = torch.zeros(1, DOCS.total, dtype=torch.int64)
    for start, stop in ((2, 11), (21, 30), (50, 65)):
        types[0, start:stop] = 1
    return types


def types_of_images() -> Tensor:
    """Images longer and shorter than a window, at the edges of documents and side by side."""
    types = torch.zeros(1, DOCS.total, dtype=torch.int64)
    for start, stop in ((2, 11), (15, 18), (21, 30), (34, 36), (45, 53), (54, 55)):
        types[0, start:stop] = 1
    return types


def types_of_prefixes() -> Tensor:
    types = torch.ones(1, DOCS.total, dtype=torch.int64)
    for start, stop in ((0, 12), (21, 25), (35, 60)):
        types[0, start:stop] = 0
    return types


MODELS = {
    "gemma3": (gemma3, "token_type_ids", types_of_images),
    "gemma4": (gemma4, "mm_token_type_ids", types_of_images),
    "molmo2": (molmo2, "mm_token_type_ids", one_image_each),
    "paligemma": (lambda: paligemma("gemma"), "token_type_ids", types_of_prefixes),
    "paligemma2": (
        lambda: paligemma(
            "gemma2", sliding_window=6, num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"]
        ),
        "token_type_ids",
        types_of_prefixes,
    ),
}


def batch_of(name: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    embeddings = torch.randn(1, DOCS.total, HIDDEN, generator=generator)
    labels = torch.randint(3, 97, (1, DOCS.total), generator=generator)
    return {"inputs_embeds": embeddings, "labels": labels, MODELS[name][1]: MODELS[name][2]()}


def alone(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits, the mean loss over all targets and its gradients, each document by itself."""
    parts, losses = [], []
    for start, size in zip(DOCS.starts, DOCS.lengths, strict=True):
        part = {name: x[:, start : start + size] for name, x in batch.items()}
        labels = part.pop("labels")
        logits = model(**part, use_cache=False).logits[0]
        parts.append(logits)
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], labels[0, 1:], reduction="sum"))
    loss = sum(losses) / (DOCS.total - len(DOCS))
    loss.backward()
    return found(model, loss, torch.cat(parts))


def found(model: Any, loss: Tensor, logits: Tensor) -> dict[str, Tensor]:
    grads = {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}
    model.zero_grad()
    return {"loss": loss.detach(), "logits": logits.detach()} | grads


def averaged(model: Any, mesh: SequenceMesh) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            torch.distributed.all_reduce(parameter.grad, group=mesh.sequence_group)
            parameter.grad /= mesh.sequence_size


def both(name: str, ring: int, ulysses: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of documents alone, and of all ranks together."""
    mesh = mesh_of(ring, ulysses)
    model, batch = MODELS[name][0](), batch_of(name)
    truth = alone(model, batch)
    handle = parallelize(model, mesh)
    local = shard_batch(batch, DOCS, mesh, needs=handle.needs)
    out = model(**local)
    out.loss.backward()
    averaged(model, mesh)
    return truth, found(model, out.loss, local["cu_seq_lens_q"].unshard(out.logits[0].detach()))


@pytest.mark.parametrize(("ring", "ulysses"), [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("name", MODELS)
def test_images_and_prefixes_see_what_they_see_in_one_process(pool: Pools, name: str, ring: int, ulysses: int) -> None:
    for truth, got in pool(ring * ulysses).run(both, name, ring, ulysses):
        assert set(truth) == set(got)
        for key, value in truth.items():
            torch.testing.assert_close(got[key], value, rtol=1e-5, atol=1e-5 * max(1.0, float(value.abs().max())))


def without_blocks(name: str) -> float:
    """How far logits are from those of documents whose types are all of text."""
    model, batch = MODELS[name][0](), batch_of(name)
    truth = alone(model, batch)["logits"]
    marks = MODELS[name][1]
    plain = torch.ones_like(batch[marks]) if "pali" in name else torch.zeros_like(batch[marks])
    return float((alone(model, batch | {marks: plain})["logits"] - truth).abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_blocks_count(pool: Pools, name: str) -> None:
    assert pool(1).run(without_blocks, name)[0] > 1e-2


def prefix_lm(ring: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A decoder of text with prefixes that the documents say, against a mask of all pairs."""
    mesh = mesh_of(ring, 1)
    model = wide(transformers.AutoModelForCausalLM.from_config(text("llama")))
    docs = Documents(DOCS.lengths, blocks=[(0, 12), (21, 25), (35, 60)])
    ids = torch.randint(3, 97, (1, docs.total), generator=torch.Generator().manual_seed(1))
    allowed = docs.dense(Mask())[None, None]
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    logits = model(ids, attention_mask=mask, position_ids=docs.position_ids()[None], use_cache=False).logits[0]
    loss = torch.nn.functional.cross_entropy(logits, shifted_labels(ids[0], docs))
    loss.backward()
    truth = found(model, loss, logits)
    parallelize(model, mesh)
    local = shard_batch({"input_ids": ids, "labels": ids}, docs, mesh)
    out = model(**local)
    out.loss.backward()
    averaged(model, mesh)
    return truth, found(model, out.loss, local["cu_seq_lens_q"].unshard(out.logits[0].detach()))


@pytest.mark.parametrize("ring", [1, 2])
def test_a_prefix_lm(pool: Pools, ring: int) -> None:
    for truth, got in pool(ring).run(prefix_lm, ring):
        for key, value in truth.items():
            torch.testing.assert_close(got[key], value, rtol=1e-5, atol=1e-5 * max(1.0, float(value.abs().max())))


PROMPT, COMPLETIONS = 40, (12, 9, 17, 12, 1, 5, 12, 20)
TREE = Documents.from_tree([PROMPT, *COMPLETIONS], [-1, *[0] * len(COMPLETIONS)])


def tree(family: str, ring: int, ulysses: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A model on completions of one prompt: each sequence by itself, and all as a tree over ranks.

    The loss weighs the logits of each row of the tree; of separate sequences the first has the prompt's rows.
    """
    mesh = mesh_of(ring, ulysses)
    model = wide(transformers.AutoModelForCausalLM.from_config(text(family)))
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 97, (1, TREE.total), generator=generator)
    weights = torch.randn(TREE.total, 120, generator=generator)
    rows, start = [], PROMPT
    for size in COMPLETIONS:
        sequence = torch.cat([ids[:, :PROMPT], ids[:, start : start + size]], 1)
        logits = model(sequence, use_cache=False).logits[0]
        rows += [logits[:PROMPT], logits[PROMPT:]] if not rows else [logits[PROMPT:]]
        start += size
    whole = torch.cat(rows)
    loss = (whole * weights).sum()
    loss.backward()
    truth = found(model, loss, whole)
    parallelize(model, mesh)
    local = shard_batch({"input_ids": ids}, TREE, mesh)
    layout = local["cu_seq_lens_q"]
    logits = model(**local).logits[0]
    (logits * layout.shard(weights)).sum().backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            torch.distributed.all_reduce(parameter.grad, group=mesh.sequence_group)
    together = layout.unshard(logits.detach())
    return truth, found(model, (together * weights).sum(), together)


@pytest.mark.parametrize(("ring", "ulysses"), [(1, 1), (2, 1), (4, 1), (2, 2)])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_completions_of_one_prompt_are_separate_sequences(pool: Pools, family: str, ring: int, ulysses: int) -> None:
    for truth, got in pool(ring * ulysses).run(tree, family, ring, ulysses):
        assert set(truth) == set(got)
        for key, value in truth.items():
            torch.testing.assert_close(got[key], value, rtol=1e-5, atol=1e-5 * max(1.0, float(value.abs().max())))


def misused(kind: str) -> None:
    mesh = mesh_of(2, 1)
    model, batch = gemma3(), batch_of("gemma3")
    handle = parallelize(model, mesh)
    if kind == "needs missing":
        model(**shard_batch(batch, DOCS, mesh))
    elif kind == "types missing":
        docs = Documents(DOCS.lengths, blocks=[(2, 11)])
        model(**shard_batch({"input_ids": batch["labels"]}, docs, mesh, needs=handle.needs))
    elif kind == "other blocks":
        shard_batch(batch, Documents(DOCS.lengths, blocks=[(2, 11)]), mesh, needs=handle.needs)
    elif kind == "the same blocks":
        docs = handle.needs.rule.blocks(types_of_images()[0], DOCS)
        types = types_of_images()
        types[0, [34, 35, 54]] = 0  # one token of a document sees itself as it is
        model(**shard_batch(batch | {"token_type_ids": types}, docs, mesh))
    elif kind == "two prefixes":
        types = types_of_prefixes()
        types[0, 15:18] = 0
        needs = parallelize(paligemma("gemma"), mesh).needs
        shard_batch(batch | {"token_type_ids": types}, DOCS, mesh, needs=needs)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("needs missing", "token_type_ids mark tokens of an image or a prefix, .*needs=handle.needs"),
        ("types missing", "documents have blocks, and token_type_ids are missing"),
        ("other blocks", "docs and token_type_ids disagree about blocks"),
        ("two prefixes", "block_ids must hold each block in one run"),
        ("the same blocks", ""),
    ],
)
def test_blocks_that_do_not_fit_are_refused_on_all_ranks(pool: Pools, kind: str, words: str) -> None:
    if not words:
        pool(2).run(misused, kind)
        return
    with pytest.raises(ValueError, match=words) as refusal:
        pool(2).run(misused, kind)
    assert "failed too" in str(refusal.value.__cause__)


def masks_of_builders() -> dict[str, tuple[Mask, bool]]:
    """What is read of masks that transformers composes in the ways of its families."""
    from transformers import masking_utils

    model = wide(transformers.AutoModelForCausalLM.from_config(text("mistral", sliding_window=6)))
    parallelize(model, mesh_of(1, 1))
    ids = torch.full((1, 8), -1)
    causal, sliding = masking_utils.create_causal_mask, masking_utils.create_sliding_window_causal_mask
    overlay, window = masking_utils.blockwise_overlay(ids), masking_utils.sliding_window_overlay(6)
    notes = {
        "text": causal(model.config, torch.zeros(1, 8, 64), None, None),
        "blocks": causal(model.config, torch.zeros(1, 8, 64), None, None, block_sequence_ids=ids),
        "window or block": sliding(model.config, torch.zeros(1, 8, 64), None, None, block_sequence_ids=ids),
        "block in window": causal(
            model.config, torch.zeros(1, 8, 64), None, None, or_mask_function=overlay, and_mask_function=window
        ),
    }
    return {name: (note.mask, note.overlay) for name, note in notes.items()}


def test_masks_with_blocks_are_read_by_their_parts_alone(pool: Pools) -> None:
    """Not by the ids in them: a rank sees those of its own tokens."""
    (found,) = pool(1).run(masks_of_builders)
    assert found == {
        "text": (Mask(), False),
        "blocks": (Mask(), True),
        "window or block": (Mask(window=(5, -1)), True),
        "block in window": (Mask(window=(5, -1), blocks="clipped"), True),
    }


def test_a_block_in_two_places_is_refused() -> None:
    """All images of a document are one block to Molmo 2, and what is between them is not in it."""
    needs = embedding_needs(molmo2())
    types = one_image_each()
    types[0, 15:18] = 1
    batch = batch_of("molmo2") | {"mm_token_type_ids": types}
    with pytest.raises(ValueError, match=r"wherever they stand .* comes back at token 15"):
        shard_batch(batch, DOCS, MeshShape(ring=2, sequence_rank=0), needs=needs)


def test_pixels_of_molmo2_are_refused() -> None:
    """Its crops are pooled by their numbers in the whole batch."""
    ids = torch.where(one_image_each() == 1, 100, 5)
    batch = {"input_ids": ids, "mm_token_type_ids": one_image_each(), "pixel_values": torch.zeros(3, 4, 588)}
    batch |= {"image_token_pooling": torch.zeros(33, 4, dtype=torch.int64), "image_grids": torch.ones(3, 4)}
    with pytest.raises(
        NotImplementedError, match="image_token_pooling must have a row for each of the 3 images, got 33"
    ):
        shard_batch(batch, DOCS, MeshShape(ring=2, sequence_rank=0), needs=embedding_needs(molmo2()))

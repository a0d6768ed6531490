"""Multimodal models: embeddings are taken where they are all that the decoder needs, and refused by name elsewhere."""

from typing import Any

import pytest
import torch
from torch import nn

from ringattn import Documents
from ringattn.hf import parallelize, shard_batch
from ringattn.hf.images import embedding_needs
from ringattn.hf.tiny import read_config, tiny_config
from tests.parallel.ranks import mesh_of
from tests.pool import Pools

transformers = pytest.importorskip("transformers")

DOCS = Documents([9, 11])
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def gemma3() -> Any:
    vision = transformers.SiglipVisionConfig(**VISION, image_size=16, patch_size=4)
    text = tiny_config(read_config("gemma3_text"), vocab_size=120)
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_id=100
    )
    return wide(transformers.Gemma3ForConditionalGeneration(config))


def llava() -> Any:
    vision = transformers.CLIPVisionConfig(**VISION, image_size=16, patch_size=4)
    text = tiny_config(read_config("llama"), vocab_size=120)
    return wide(
        transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(vision_config=vision, text_config=text))
    )


def qwen2_vl() -> Any:
    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "vocab_size": 120, "max_position_embeddings": 512}
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2}
    return wide(
        transformers.Qwen2VLForConditionalGeneration(transformers.Qwen2VLConfig(text_config=text, vision_config=vision))
    )


def qwen3_vl() -> Any:
    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "vocab_size": 120, "head_dim": 16}
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}}
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 64, "deepstack_visual_indexes": [0]}
    return wide(
        transformers.Qwen3VLForConditionalGeneration(transformers.Qwen3VLConfig(text_config=text, vision_config=vision))
    )


def wide(model: Any) -> Any:
    """Wide weights, so that what changes shows."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.12)
    model.set_attn_implementation("eager")
    return model.eval()


MODELS = {"gemma3": gemma3, "llava": llava, "qwen2_vl": qwen2_vl, "qwen3_vl": qwen3_vl}
EMBEDDINGS = torch.randn(1, 20, 64, generator=torch.Generator().manual_seed(1))
ZEROS = torch.zeros(1, 20, dtype=torch.int64)
IMAGE = ZEROS.clone()
IMAGE[0, 3:7] = 1
IDS = torch.randint(3, 97, (1, 20), generator=torch.Generator().manual_seed(1))
AXES = torch.stack([torch.cat([torch.arange(9), torch.arange(11)])] * 3)[:, None]
AXES[1:, 0, 12:15] = 5  # an image: its height and width count from one place


# Model, batch; None where all ranks together must be each document alone, else the error.
CASES: dict[str, tuple[str, dict[str, Any], type[Exception] | None, str]] = {
    "gemma3, embeddings": ("gemma3", {"inputs_embeds": EMBEDDINGS}, NotImplementedError, "without token_type_ids"),
    "gemma3, an image": (
        "gemma3",
        {"inputs_embeds": EMBEDDINGS, "token_type_ids": IMAGE},
        ValueError,
        "token_type_ids mark tokens of an image .* needs=handle.needs",
    ),
    "gemma3, ids with an image": (
        "gemma3",
        {"input_ids": IDS, "token_type_ids": IMAGE},
        ValueError,
        "token_type_ids mark tokens of an image .* needs=handle.needs",
    ),
    "gemma3, embeddings of text": ("gemma3", {"inputs_embeds": EMBEDDINGS, "token_type_ids": ZEROS}, None, ""),
    "gemma3, text": ("gemma3", {"input_ids": IDS}, None, ""),
    "gemma3, text and its type": ("gemma3", {"input_ids": IDS, "token_type_ids": ZEROS}, None, ""),
    "llava, embeddings": ("llava", {"inputs_embeds": EMBEDDINGS}, None, ""),
    "qwen2_vl, embeddings": ("qwen2_vl", {"inputs_embeds": EMBEDDINGS}, ValueError, r"position_ids must be \(axes"),
    "qwen2_vl, embeddings and axes": ("qwen2_vl", {"inputs_embeds": EMBEDDINGS, "position_ids": AXES}, None, ""),
    "qwen2_vl, text": ("qwen2_vl", {"input_ids": IDS}, None, ""),
    "qwen3_vl, embeddings": (
        "qwen3_vl",
        {"inputs_embeds": EMBEDDINGS, "position_ids": AXES},
        NotImplementedError,
        "features enter by deepstack_visual_embeds, visual_pos_masks too",
    ),
    "qwen3_vl, text": ("qwen3_vl", {"input_ids": IDS}, None, ""),
}


def logits_of(case: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Of documents alone, and of two ranks."""
    model_name, batch, *_ = CASES[case]
    model = MODELS[model_name]()
    parts = []
    for start, size in zip(DOCS.starts, DOCS.lengths, strict=True):
        part = {
            name: x[..., start : start + size, :] if name == "inputs_embeds" else x[..., start : start + size]
            for name, x in batch.items()
        }
        parts.append(model(**part, use_cache=False).logits[0].detach())
    parallelize(model, mesh_of(2, 1))
    local = shard_batch(batch, DOCS, mesh_of(2, 1), policy="contiguous")
    return torch.cat(parts), local["cu_seq_lens_q"].unshard(model(**local).logits[0].detach())


@pytest.mark.parametrize("case", CASES)
def test_embeddings_are_taken_exactly_or_refused_on_both_ranks(pool: Pools, case: str) -> None:
    *_, error, words = CASES[case]
    if error is None:
        for truth, found in pool(2).run(logits_of, case):
            torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-5)
        return
    with pytest.raises(error, match=words) as refusal:
        pool(2).run(logits_of, case)
    assert "failed too" in str(refusal.value.__cause__)  # on both ranks, wherever the image is


def test_what_embeddings_lack_is_read_from_the_model() -> None:
    """Read from the models themselves: what transformers' own say."""
    needs = {name: embedding_needs(make()) for name, make in MODELS.items()}
    assert needs["gemma3"].marks == "token_type_ids"
    assert not needs["llava"].marks
    assert not needs["llava"].several
    assert not needs["llava"].axes
    assert needs["qwen2_vl"].axes
    assert needs["qwen3_vl"].several == ("deepstack_visual_embeds", "visual_pos_masks")
    with torch.device("meta"):
        gemma4 = transformers.AutoModelForImageTextToText.from_config(read_config("gemma4"))
        paligemma = transformers.AutoModelForImageTextToText.from_config(read_config("paligemma"))
    assert not embedding_needs(gemma4).marks  # its small models are causal over images too
    gemma4.config.text_config.use_bidirectional_attention = "vision"
    assert embedding_needs(gemma4).marks == "mm_token_type_ids"
    assert embedding_needs(gemma4).several == ("per_layer_inputs",)
    assert embedding_needs(paligemma).marks == "token_type_ids"

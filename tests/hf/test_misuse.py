"""What a parallelized model refuses, by name and before any communication."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ringattn import Documents
from ringattn.hf import parallelize, shard_batch
from ringattn.hf.tiny import read_config, tiny_config, tiny_model
from tests.hf.families import FAMILIES
from tests.parallel.ranks import mesh_of
from tests.pool import Pools

transformers = pytest.importorskip("transformers")
IDS = torch.arange(1, 9)[None]


def fresh(family: str = "llama", **changes: Any) -> Any:
    return tiny_model(tiny_config(read_config(family), **FAMILIES[family], **changes))


def good() -> dict[str, Any]:
    return shard_batch({"input_ids": IDS, "labels": IDS}, Documents([5, 3]), mesh_of(1, 1))


def called(**changes: Any) -> Callable[[Any], Any]:
    """A forward pass with keywords of a good batch changed; None takes one away."""

    def call(model: Any) -> Any:
        keywords = good() | changes
        return model(**{name: value for name, value in keywords.items() if value is not None})

    return call


CALLS: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "no layout": (called(cu_seq_lens_q=None), ValueError, "shard_batch"),
    "cu_seqlens": (called(cu_seq_lens_q=torch.tensor([0, 5, 8])), ValueError, "got cu_seq_lens_q=a tensor"),
    "2-D mask": (called(attention_mask=torch.ones(1, 8)), ValueError, "attention_mask must be None"),
    "4-D mask": (called(attention_mask=torch.ones(1, 1, 8, 8)), ValueError, r"None, got .*\(1, 1, 8, 8\)"),
    "cache": (called(use_cache=True), ValueError, "use_cache must be False"),
    "past": (
        called(past_key_values=transformers.DynamicCache()),
        NotImplementedError,
        r"KV caches .* handle.undo\(\)",
    ),
    "generate": (lambda model: model.generate(IDS, max_new_tokens=2), ValueError, r"handle.undo\(\)"),
    "attentions": (called(output_attentions=True), NotImplementedError, "output_attentions"),
    "keyword": (called(sofcap=1.0), TypeError, "sofcap"),
    "bias": (called(position_bias=torch.zeros(1)), NotImplementedError, "position_bias: an additive bias"),
    "batch": (called(input_ids=IDS.repeat(2, 1)), ValueError, "a batch size of 1, got"),
    "whole ids": (called(input_ids=torch.arange(16)[None]), ValueError, r"8 tokens in one row.*\(1, 16\)"),
    "no positions": (called(position_ids=None), ValueError, "position_ids are missing"),
    "positions": (called(position_ids=torch.arange(4)[None]), ValueError, r"position_ids must be \(1, 8\)"),
    "labels alone": (called(shift_labels=None), ValueError, "labels need shift_labels"),
    "no count": (called(num_items_in_batch=None), ValueError, "labels need .* num_items_in_batch"),
    "last logits": (called(logits_to_keep=1), ValueError, "logits_to_keep"),
    "images": (called(pixel_values=torch.zeros(1, 3, 8, 8)), NotImplementedError, "must come from shard_batch"),
    "twice": (lambda model: parallelize(model, mesh_of(1, 1)), ValueError, "parallelized already"),
    "inner model": (lambda model: model.model(input_ids=IDS, use_cache=False), ValueError, "shard_batch"),
}


def misused(name: str) -> None:
    model = fresh()
    parallelize(model, mesh_of(1, 1))
    CALLS[name][0](model)


@pytest.mark.parametrize("name", CALLS)
def test_calls_that_would_not_be_exact_are_refused(pool: Pools, name: str) -> None:
    _, error, words = CALLS[name]
    with pytest.raises(error, match=words):
        pool(1).run(misused, name)


def marked(**attributes: Any) -> Any:
    """A model as from_pretrained leaves it with tp_plan or device_map."""
    model = fresh()
    model.__dict__.update(attributes)
    return model


MODELS: dict[str, tuple[Callable[[], Any], dict[str, Any], type[Exception], str]] = {
    "no model": (lambda: torch.nn.Linear(2, 2), {}, ValueError, "got Linear"),
    "option": (fresh, {"shceme": "ring"}, TypeError, "shceme"),
    "classifier": (
        lambda: transformers.LlamaForSequenceClassification(fresh().config),
        {},
        NotImplementedError,
        "LlamaForSequenceClassification has a head that may look at a whole sequence",
    ),
    "two heads": (
        lambda: transformers.GPT2DoubleHeadsModel(fresh("gpt2", num_labels=1).config),
        {},
        NotImplementedError,
        "GPT2DoubleHeadsModel has a head",
    ),
    "tensor parallel": (lambda: marked(_tp_size=2), {}, NotImplementedError, "tensor parallel over 2 ranks"),
    "several devices": (
        lambda: marked(hf_device_map={"model.layers.0": 0, "model.layers.1": 1}),
        {},
        NotImplementedError,
        r"spread over the devices 0, 1 \(device_map\)",
    ),
    "cross attention": (lambda: fresh("gpt2", add_cross_attention=True), {}, NotImplementedError, "cross attention"),
}


def parallelized(name: str) -> None:
    make, options, *_ = MODELS[name]
    parallelize(make(), mesh_of(1, 1), **options)


@pytest.mark.parametrize("name", MODELS)
def test_models_that_would_not_be_exact_are_refused_by_name(pool: Pools, name: str) -> None:
    *_, error, words = MODELS[name]
    with pytest.raises(error, match=words):
        pool(1).run(parallelized, name)


def dropout() -> None:
    model = fresh(attention_dropout=0.1)
    parallelize(model, mesh_of(1, 1))
    model(**good())  # evaluation has no dropout
    model.train()
    model(**good())


def test_a_model_with_attention_dropout_is_refused(pool: Pools) -> None:
    with pytest.raises(NotImplementedError, match=r"LlamaAttention asks for an attention dropout of 0.1"):
        pool(1).run(dropout)


LIMITS: dict[str, tuple[str, dict[str, Any], str]] = {
    "dynamic": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, "max_position_embeddings": 8},
        "rope_type='dynamic' .* exact up to 8 tokens, got 9",
    ),
    "longrope": (
        "phi3",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "short_factor": [1.0] * 8,
                "long_factor": [4.0] * 8,
                "rope_theta": 1e4,
                "original_max_position_embeddings": 8,
            },
            "original_max_position_embeddings": 8,
        },
        "rope_type='longrope' .* exact up to 8 tokens, got 9",
    ),
    "temperature": ("llama4_text", {"floor_scale": 9}, "attn_temperature_tuning .* exact up to 8 tokens, got 9"),
}


def limited(name: str, tokens: int, first: int = 0) -> None:
    family, changes, _ = LIMITS[name]
    model = fresh(family, **changes)
    parallelize(model, mesh_of(1, 1))
    batch = {"input_ids": torch.arange(3, 3 + tokens)[None], "position_ids": torch.arange(first, first + tokens)[None]}
    model(**shard_batch(batch, Documents([tokens]), mesh_of(1, 1)))


@pytest.mark.parametrize("name", LIMITS)
def test_what_depends_on_the_length_of_a_call(pool: Pools, name: str) -> None:
    pool(1).run(limited, name, 8)
    with pytest.raises(NotImplementedError, match=LIMITS[name][2]):
        pool(1).run(limited, name, 9)
    with pytest.raises(NotImplementedError, match=LIMITS[name][2]):
        pool(1).run(limited, name, 4, 5)


def contradiction(kind: str) -> None:
    model = fresh("mistral")
    parallelize(model, mesh_of(1, 1))
    for layer in model.model.layers:
        if kind == "window":
            layer.self_attn.sliding_window = 4
            layer.self_attn.config.sliding_window = 4
        else:
            layer.self_attn.is_causal = False
    if kind == "window":  # the keyword is read from the configuration, the mask was too: make it another one
        model.model.config = type(model.config)(**{**model.config.to_dict(), "sliding_window": 5})
        model.model.config._attn_implementation = "ringattn"
    model(**good())


@pytest.mark.parametrize("kind", ["window", "causal"])
def test_mask_and_keywords_that_disagree(pool: Pools, kind: str) -> None:
    with pytest.raises(NotImplementedError, match="MistralAttention contradicts itself"):
        pool(1).run(contradiction, kind)


def part_of_a_mask(index: Any) -> None:
    from ringattn.hf.masks import MaskNote
    from ringattn.mask import Mask

    note = MaskNote(Mask())
    assert note[:, :, slice(0, None), :] is note
    _ = note[index]


@pytest.mark.parametrize("index", [0, (slice(None), slice(-1, None)), (None, slice(None)), slice(0, 3)])
def test_models_that_take_a_part_of_their_mask(index: Any) -> None:
    with pytest.raises(NotImplementedError, match="takes a part of its attention mask"):
        part_of_a_mask(index)


def custom_mask(kind: str) -> None:
    from transformers import masking_utils

    model = fresh()
    parallelize(model, mesh_of(1, 1))
    keywords: dict[str, Any] = {
        "or": {"or_mask_function": lambda b, h, q, k: k < 3},
        "and": {"and_mask_function": lambda b, h, q, k: k < 3},
    }[kind]
    masking_utils.create_causal_mask(model.config, torch.zeros(1, 8, 64), None, None, **keywords)


@pytest.mark.parametrize("kind", ["or", "and"])
def test_custom_masks_are_refused(pool: Pools, kind: str) -> None:
    with pytest.raises(NotImplementedError, match="asks for a"):
        pool(1).run(custom_mask, kind)

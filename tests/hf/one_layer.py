"""One attention layer of a Hugging Face model on one rank, called as transformers calls it."""

from typing import Any

import torch
from torch import Tensor, nn

from ringattn import Documents, Layout
from ringattn.hf import attention_kwargs, parallelize, shard_batch
from tests.parallel.ranks import mesh_of

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


DOCS = Documents([12, 20])


def model_of(family: str, **config: object) -> nn.Module:
    import transformers

    model_class = getattr(transformers, family)
    made = model_class.config_class(**{**SIZES, **config})
    made._attn_implementation = "eager"
    torch.manual_seed(0)
    model = model_class(made)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.12)  # the default is so small that features hardly show
    return model.eval()


def refused(family: str, config: dict[str, object]) -> None:
    """`parallelize` a model without weights."""
    import transformers

    model_class = getattr(transformers, family)
    with torch.device("meta"):
        model = model_class(model_class.config_class(**config))
    parallelize(model, mesh_of(1, 1))


def run_model(family: str, config: dict[str, object], options: dict[str, object]) -> tuple[Tensor, list[Tensor]]:
    """Logits (T, vocabulary) of `DOCS` under `parallelize(model, mesh, **options)`, and of each document run alone."""
    mesh = mesh_of(1, 1)
    model, plain = (model_of(family, **config) for _ in range(2))
    parallelize(model, mesh, **options)
    ids = torch.arange(DOCS.total)[None]
    batch = shard_batch({"input_ids": ids}, DOCS, mesh)
    with torch.no_grad():
        together = model(**batch).logits[0]
        spans = zip(DOCS.starts, DOCS.lengths, strict=True)
        alone = [plain(input_ids=ids[:, a : a + n], use_cache=False).logits[0] for a, n in spans]
    return together, alone


def generate() -> None:
    """What a user of a parallelized model may try."""
    model = model_of("LlamaForCausalLM")
    parallelize(model, mesh_of(1, 1))
    model.generate(torch.arange(5)[None], max_new_tokens=2)


def interface(
    docs: Documents,
    tensors: tuple[Tensor, Tensor, Tensor],
    keywords: dict[str, Any],
    module_is_causal: bool = True,
) -> tuple[Tensor, Any]:
    """The function registered with transformers, for a layer of a parallelized model.

    q (T, H, D), k (T, K, D), v (T, K, V) -> out (T, H, V) and the second return value.
    """
    from transformers import AttentionInterface

    mesh = mesh_of(1, 1)
    model = model_of("LlamaForCausalLM")
    parallelize(model, mesh)
    layer = model.model.layers[0].self_attn
    layer.is_causal = module_is_causal
    batched = [x.transpose(0, 1)[None] for x in tensors]
    given = attention_kwargs(Layout(docs, mesh)) | keywords
    out, weights = AttentionInterface()["ringattn"](layer, *batched, None, **given)
    return out[0], weights

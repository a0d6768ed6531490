"""The shapes of Qwen3, Gemma 3, GPT-OSS and DeepSeek-V3 in few layers: two ranks against one process.

On GPUs real head counts in bfloat16, judged by a float32 copy of the model: two ranks must err no more than one GPU
does. On CPUs the same code at small sizes in float32.
"""

import copy
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from ringattn.hf import parallelize
from ringattn.hf.conformance import Form, Outcome, alone, together
from ringattn.hf.tiny import read_config, tiny_config, with_parameters_in
from tests.hf.families import FAMILIES
from tests.parallel.ranks import mesh_of
from tests.pool import Pools

LAYERS = {"num_hidden_layers": 3, "layer_types": None, "vocab_size": 2048, "use_cache": False, "pad_token_id": 0}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 512}
# Head counts and head dims are those of Qwen3-8B, Gemma-3-27B, gpt-oss-120b and DeepSeek-V3.
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3": {
        "hidden_size": 4096,
        "intermediate_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "gemma3_text": {
        "hidden_size": 2048,
        "intermediate_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "sliding_window": 1024,
        "query_pre_attn_scalar": 168,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "gpt_oss": {
        "hidden_size": 2880,
        "intermediate_size": 512,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "sliding_window": 128,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "deepseek_v3": EXPERTS
    | {
        "hidden_size": 2048,
        "intermediate_size": 2048,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
}
LONG = Form("long documents", ((2500, 37, 1300, 3700),), 8192, "segment_ids")
SHORT = Form("short documents", ((25, 3, 13, 37),), 82, "segment_ids")


def model_of(family: str, small: bool) -> Any:
    from transformers import AutoModelForCausalLM

    config = read_config(family)
    if small:
        config = tiny_config(config, **FAMILIES[family])
    else:
        config = type(config)(**{**LAYERS, **SHAPES[family]})
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    return model.eval()


def error(found: Outcome, truth: Outcome) -> tuple[float, float, float]:
    """Relative errors in the norm, of logits, loss and the whole gradient: a token that takes another expert by
    rounding moves its own logits far, on one GPU as on two."""
    logits = (found.logits.float() - truth.logits).norm() / truth.logits.norm()
    moved = torch.stack([(found.gradients[n].float() - g).norm() for n, g in truth.gradients.items()]).norm()
    whole = torch.stack([g.norm() for g in truth.gradients.values()]).norm()
    return float(logits), float((found.loss - truth.loss).abs() / truth.loss), float(moved / whole)


def errors(
    family: str, ring: int, ulysses: int, device: str, dtype: torch.dtype, small: bool
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Of all ranks together and of one process, against float32."""
    mesh, form = mesh_of(ring, ulysses, device), SHORT if small else LONG
    model = with_parameters_in(model_of(family, small), dtype).to(mesh.device)
    truth = alone(copy.deepcopy(model).float(), form)
    single = alone(model, form)
    handle = parallelize(model, mesh)
    found = together(model, mesh, form)
    assert handle.verified
    handle.undo()
    return error(found, truth), error(single, truth)


@pytest.mark.parametrize(("ring", "ulysses"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("family", SHAPES)
def test_small_shapes(pool: Pools, family: str, ring: int, ulysses: int) -> None:
    for ours, _ in pool(2).run(errors, family, ring, ulysses, "cpu", torch.float32, True):
        assert max(ours) <= 1e-5


@pytest.mark.gpu(2)
@pytest.mark.parametrize(("ring", "ulysses"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("family", SHAPES)
def test_real_shapes(pool: Pools, family: str, ring: int, ulysses: int) -> None:
    for ours, single in pool(2, "cuda").run(errors, family, ring, ulysses, "cuda", torch.bfloat16, False, timeout=600):
        print(f"{family} ring {ring} ulysses {ulysses}: two GPUs {ours}, one {single}")
        for mine, alone_error in zip(ours, single, strict=True):
            assert mine <= 1.5 * alone_error + 1e-4

"""The function that layers of Hugging Face models call: what it takes, and what it refuses."""

from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from torch import Tensor

from ringattn import Documents, Mask
from tests.hf import one_layer
from tests.pool import Pools
from tests.small_tensors import CAUSAL, DOCS, dense, tensors


def layer(keywords: dict[str, Any], causal: bool = True) -> Tensor:
    return one_layer.interface(DOCS, tensors(), keywords, causal)[0]


def distance(docs: Documents) -> tuple[Tensor, Tensor]:
    """q - k of every pair, and whether it is of one document."""
    place = torch.arange(docs.total)
    return place[:, None] - place[None, :], docs.dense(Mask(causal=False))


@pytest.mark.parametrize("size", [1, 4])
def test_a_bidirectional_window_of_a_model_is_exclusive(pool: Pools, size: int) -> None:
    """Its keyword arrives as |q - k| < size."""
    got = pool(1).run(layer, {"sliding_window": size, "is_causal": False})[0]
    far, same = distance(DOCS)
    torch.testing.assert_close(got, dense(same & (far.abs() < size))[0], rtol=1e-12, atol=1e-12)
    if size > 1:
        assert not torch.allclose(got, dense(same & (far.abs() <= size))[0], atol=1e-3)


@pytest.mark.parametrize(("keyword", "attribute"), [(False, True), (None, False), (True, False), (None, True)])
def test_a_model_is_causal_by_its_keyword_or_else_by_its_layer(
    pool: Pools, keyword: bool | None, attribute: bool
) -> None:
    got = pool(1).run(layer, {} if keyword is None else {"is_causal": keyword}, attribute)[0]
    causal = attribute if keyword is None else keyword
    torch.testing.assert_close(got, dense(DOCS.dense(Mask(causal=causal)))[0], rtol=1e-12, atol=1e-12)


def test_a_llama4_of_chunks_is_each_document_alone(pool: Pools) -> None:
    """And its chunks are seen: with others, or none, its logits are different."""
    config = {"head_dim": 16, "num_local_experts": 2, "num_hidden_layers": 4, "intermediate_size_mlp": 96}
    logits = []
    for chunk in (8, 64):
        chosen = config | {"attention_chunk_size": chunk}
        together, alone = pool(1).run(one_layer.run_model, "Llama4ForCausalLM", chosen, {})[0]
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)
        logits.append(together)
    assert (logits[0] - logits[1]).abs().max() > 1e-2


def test_a_layers_scale_cap_and_sinks_are_those_of_the_call(pool: Pools) -> None:
    """Under the names that transformers hands them on with."""
    sinks = torch.randn(4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plain, lse = dense(CAUSAL)
    expected = {
        "scaling": (0.3, dense(CAUSAL, 0.3)[0]),
        "softcap": (2.0, dense(CAUSAL, softcap=2.0)[0]),
        "s_aux": (sinks, plain * torch.sigmoid(lse - sinks[:, None]).T[..., None]),
    }
    for name, (value, out) in expected.items():
        torch.testing.assert_close(pool(1).run(layer, {name: value})[0], out, rtol=1e-12, atol=1e-12)
        assert (plain - out).abs().max() > 1e-2


# Of what a model's forward pass hands to every layer.
INERT = "use_cache", "position_ids", "cache_position", "return_dict", "output_hidden_states", "num_items_in_batch"


def test_a_layer_of_a_model_takes_inert_names_only(pool: Pools) -> None:
    plain, inert, absent = (
        pool(1).run(layer, keywords)[0] for keywords in ({}, dict.fromkeys(INERT, 1), {"sofcap": None, "s_aux": None})
    )
    assert torch.equal(plain, inert)
    assert torch.equal(plain, absent)
    with pytest.raises(TypeError, match="sofcap"):
        pool(1).run(layer, {"sofcap": 1})


def test_a_gemma2_on_a_kernel_without_softcap_is_refused(pool: Pools) -> None:
    config: dict[str, object] = {"head_dim": 16, "sliding_window": 6, "attn_logit_softcapping": 2.0}
    with pytest.raises(NotImplementedError, match="backend 'cpu' cannot do this call: it has no softcap"):
        pool(1).run(one_layer.run_model, "Gemma2ForCausalLM", config, {"backend": "cpu"})
    together, alone = pool(1).run(one_layer.run_model, "Gemma2ForCausalLM", config, {})[0]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_dropout_of_a_layer_is_refused(pool: Pools) -> None:
    with pytest.raises(NotImplementedError, match="attention_dropout"):
        pool(1).run(layer, {"dropout": 0.1})


@pytest.mark.parametrize("name", ["bias", "position_bias", "attn_bias", "alibi_slopes"])
def test_a_bias_of_a_layer_is_refused(pool: Pools, name: str) -> None:
    with pytest.raises((TypeError, NotImplementedError), match=name):
        pool(1).run(layer, {name: torch.zeros(4, 20, 20)})


def test_the_attention_matrix_is_refused(pool: Pools) -> None:
    with pytest.raises(NotImplementedError, match="output_attentions: flash attention never forms"):
        pool(1).run(layer, {"output_attentions": True})
    out, weights = pool(1).run(one_layer.interface, DOCS, tensors(), {"output_attentions": False})[0]
    torch.testing.assert_close(out, dense(CAUSAL)[0], rtol=1e-12, atol=1e-12)
    assert weights is None


def longer_keys() -> Tensor:
    q, k, v = tensors()
    return one_layer.interface(Documents([5]), (q[:5], k, v), {})[0]


def test_caches_are_refused(pool: Pools) -> None:
    """Generation as a whole, and a layer whose cache has given it more keys than queries."""
    with pytest.raises((ValueError, NotImplementedError), match=r"Documents|shard_batch|KV cache"):
        pool(1).run(one_layer.generate)
    with pytest.raises((ValueError, NotImplementedError), match=r"5 .* 20"):
        pool(1).run(longer_keys)


@pytest.mark.parametrize("name", ["cache", "block_table", "seqused_k"])
def test_paged_attention_is_refused(pool: Pools, name: str) -> None:
    with pytest.raises((NotImplementedError, TypeError), match=name):
        pool(1).run(layer, {name: torch.zeros(1)})

"""Elementwise work that is compiled: as exact, once for all lengths, with kept attention and on ranks."""

import shutil

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from ringattn import Documents
from ringattn.hf import parallelize, shard_batch
from ringattn.hf.elementwise import Elementwise
from ringattn.memory.layers import keep_layers
from tests.parallel.ranks import mesh_of
from tests.pool import Pools

SMALL = {
    "vocab_size": 41, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 512,
}  # fmt: skip
# More layers than graphs that torch keeps of one function: were each compiled by itself, the last would not be.
LAYERS = 9
# The parts of a layer, and beside the layers the last norm.
PARTS = {"llama": 4, "qwen3": 6, "gemma2": 6}
# Graphs: norms by their size, the MLP, the rotary embedding.
GRAPHS = {"llama": 3, "qwen3": 4, "gemma2": 3}


def small(family: str, layers: int = LAYERS, dtype: torch.dtype = torch.float64, **changes: object) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SMALL | {"num_hidden_layers": layers} | changes)
    return AutoModelForCausalLM.from_config(config).to(dtype)


def step(model: nn.Module, tokens: int) -> list[Tensor]:
    """The loss and all gradients."""
    ids = torch.randint(0, 41, (1, tokens), generator=torch.Generator().manual_seed(tokens))
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def assert_same(found: list[Tensor], wanted: list[Tensor], rtol: float) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert float((one - other).norm()) <= rtol * float(other.norm())


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.nightly
@pytest.mark.parametrize("family", PARTS)
def test_the_same_for_any_length_by_one_compilation(family: str) -> None:
    model = small(family)
    wanted = [step(model, tokens) for tokens in (23, 57, 40)]
    compiled = Elementwise(model, backend="aot_eager")
    assert len(compiled.parts) == PARTS[family] * LAYERS + 1
    # Norms and rotary embeddings of transformers are computed in float32 whatever the model's dtype.
    assert_same(step(model, 23), wanted[0], 1e-6)
    assert graphs() == GRAPHS[family]
    for tokens, right in zip((57, 40), wanted[1:], strict=True):
        assert_same(step(model, tokens), right, 1e-6)
    assert graphs() == GRAPHS[family]
    assert not torch._dynamo.utils.counters["graph_break"]
    compiled.undo()
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert all(map(torch.equal, step(model, 57), wanted[1]))


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="inductor needs a C++ compiler")
def test_fused_kernels_are_exact_to_rounding() -> None:
    model = small("llama", 2, torch.float32)
    wanted = step(small("llama", 2), 57)
    Elementwise(model)
    assert_same([x.double() for x in step(model, 57)], wanted, 2e-6)


def test_a_replaced_rotary_embedding_is_of_one_model_alone() -> None:
    """The file of the model's family stays as it is, and so does another model of it."""
    module = __import__("transformers.models.llama.modeling_llama", fromlist=["modeling_llama"])
    before, other = module.apply_rotary_pos_emb, small("llama", 1)
    Elementwise(small("llama", 1), backend="aot_eager")
    step(other, 9)
    assert module.apply_rotary_pos_emb is before
    assert graphs() == 0


def test_what_somebody_else_replaced_is_left_alone() -> None:
    model = small("llama", 1)
    model.model.norm.forward = model.model.norm.forward
    assert "model.norm" not in Elementwise(model, backend="aot_eager").parts


def test_a_model_without_such_parts_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="Linear has no norm, gated MLP or rotary embedding"):
        Elementwise(nn.Linear(3, 3))


def on_ranks(compiled: bool, keep: str | None) -> list[Tensor]:
    """Loss and gradients of a parallelized model whose layers keep little."""
    mesh, docs = mesh_of(2, 1), Documents([31, 6, 12])
    model = small("llama", 3)
    if compiled:
        Elementwise(model, backend="aot_eager")
    parallelize(model, mesh)
    if keep is not None:
        keep_layers(model.model.layers, keep)  # type: ignore[arg-type]
    ids = torch.randint(0, 41, (1, docs.total), generator=torch.Generator().manual_seed(1))
    found = []
    for _ in range(2):
        loss = model(**shard_batch({"input_ids": ids, "labels": ids}, docs, mesh)).loss
        found = [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]
    torch._dynamo.reset()
    return found


@pytest.mark.parametrize("keep", [None, pytest.param("layer", marks=pytest.mark.slow), "attention"])
def test_parallelized_and_kept(pool: Pools, keep: str | None) -> None:
    plain = pool(2).run(on_ranks, False, None)
    for found, wanted in zip(pool(2).run(on_ranks, True, keep), plain, strict=True):
        assert_same(found, wanted, 1e-6)

"""Engines around the attention: what they do to a layout on its way to the layers."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from ringattn import Documents, Layout, SequenceMesh
from ringattn.hf import parallelize
from ringattn.hf.elementwise import Elementwise
from ringattn.memory.settings import MemorySettings
from ringattn.training.engines import EngineOptions, build_engine
from ringattn.training.loss import brought
from ringattn.training.model.models import build_model, empty_model, model_config
from tests.parallel.ranks import mesh_of
from tests.pool import Pools
from tests.training.token_loss import model_loss

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def options_of(mesh: SequenceMesh, dtype: torch.dtype, keep: Any = "all", zero_stage: int = 0) -> EngineOptions:
    config = model_config("llama", None, SIZES)
    return EngineOptions(
        empty=lambda: empty_model(config),
        load=lambda: build_model(config, 0),
        attach=lambda model: parallelize(model, mesh, MemorySettings(keep=keep)),
        device=torch.device("cpu"),
        dtype=dtype,
        weight_decay=0.1,
        betas=(0.9, 0.95),
        eps=1e-8,
        clip=1.0,
        micro_steps=1,
        zero_stage=zero_stage,
    )


def one_step(dtype: torch.dtype, keep: str, ring: int) -> tuple[float, float]:
    """Loss and gradient norm of one step on the ranks of a ring."""
    mesh = mesh_of(ring, 1)
    engine = build_engine("fsdp2", mesh, options_of(mesh, dtype, keep))
    docs = Documents([40, 7, 100])
    layout = Layout(docs, mesh)
    ids = torch.randint(0, 64, (docs.total,), generator=torch.Generator().manual_seed(0))
    local = layout.shard(ids)
    loss = model_loss(engine.model, layout, local)
    engine.backward(loss)
    total, norm, *_ = brought(loss, engine.step(1e-3), False)
    return total, norm


@pytest.mark.parametrize("keep", ["all", "selective", "attention", "layer"])
def test_mixed_precision_leaves_the_layout_alone(pool: Pools, keep: str) -> None:
    """FSDP takes the keywords of a forward apart, to cast the tensors in them."""
    exact = pool(2).run(one_step, torch.float32, keep, 2)
    rounded = pool(2).run(one_step, torch.bfloat16, keep, 2)
    alone = pool(1).run(one_step, torch.bfloat16, keep, 1)[0]
    assert rounded[0] == rounded[1]
    assert rounded != exact
    assert rounded[0] == pytest.approx(alone, rel=1e-4)


def buffers_of(engine: str, zero_stage: int) -> dict[str, torch.Tensor]:
    mesh = mesh_of(2, 1)
    built = build_engine(engine, mesh, options_of(mesh, torch.bfloat16, "all", zero_stage))
    return {name.removeprefix("module."): buffer for name, buffer in built.model.named_buffers()}


@pytest.mark.parametrize(("engine", "zero_stage"), [("fsdp2", 0), ("deepspeed", 1), ("deepspeed", 3)])
def test_rotary_frequencies_stay_exact(pool: Pools, engine: str, zero_stage: int) -> None:
    """DeepSpeed casts a whole model to bfloat16. Frequencies of 8 bits would turn the positions of a long document."""
    if engine == "deepspeed":
        pytest.importorskip("deepspeed")
    expected = dict(build_model(model_config("llama", None, SIZES), 0).named_buffers())
    assert expected
    for found in pool(2).run(buffers_of, engine, zero_stage):
        for name, buffer in expected.items():
            assert found[name].dtype == torch.float32
            assert torch.equal(found[name], buffer)


def two_steps(engine: str, zero_stage: int, compiled: bool) -> tuple[list[float], list[int]]:
    """Losses and gradient norms of two steps of different lengths on two ranks, layers computed again; and how many
    graphs were compiled after each."""
    mesh, graphs = mesh_of(2, 1), []
    torch._dynamo.utils.counters.clear()

    def attach(model: nn.Module) -> None:
        if compiled:
            Elementwise(model, backend="aot_eager")
        parallelize(model, mesh, MemorySettings(mlp_tile=32, keep="attention"))

    options = replace(options_of(mesh, torch.float32, "layer", zero_stage), attach=attach)
    built, told = build_engine(engine, mesh, options), []
    for lengths in ([40, 7, 100], [60, 31]):
        docs = Documents(lengths)
        layout = Layout(docs, mesh)
        ids = torch.randint(0, 64, (docs.total,), generator=torch.Generator().manual_seed(docs.total))
        local = layout.shard(ids)
        loss = model_loss(built.model, layout, local)
        built.backward(loss)
        told += brought(loss, built.step(1e-2), False)[:2]
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    return told, graphs


@pytest.mark.nightly
@pytest.mark.parametrize(("engine", "zero_stage"), [("fsdp2", 0), ("deepspeed", 1), ("deepspeed", 3)])
def test_compiled_elementwise_work_trains_the_same(pool: Pools, engine: str, zero_stage: int) -> None:
    if engine == "deepspeed":
        pytest.importorskip("deepspeed")
    plain, compiled = (pool(2).run(two_steps, engine, zero_stage, on) for on in (False, True))
    for (told, graphs), (expected, none) in zip(compiled, plain, strict=True):
        assert told == pytest.approx(expected, rel=1e-6)
        assert graphs[0] == graphs[1] > 0, "another length is compiled again"
        assert none == [0, 0]

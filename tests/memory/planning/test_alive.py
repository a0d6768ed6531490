"""What the planner says is alive, against the storages that PyTorch makes and drops, and against itself."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ringattn import Documents, init_mesh
from ringattn.hf import attention_kwargs, parallelize
from ringattn.hf.shape import model_shape
from ringattn.memory import offload as offloading
from ringattn.memory.layers import keep_layers
from ringattn.memory.offload import Offload
from ringattn.memory.planning import layer as layers_of
from ringattn.memory.planning.alive import Alive
from ringattn.memory.planning.attention import AttentionUse
from ringattn.memory.planning.items import (
    GATHERED,
    INPUTS,
    KEPT,
    MOMENTS,
    MOVING,
    PHASES,
    REDUCING,
    WEIGHTS,
    WORKSPACE,
    Moment,
)
from ringattn.memory.planning.shapes import ModelShape, RunShape
from ringattn.memory.settings import MemorySettings, StateSettings
from ringattn.memory.tiled_loss import tiled_loss
from ringattn.memory.tiled_rows import TiledModule
from ringattn.parallel.layout import Layout
from ringattn.parallel.machine.shipped import SHIPPED
from tests.memory.planning.shapes_of import llama_8b
from tests.memory.planning.tracker import Tracker
from tests.pool import Pools
from tests.training.token_loss import token_loss_sum

TOKENS, LEAST = 512, 2**14
SIZES: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 224, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 1, "head_dim": 16, "use_cache": False,
}  # fmt: skip
# Of an engine and of a GPU, which the tracker has not.
ELSEWHERE = (WEIGHTS, MOMENTS, GATHERED, WORKSPACE, REDUCING)
SETTINGS: dict[str, MemorySettings] = {
    "plain": MemorySettings(),
    "loss": MemorySettings(loss_tile=64),
    "loss, MLP": MemorySettings(loss_tile=64, mlp_tile=64),
    "layer": MemorySettings(loss_tile=64, keep="layer"),
    "layer, MLP": MemorySettings(loss_tile=64, mlp_tile=64, keep="layer"),
    "attention": MemorySettings(loss_tile=64, mlp_tile=64, keep="attention"),
    "layer of every 2": MemorySettings(loss_tile=64, mlp_tile=64, keep="layer", every=2),
    "attention, three away": MemorySettings(
        loss_tile=64, mlp_tile=64, keep="attention", host_layers=3, host_bytes=2**22
    ),
    "layer, all away": MemorySettings(loss_tile=64, mlp_tile=64, keep="layer", host_layers=4, host_bytes=2**22),
}


def model_of(family: str) -> tuple[Any, Any]:
    import transformers

    config = getattr(transformers, f"{family}Config")(**SIZES)
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")(config), config


def measured(family: str, memory: MemorySettings, dtype: torch.dtype) -> tuple[dict[str, int], int, ModelShape]:
    """The most bytes of live tensors in each pass, beside weights and gradients that were there; host bytes used."""
    model, config = model_of(family)
    shape = model_shape(model, config)
    parallelize(model.to(dtype), mesh := init_mesh())
    inner: Any = model.model
    if memory.mlp_tile:
        for layer in inner.layers:
            TiledModule(layer.mlp, memory.mlp_tile)
    offload = Offload(torch.device("cpu"), memory.host_bytes, least=LEAST) if memory.host_layers else None
    if memory.keep != "all":
        assert memory.keep != "selective"
        keep_layers(inner.layers, memory.keep, offload, memory.host_layers, every=memory.every)
    ids = torch.arange(TOKENS)[None] % 256
    given = attention_kwargs(layout := Layout(Documents([TOKENS]), mesh))
    positions = layout.position_ids(torch.device("cpu"))[None]

    def loss() -> Tensor:
        hidden = inner(input_ids=ids, position_ids=positions, use_cache=False, **given).last_hidden_state
        if memory.loss_tile:
            return tiled_loss(hidden[0], model.lm_head.weight, ids[0], tile=memory.loss_tile)
        logits = model.lm_head(hidden)  # as the loop has it
        return token_loss_sum(logits[0], ids[0])

    loss().backward()  # whatever is made once
    model.zero_grad()
    with Tracker() as tracker:
        made = loss()
        peaks = {"forward": tracker.peak}
        tracker.begin_peak()
        made.backward()
        peaks["backward"] = tracker.peak
    return peaks, 0 if offload is None else offload.stack.most, shape


def stated(alive: Alive) -> dict[str, int]:
    """The same by the plan."""

    def comparable(moment: Moment) -> int:
        tiles = alive.layers.layer.tile_grads if moment.name.startswith("MLP") and moment.phase == "backward" else 0
        indices = 24 * TOKENS  # ids, positions and targets were there before
        return moment.total - sum(moment.items.get(name, 0) for name in ELSEWHERE) + tiles - indices

    return {
        phase: max(comparable(moment) for moment in alive.moments if moment.phase == phase)
        for phase in ("forward", "backward")
    }


def compared(family: str, dtype: str, names: list[str]) -> list[tuple[str, str, float]]:
    """Of each setting and pass, stated by measured."""
    out = []
    layers_of.IN_FLIGHT = 0  # on a CPU nothing is under way
    layers_of.LEAST = LEAST
    for name in names:
        memory = SETTINGS[name]
        peaks, host, shape = measured(family, memory, getattr(torch, dtype))
        run = RunShape(TOKENS, compute=dtype, kernel_sums=False)
        use = AttentionUse.of(shape, run, SHIPPED["H200"])
        alive = Alive(shape, run, memory, StateSettings(weights=dtype), use)  # type: ignore[arg-type]
        out += [(name, phase, size / peaks[phase]) for phase, size in stated(alive).items()]
        out.append((name, "host", alive.layers.host_bytes / host if host else 1.0))
    layers_of.IN_FLIGHT, layers_of.LEAST = offloading.IN_FLIGHT, offloading.LEAST
    return out


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_live_storages_are_those_of_the_plan(pool: Pools, family: str) -> None:
    (found,) = pool(1).run(compared, family, "float32", list(SETTINGS))
    wrong = [one for one in found if one[2] != pytest.approx(1.0, abs=0.02)]
    assert not wrong, found


def test_in_bfloat16_norms_are_float32(pool: Pools) -> None:
    """A CPU makes float32 copies for a tiled loss that a GPU does not: what is compared is without them."""
    (found,) = pool(1).run(compared, "Llama", "bfloat16", ["plain", "layer, MLP", "attention"])
    wrong = [one for one in found if one[2] != pytest.approx(1.0, abs=0.05) and ("backward" in one or "plain" in one)]
    assert not wrong, found


PLAIN, WHOLE = MemorySettings(), StateSettings()


def alive(memory: MemorySettings = PLAIN, states: StateSettings = WHOLE, **run: Any) -> Alive:
    shape, given = llama_8b(), RunShape(**{"tokens": 65536, "ring": 2, **run})
    return Alive(shape, given, memory, states, AttentionUse.of(shape, given, SHIPPED["H200"]))


def test_totals_are_sums_and_every_phase_has_a_peak() -> None:
    plan = alive(MemorySettings(loss_tile=2048, keep="attention"))
    assert set(plan.peaks) == set(PHASES)
    for moment in plan.moments:
        assert moment.total == sum(moment.items.values()) <= plan.peak(moment.phase).total
        assert all(size > 0 for size in moment.items.values())
    assert plan.peak().total == max(moment.total for moment in plan.moments)


@pytest.mark.parametrize("keep", ["all", "selective", "attention", "layer"])
def test_more_tokens_take_more(keep: Any) -> None:
    peaks = [
        alive(MemorySettings(loss_tile=1024, keep=keep), tokens=tokens).peak().total
        for tokens in (4096, 8192, 65536, 65537, 10**6)
    ]
    assert peaks == sorted(peaks)
    assert peaks[-1] > peaks[0]


def test_each_feature_saves_what_it_says() -> None:
    base = MemorySettings(loss_tile=2048, mlp_tile=8192, keep="attention")
    host = replace(base, host_layers=20, host_bytes=1)
    sizes = {
        name: alive(memory, tokens=2**19, ring=8).peak().total
        for name, memory in {
            "base": base,
            "no loss": replace(base, loss_tile=None),
            "all": replace(base, keep="all"),
            "selective": replace(base, keep="selective"),
            "layer": replace(base, keep="layer"),
            "every": replace(base, keep="layer", every=2),
            "host": host,
        }.items()
    }
    assert sizes["every"] < sizes["layer"] < sizes["base"] < sizes["selective"] < sizes["all"]
    assert sizes["host"] < sizes["base"] < sizes["no loss"]
    whole, tiled = (
        next(one.total for one in alive(memory).moments if one.name == "MLP, layer 31" and one.phase == "backward")
        for memory in (replace(base, mlp_tile=None), base)
    )
    # Six inner rows of 2 bytes of all tokens, and the gradient of one product; or those of a tile, its output and the
    # gradient of all inputs, and of three products sums in 4 bytes and of the first gradient in 2.
    tokens, product = 32768 + 128, 14336 * 4096
    rows = 6 * 2 * 14336 * (tokens - 8192) + 2 * product - 2 * 4096 * (tokens + 8192)
    assert whole - tiled == pytest.approx(rows - (3 * 4 + 2) * product, rel=1e-6)
    here, there = (alive(memory, tokens=2**19, ring=8) for memory in (base, host))
    moved = here.layers.kept(32) - there.layers.kept(32)
    assert moved == pytest.approx(there.host[KEPT], rel=1e-3)
    assert moved == pytest.approx(20 * (2**16 + 128) * (2 * 8192 + 4 * 32), rel=1e-6)


def test_states_are_where_they_are_said_to_be() -> None:
    total = llama_8b().total.count
    plain = alive(data=4).peak("step")
    assert plain.items[WEIGHTS] == -(-total * 4 // 8)
    assert plain.items[MOMENTS] == total
    away = alive(states=StateSettings(states_on="host"), data=4)
    assert not {WEIGHTS, MOMENTS} & away.peak("step").items.keys()
    assert sum(away.host.values()) == pytest.approx(2 * total, rel=1e-6)  # 16 bytes of each parameter, over 8 ranks
    small = StateSettings(weights="bfloat16", moments="int8")
    assert alive(states=small, data=4).peak("step").total < 0.45 * plain.total


def test_gathered_layers_go_unless_told_to_stay() -> None:
    plans = [alive(states=StateSettings(reshard=reshard)) for reshard in (True, False)]
    gone, stay = (plan.peak("forward").items[GATHERED] for plan in plans)
    assert stay - gone > 25 * 2 * 218112000


def test_the_last_layers_to_leave_are_under_way() -> None:
    memory = MemorySettings(loss_tile=1024, mlp_tile=4096, keep="layer", host_layers=32, host_bytes=1)
    moments = [one for one in alive(memory).moments if one.name == "MLP, layer 31" and one.phase == "forward"]
    assert moments[0].items[MOVING] == alive().layers.layer.stream
    assert INPUTS in moments[0].items


def test_plain_measurements_of_two_h200s() -> None:
    """Llama-8B's shapes with 8 layers, everything computed again, plain loss: peak GiB that torch's allocator had."""
    for tokens, gib in ((32768, 42.7), (65536, 67.6), (131072, 117.7)):
        shape, run = llama_8b(8), RunShape(tokens, ring=2)
        use = AttentionUse.of(shape, run, SHIPPED["H200"])
        plan = Alive(shape, run, MemorySettings(keep="layer"), StateSettings(), use)
        assert plan.peak().total / 2**30 == pytest.approx(gib, rel=0.02)

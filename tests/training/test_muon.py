"""Muon on sharded parameters: torch's own on whole ones, whatever the number of ranks, and what it is not for."""

import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

from ringattn import Documents, Layout
from ringattn.hf import parallelize
from ringattn.hf.shape import model_shape
from ringattn.memory.planning.items import MOMENTS, STEP
from ringattn.memory.planning.shapes import RunShape
from ringattn.memory.planning.states import States
from ringattn.memory.settings import MemorySettings, StateSettings
from ringattn.training.engines import EngineOptions, build_engine
from ringattn.training.engines.muon import _OF_MUON, matrices, muon, orthogonal_matrix, rows_of
from ringattn.training.engines.optimizers import set_learning_rate
from ringattn.training.loss import brought
from ringattn.training.model.models import build_model, empty_model, model_config
from tests.memory.planning.tracker import Tracker
from tests.parallel.ranks import mesh_of
from tests.pool import Pools
from tests.training.recipe import assert_it_goes_on, prepared
from tests.training.token_loss import model_loss, token_loss_sum

# Widths that three ranks share unevenly, and two key rows for three ranks.
SIZES = {
    "vocab_size": 64,
    "hidden_size": 20,
    "intermediate_size": 50,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 10,
    "initializer_range": 0.1,
}
DOCS = Documents([40, 7, 100])
STEPS, RATE, DECAY, BETAS = 4, 1e-2, 0.1, (0.9, 0.95)


def tokens(step: int) -> torch.Tensor:
    return torch.randint(0, 64, (DOCS.total,), generator=torch.Generator().manual_seed(step))


def config_of(tied: bool) -> Any:
    return model_config("llama", None, SIZES | {"tie_word_embeddings": tied})


@cache
def alone(tied: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses, norms and weights of a plain loop with torch.optim.Muon beside AdamW."""
    model: Any = build_model(config_of(tied), 0)
    model.set_attn_implementation("eager")
    named = dict(model.named_parameters())
    wide = [p for name, p in named.items() if p.dim() == 2 and "embed" not in name and "lm_head" not in name]
    ends = [p for name, p in named.items() if "embed" in name or "lm_head" in name]
    small = [p for p in named.values() if p.dim() < 2]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(wide, lr=RATE, weight_decay=DECAY, momentum=0.9, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [{"params": ends, "weight_decay": DECAY}, {"params": small, "weight_decay": 0.0}], lr=RATE, betas=BETAS
        ),
    ]
    found = list[float]()
    for step in range(STEPS):
        ids = tokens(step).split(list(DOCS.lengths))
        loss = sum(token_loss_sum(model(input_ids=one[None], use_cache=False).logits[0], one) for one in ids)
        (loss / DOCS.total).backward()
        found += [loss.item() / DOCS.total, torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()]
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return found, {name: p.detach() for name, p in named.items()}


OPTIONS = EngineOptions(
    empty=lambda: empty_model(config_of(False)),
    load=lambda: build_model(config_of(False), 0),
    attach=lambda model: None,
    device=torch.device("cpu"),
    dtype=torch.float32,
    weight_decay=DECAY,
    betas=BETAS,
    eps=1e-8,
    clip=1.0,
    micro_steps=1,
    zero_stage=0,
    momentum=0.9,
)


def engine_of(mesh: Any, tied: bool = False, **changes: Any) -> Any:
    options = replace(
        OPTIONS,
        empty=lambda: empty_model(config_of(tied)),
        load=lambda: build_model(config_of(tied), 0),
        attach=lambda model: parallelize(model, mesh, MemorySettings()),
        device=mesh.device,
    )
    return build_engine("fsdp2", mesh, replace(options, **changes))


def train(engine: Any, mesh: Any, first: int = 0, last: int = STEPS, spoil: int | None = None) -> list[float]:
    found = list[float]()
    for step in range(first, last):
        layout = Layout(DOCS, mesh)
        loss = model_loss(engine.model, layout, layout.shard(tokens(step)).to(mesh.device))
        engine.backward(loss * float("nan") if step == spoil else loss)
        found += brought(loss, engine.step(RATE), False)[:2]
    return found


def weights_of(engine: Any) -> dict[str, torch.Tensor]:
    return {name: p.full_tensor().detach() for name, p in engine.model.named_parameters()}


def curve(ring: int, tied: bool, **changes: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    mesh = mesh_of(ring, 1)
    engine = engine_of(mesh, tied, **changes)
    return train(engine, mesh), weights_of(engine)


@pytest.mark.parametrize(
    ("ranks", "tied"),
    [
        (3, False),
        (1, True),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in ((1, False), (2, False), (2, True))),
    ],
)
def test_it_is_torchs_on_whole_matrices(pool: Pools, ranks: int, tied: bool) -> None:
    expected, weights = pool(1).run(alone, tied)[0]  # with as many threads: bfloat16 rounds by the order of sums
    for found, own in pool(ranks).run(curve, ranks, tied):
        assert found == pytest.approx(expected, rel=1e-4)
        for name, weight in weights.items():
            # Updates are made in bfloat16, in which other sums of gradients may round another way.
            assert (own[name] - weight).norm() < 3e-3 * weight.norm(), name


SHAPES = ((20, 50), (50, 20), (2, 20), (1, 8), (7, 7))  # three ranks: uneven rows, ranks without any


def stepped(ranks: int) -> list[torch.Tensor]:
    """Matrices after two steps with drawn gradients, sharded."""
    mesh, random = mesh_of(ranks, 1), torch.Generator().manual_seed(0)
    shared = mesh.device_mesh["data", "ring", "ulysses"]._flatten("all")
    module = nn.Module()
    for number, shape in enumerate(SHAPES):
        drawn = torch.randn(shape, generator=random)
        module.register_parameter(str(number), nn.Parameter(distribute_tensor(drawn, shared, [Shard(0)])))
    module.get_input_embeddings = module.get_output_embeddings = lambda: None
    optimizer = muon(module, replace(OPTIONS, device=mesh.device))
    for _ in range(2):
        for p in module.parameters():
            p.grad = distribute_tensor(torch.randn(p.shape, generator=random), shared, [Shard(0)])
        set_learning_rate(optimizer, RATE)
        optimizer.step()
    return [p.full_tensor().detach() for p in module.parameters()]


def test_given_gradients_are_applied_as_by_torch(pool: Pools) -> None:
    random = torch.Generator().manual_seed(0)
    expected = [nn.Parameter(torch.randn(shape, generator=random)) for shape in SHAPES]
    optimizer = torch.optim.Muon(expected, lr=RATE, weight_decay=DECAY, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    for _ in range(2):
        for p in expected:
            p.grad = torch.randn(p.shape, generator=random)
        optimizer.step()
    for ranks in (1, 3):
        for found in pool(ranks).run(stepped, ranks):
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other.detach(), rtol=1e-6, atol=1e-6)


def test_it_is_not_adamw(pool: Pools) -> None:
    found, _ = pool(1).run(curve, 1, False, momentum=None)[0]
    assert max(abs(a - b) for a, b in zip(found, pool(1).run(alone, False)[0][0], strict=True)) > 1e-2


def test_states_on_the_host_change_nothing(pool: Pools) -> None:
    # Of as many ranks: others add gradients in another order, of which bfloat16 makes more on some CPUs than on others.
    found, weights = pool(2).run(curve, 2, False, states=StateSettings(states_on="host"))[0]
    expected, on_device = pool(2).run(curve, 2, False)[0]
    assert found == pytest.approx(expected, rel=1e-6)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, on_device[name], rtol=1e-5, atol=1e-6)


def spoiled(step: int | None) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights and counts after two steps, and after one more if it is without finite gradients."""
    mesh = mesh_of(2, 1)
    engine = engine_of(mesh)
    train(engine, mesh, 0, 2)
    if step is not None:
        train(engine, mesh, step, step + 1, spoil=step)
    momenta = [s["momentum_buffer"].full_tensor() for s in engine._optimizer.state.values() if "momentum_buffer" in s]
    return weights_of(engine) | {str(n): one for n, one in enumerate(momenta)}, engine.alike()


def test_a_step_without_finite_gradients_changes_nothing(pool: Pools) -> None:
    (before, counts), (after, same) = (pool(2).run(spoiled, step)[0] for step in (None, 2))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert counts["the optimizer's count of steps"] == same["the optimizer's count of steps"] == 2


def planned_and_held(ranks: int) -> dict[str, tuple[int, int]]:
    """Bytes by plan, and those of the optimizer's state and of what the matrices' step makes on the way."""
    mesh = mesh_of(ranks, 1)
    engine = engine_of(mesh)
    train(engine, mesh, 0, 1)
    optimizer = engine._optimizer
    states = [one for state in optimizer.state.values() for one in state.values() if one.dim()]
    for p in engine.model.parameters():
        p.grad = torch.ones_like(p)
    with torch.no_grad(), Tracker() as tracker:
        for group in optimizer.param_groups:
            if group[_OF_MUON]:
                optimizer._step_matrices(group)
    empty = empty_model(config_of(False))
    wide = matrices(empty)
    largest = max((tuple(p.shape) for p in wide), key=math.prod)
    run = RunShape(DOCS.total, ring=ranks, matrices=sum(p.numel() for p in wide), largest_matrix=largest)
    states_of = States(model_shape(empty, config_of(False)), run, StateSettings())
    held = sum(one.to_local().nbytes for one in states)
    return {"held": (states_of.between_steps[MOMENTS], held), "step": (states_of.update[STEP], tracker.peak)}


@pytest.mark.parametrize("ranks", [1, 2])
def test_memory_is_planned_for_one_momentum_a_matrix(pool: Pools, ranks: int) -> None:
    """Rows of odd matrices are shared unevenly, so that a rank holds a little more or less than its share."""
    found = pool(ranks).run(planned_and_held, ranks)
    planned, held = (sum(one["held"][at] for one in found) for at in (0, 1))
    assert planned == pytest.approx(held, rel=1e-3)
    assert found[0]["step"][0] == pytest.approx(max(one["step"][1] for one in found), rel=0.1)


def test_the_recipe_plans_for_muon() -> None:
    sizes = {name: f"optim={name}" for name in ("adamw", "muon")}
    items = {name: prepared(one, "memory=off").plan.choice.plan.peak("step").items for name, one in sizes.items()}
    assert 0.5 < items["muon"][MOMENTS] / items["adamw"][MOMENTS] < 0.6  # most weights stand in matrices
    assert items["muon"][STEP] > 0
    assert STEP not in items["adamw"]


def test_rows_are_those_of_fsdp2():
    assert [rows_of(10, 4, rank) for rank in range(4)] == [3, 3, 3, 1]
    assert [rows_of(2, 4, rank) for rank in range(4)] == [1, 1, 0, 0]
    assert [rows_of(5, 4, rank) for rank in range(4)] == [2, 2, 1, 0]


@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (16, 16)])
def test_matrices_become_nearly_orthogonal(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    values = torch.linalg.svdvals(orthogonal_matrix(matrix).float())
    assert 0.5 < values.min() <= values.max() < 1.3
    assert not orthogonal_matrix(torch.zeros(4, 3).bfloat16()).any()


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["engine=deepspeed"], ["optim=muon", "engine=fsdp2"]),
        (["memory.moments=int8"], ["memory.moments=int8", "optim=adamw"]),
        (["optim.momentum=1.0"], ["optim.momentum", "[0, 1)", "1.0"]),
        (["optim.momentum=true"], ["optim.momentum", "True"]),
    ],
)
def test_refusals_name_the_key(typed, words, monkeypatch):
    monkeypatch.setattr("ringattn.training.config.checks.deepspeed_available", lambda: True)
    with pytest.raises(ValueError, match=r".") as error:
        prepared("optim=muon", *typed)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.slow
def test_the_recipe_goes_on_exactly(tmp_path: Path) -> None:
    sizes = [f"model.config.{key}={value}" for key, value in SIZES.items() if key not in ("vocab_size", "head_dim")]
    assert_it_goes_on(tmp_path, "optim=muon", "optim.schedule=wsd", "optim.decay_ratio=0.5", *sizes)

"""`model.freeze`: the curve of a plain loop with the same weights frozen, no states for them, and what it refuses."""

from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from ringattn import Documents, Layout
from ringattn.hf import parallelize
from ringattn.memory.settings import MemorySettings
from ringattn.training.engines import EngineOptions, build_engine
from ringattn.training.loss import brought
from ringattn.training.model.models import build_model, empty_model, model_config, parameter_groups
from tests.parallel.ranks import mesh_of
from tests.pool import Pools
from tests.training.recipe import THREE_LAYERS, assert_it_goes_on, prepared, save_model
from tests.training.token_loss import model_loss, token_loss_sum

SIZES = THREE_LAYERS
DOCS = Documents([40, 7, 100])
STEPS, RATE, SEED, BETAS = 4, 1e-2, 3, (0.9, 0.95)
EMBEDDING, MIDDLE = ("*.embed_tokens.*",), ("model.layers.1.*",)
ALL_BUT_HEAD, MLPS = ("model.*",), ("*.mlp.*", "lm_head.*")

LEAST = MemorySettings(loss_tile=16, mlp_tile=16, keep="layer")


def tokens(step: int) -> torch.Tensor:
    return torch.randint(0, 64, (DOCS.total,), generator=torch.Generator().manual_seed(step))


@cache
def alone(frozen: tuple[str, ...], tied: bool = False) -> list[float]:
    """Losses and gradient norms of a plain loop with eager attention, each document run alone."""
    model: Any = build_model(model_config("llama", None, SIZES | {"tie_word_embeddings": tied}), SEED, frozen=frozen)
    model.set_attn_implementation("eager")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, found = torch.optim.AdamW(parameter_groups(model, 0.1), lr=RATE, betas=BETAS), list[float]()
    for step in range(STEPS):
        ids = tokens(step).split(list(DOCS.lengths))
        loss = sum(token_loss_sum(model(input_ids=one[None], use_cache=False).logits[0], one) for one in ids)
        (loss / DOCS.total).backward()
        found += [loss.item() / DOCS.total, torch.nn.utils.clip_grad_norm_(trained, 1.0).item()]
        optimizer.step()
        optimizer.zero_grad()
    return found


def engine_of(mesh: Any, frozen: tuple[str, ...], memory: MemorySettings | None, tied: bool) -> Any:
    config = model_config("llama", None, SIZES | {"tie_word_embeddings": tied})
    options = EngineOptions(
        empty=partial(empty_model, config, frozen=frozen),
        load=partial(build_model, config, SEED, frozen=frozen),
        attach=lambda model: parallelize(model, mesh, memory),
        device=mesh.device,
        dtype=torch.float32,
        weight_decay=0.1,
        betas=BETAS,
        eps=1e-8,
        clip=1.0,
        micro_steps=1,
        zero_stage=0,
    )
    return build_engine("fsdp2", mesh, options)


def curve(ring: int, frozen: tuple[str, ...], memory: Any = None, tied: bool = False) -> tuple[list[float], set[str]]:
    """Losses and norms, and the weights that have states."""
    mesh, found = mesh_of(ring, 1), list[float]()
    engine = engine_of(mesh, frozen, memory, tied)
    for step in range(STEPS):
        layout = Layout(DOCS, mesh)
        loss = model_loss(engine.model, layout, layout.shard(tokens(step)).to(mesh.device))
        engine.backward(loss)
        found += brought(loss, engine.step(RATE), False)[:2]
    names = {parameter: name for name, parameter in engine.model.named_parameters()}
    return found, {names[parameter] for parameter in engine._optimizer.state}


@pytest.mark.parametrize(
    ("frozen", "memory"),
    [
        (EMBEDDING, LEAST),
        (MLPS, None),
        *(pytest.param(one, LEAST, marks=pytest.mark.slow) for one in (MIDDLE, ALL_BUT_HEAD, MLPS)),
        *(pytest.param(one, None, marks=pytest.mark.slow) for one in (EMBEDDING, MIDDLE, ALL_BUT_HEAD)),
    ],
)
def test_it_trains_as_a_plain_loop(pool: Pools, frozen: tuple[str, ...], memory: Any) -> None:
    expected = alone(frozen)
    assert max(abs(a - b) for a, b in zip(expected, alone(()), strict=True)) > 1e-3
    (found, states), (same, _) = pool(2).run(curve, 2, frozen, memory)
    assert found == pytest.approx(expected, rel=1e-5)
    assert found == pytest.approx(same)
    empty = empty_model(model_config("llama", None, SIZES), frozen=frozen)
    assert states == {name for name, parameter in empty.named_parameters() if parameter.requires_grad}
    assert len(states) < len([*empty.parameters()])


@pytest.mark.slow
def test_a_tied_embedding_is_frozen_by_either_name(pool: Pools) -> None:
    for frozen in (("lm_head.*",), EMBEDDING):
        found, states = pool(2).run(curve, 2, frozen, tied=True)[0]
        assert found == pytest.approx(alone(frozen, tied=True), rel=1e-5)
        assert not any("embed" in name for name in states)


def test_refusals(tmp_path: Path) -> None:
    save_model(tmp_path)
    saved = (f"model.path={tmp_path}", "data.seq_len=64")
    with pytest.raises(ValueError, match=r"model\.freeze: no weight of LlamaForCausalLM matches '\*\.bias'"):
        prepared(*saved, "model.freeze=['*.norm.*','*.bias']")
    with pytest.raises(ValueError, match=r"model\.freeze=\['\*'\] leaves nothing to train"):
        prepared(*saved, "model.freeze=['*']")
    with pytest.raises(ValueError, match=r"model\.freeze must be a list"):
        prepared(*saved, "model.freeze=norm")
    notes = prepared(*saved, "model.freeze=['*.embed_tokens.*']").notes
    assert any(note.startswith("model.freeze: ") and "are trained" in note for note in notes)
    assert not any("random" in note for note in notes)
    assert any("random" in note for note in prepared("model.freeze=['*.embed_tokens.*']").notes)


@pytest.mark.slow
def test_the_recipe_goes_on_with_the_same_frozen(tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    run = [f"model.path={tmp_path / 'model'}", "optim.lr=1e-2"]
    assert_it_goes_on(tmp_path, *run, "model.freeze=['*.embed_tokens.*','model.layers.0.*']")
    run += [f"run.output={tmp_path / 'out'}", "data.seq_len=128", "run.steps=4", "run.save_every=2", "run.keep=5"]
    with pytest.raises(ValueError, match=r"model\.freeze was"):
        prepared(*run)
    with pytest.raises(ValueError, match=r"another frozen model.*model\.freeze was"):
        prepared(*run, "run.resume=force")

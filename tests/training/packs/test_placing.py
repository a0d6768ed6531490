"""Packs on the layouts that a model's layers ask for: here, in a process, in the recipe, the same on all ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from ringattn import Documents, Layout, Mask, MeshShape
from ringattn.parallel.machine.shipped import SHIPPED
from ringattn.parallel.planning.ahead import from_bytes, to_bytes
from ringattn.recurrent.price import RecurrenceShape
from ringattn.recurrent.weighing import MixingLayers, weigh
from ringattn.training.packs.packing import Pack
from ringattn.training.packs.placing import LocalPack, placed
from tests.parallel.ranks import mesh_of
from tests.pool import Pools
from tests.training.packs.test_ahead import maker_on
from tests.training.recipe import prepared, save_model
from tests.training.test_hybrid_runs import save_hybrid

H200 = SHIPPED["H200"]
DELTA = RecurrenceShape(16, 32, 128, 128, True, False)
SMALL = MixingLayers(((Mask(), 1),), ((RecurrenceShape(2, 4, 16, 12, True, False), 3),), heads=(4, 2), head_dim=16)
LAYERS = MixingLayers(((Mask(), 8),), ((DELTA, 24),), heads=(16, 4), head_dim=256)


def on_mesh(rank: int, layers: MixingLayers | None) -> LocalPack:
    """Three documents of 50,000 tokens on eight ranks, whose degrees are open."""
    meshes = [MeshShape(1, 8 // ulysses, ulysses, rank, machine=H200) for ulysses in (1, 2, 4, 8)]
    free = MeshShape(1, 8, 1, rank, machine=H200, alternatives=tuple(meshes))
    tokens = torch.arange(150_000)
    return placed(Pack(tokens, tokens, Documents([50_000] * 3), 150_000), free, "auto", layers)


def test_degrees_are_those_that_all_layers_ask_for_on_every_rank() -> None:
    """Attention alone exchanges heads."""
    assert {(one.layout.mesh.ring, one.layout.mesh.ulysses) for one in (on_mesh(r, None) for r in range(8))} == {(1, 8)}
    local = [on_mesh(rank, LAYERS) for rank in range(8)]
    assert {(one.layout.mesh.ring, one.layout.mesh.ulysses) for one in local} == {(4, 2)}
    assert len({one.layout.positions for one in local}) == 1
    assert torch.equal(torch.cat([one.ids for one in local]).sort().values, torch.arange(150_000))


def made(layers: MixingLayers | None) -> list[Any]:
    """Of the packs of a step, here and in a process that the maker is sent to, the ranges of every position, and those
    by both choices."""
    mesh, out = mesh_of(2, 1), []
    maker = maker_on(mesh)
    empty = len(to_bytes(maker))
    maker.layers = layers
    data = to_bytes(maker)
    assert len(data) - empty < 1000
    for one in (maker, from_bytes(data, mesh)):
        for local in next(one.batches()).micro:
            choices = [Layout(local.layout.docs, mesh), weigh(local.layout.docs, mesh, SMALL).layout]
            out.append([local.layout.positions, *(one.positions for one in choices)])
    return out


def test_a_process_weighs_as_this_one_does(pool: Pools) -> None:
    (alone, _), (found, other) = pool(2).run_many(made, [(None,), (SMALL,)])
    assert found == other
    half = len(found) // 2
    assert found[:half] == found[half:]
    assert all(positions == attention for positions, attention, _ in alone)
    assert all(positions == layers for positions, _, layers in found)
    assert any(attention != layers for _, attention, layers in found)


def recipe(model: str, output: str, held: str) -> list[Any]:
    """Of the pack that is recorded, of a step's two, and of one held out: the ranges of every position, and those by
    both choices."""
    from ringattn.hf.shape import mixing_layers
    from ringattn.training.loop import Trainer

    keys = [f"model.path={model}", f"run.output={output}", "data.seq_len=256", "data.packs_per_step=2", "run.steps=2"]
    keys += ["run.dtype=float32", f"data.validation={{held: {held}}}"]
    trainer = Trainer(prepared(*keys, ranks=2))
    layers, seen = mixing_layers(trainer.engine.model), [trainer.next_layout()]
    trainer.engine.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["cu_seq_lens_q"]), with_kwargs=True
    )
    with trainer._batches() as stream:
        trainer._train_step(next(stream))
    trainer.validation.losses(2)
    mesh = trainer.mesh
    choices = [(one, Layout(one.docs, mesh), weigh(one.docs, mesh, layers).layout) for one in seen]
    return [tuple(one.positions for one in three) for three in choices]


@pytest.mark.parametrize("hybrid", [True, False])
def test_the_recipe_weighs_what_the_model_has(pool: Pools, tmp_path: Path, hybrid: bool) -> None:
    """In the record of a run, the packs of a step, and validation."""
    save = save_hybrid if hybrid else save_model
    save(tmp_path / "model")
    (tmp_path / "held").mkdir()
    for size in (150, 7, 90):
        (tmp_path / "held" / f"{size}.txt").write_text("x" * size)
    ranks = pool(2).run(recipe, *(str(tmp_path / name) for name in ("model", "run", "held")))
    assert ranks[0] == ranks[1]
    assert len(ranks[0]) == 4
    for found, attention, layers in ranks[0]:
        assert found == (layers if hybrid else attention)
    assert any(attention != layers for _, attention, layers in ranks[0])

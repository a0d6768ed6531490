"""What `parallelize` does to layers that carry a state: copies, checkpoints, undoing, and what is refused.

Whether they are exact is for the conformance matrix, in which all known families are.
"""

import copy
import io

import pytest
import torch
import torch.distributed as dist
from torch import nn

pytest.importorskip("transformers")

from ringattn import Documents
from ringattn.hf import conformance, shard_batch
from ringattn.hf.conformance import FORMS
from ringattn.hf.model import parallelize
from ringattn.hf.recurrent import KNOWN, recurrent_layers
from ringattn.memory.settings import MemorySettings
from tests.hf.families import FAMILIES, model_of
from tests.parallel.ranks import mesh_of
from tests.pool import Pools

HYBRIDS = ("qwen3_5_text", "lfm2", "mamba2", "minimax")


def layers_of(model: nn.Module) -> list[nn.Module]:
    return [layer for layer in model.modules() if type(layer).__name__ in KNOWN]


def undone(family: str) -> None:
    model, mesh = copy.deepcopy(model_of(family)), mesh_of(1, 1)
    ids = torch.arange(3, 14)[None]
    before = model(input_ids=ids, use_cache=False).logits
    attributes = [set(vars(module)) for module in model.modules()]
    handle = parallelize(model, mesh)
    assert layers_of(model)
    assert all("forward" in vars(layer) for layer in layers_of(model))
    conformance.together(model, mesh, FORMS[0])
    assert handle.state_calls.keys()
    assert set(handle.state_calls.values()) == {1}
    # Another model of the family never notices.
    assert torch.equal(before, model_of(family)(input_ids=ids, use_cache=False).logits)
    handle.undo()
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert torch.equal(before, model(input_ids=ids, use_cache=False).logits)


@pytest.mark.parametrize("family", HYBRIDS)
def test_undo_leaves_nothing(pool: Pools, family: str) -> None:
    pool(1).run(undone, family)


def copied(family: str) -> list[float]:
    """A copy of a parallelized model runs by itself, and a pickled one asks to be parallelized again."""
    model, mesh = copy.deepcopy(model_of(family)), mesh_of(1, 1)
    truth = conformance.alone(model, FORMS[4])
    parallelize(model, mesh)
    twin = copy.deepcopy(model)
    for layer, theirs in zip(layers_of(twin), layers_of(model), strict=True):
        assert layer.forward.__self__ is layer is not theirs
    found = conformance.together(twin, mesh, FORMS[4])
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    again = conformance.together(twin, mesh, FORMS[4])
    assert torch.equal(found.logits, again.logits)
    file = io.BytesIO()
    torch.save(twin, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    with pytest.raises(ValueError, match="the model was pickled"):
        conformance.together(loaded, mesh, FORMS[4])
    parallelize(loaded, mesh)
    errors = [conformance.differences(x, truth) for x in (found, conformance.together(loaded, mesh, FORMS[4]))]
    return [max(error.logits, error.loss, error.gradients) for error in errors]


@pytest.mark.parametrize("family", ["qwen3_5_text", "minimax"])
def test_copies_and_pickles(pool: Pools, family: str) -> None:
    assert max(pool(1).run(copied, family)[0]) < 1e-5


def checkpointed(family: str) -> list[float]:
    """Layers that are computed again in the backward pass, in training mode."""
    model, mesh = copy.deepcopy(model_of(family)), mesh_of(2, 1)
    truth = conformance.alone(model, FORMS[5])
    handle = parallelize(model.train(), mesh)
    found = []
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        error = conformance.differences(conformance.together(model, mesh, FORMS[5], "zigzag"), truth)
        found.append(max(error.logits, error.loss, error.gradients))
    handle.undo()
    return found


@pytest.mark.parametrize("family", ["qwen3_5_text", "bamba", "jamba"])
def test_checkpointing(pool: Pools, family: str) -> None:
    for errors in pool(2).run(checkpointed, family):
        assert max(errors) < 1e-5


def interleaved(family: str) -> float:
    """Two batches forward, and the layers of the first computed again after the second went through."""
    model, mesh = copy.deepcopy(model_of(family)).train(), mesh_of(2, 1)
    truth = conformance.alone(model, FORMS[4])
    handle = parallelize(model, mesh)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.zero_grad()
    first, second = (shard_batch(form.batch(97), None, mesh, "zigzag") for form in (FORMS[4], FORMS[5]))
    loss = model(**first).loss
    model(**second)
    loss.backward()
    worst = 0.0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        dist.all_reduce(parameter.grad)
        whole = truth.gradients[name]
        worst = max(worst, float((parameter.grad / 2 - whole).norm() / whole.norm().clamp(min=1e-2)))
    handle.undo()
    return worst


@pytest.mark.parametrize("family", ["jamba", "mamba2"])
def test_layers_computed_again_keep_their_batch(pool: Pools, family: str) -> None:
    assert max(pool(2).run(interleaved, family)) < 1e-4


def with_memory(family: str) -> list[float]:
    """MLPs in tiles, and layers that keep little."""
    model, mesh = copy.deepcopy(model_of(family)).train(), mesh_of(2, 1)
    truth = conformance.alone(model, FORMS[5])
    found = []
    for settings in (MemorySettings(mlp_tile=8), MemorySettings(keep="attention"), MemorySettings(keep="selective")):
        handle = parallelize(model, mesh, memory=settings)
        error = conformance.differences(conformance.together(model, mesh, FORMS[5]), truth)
        handle.undo()
        found.append(max(error.logits, error.loss, error.gradients))
    return found


def test_memory_settings(pool: Pools) -> None:
    for errors in pool(2).run(with_memory, "qwen3_5_text"):
        assert max(errors) < 1e-5


def test_every_known_class_is_of_a_family_in_the_matrix() -> None:
    found = {type(layer).__name__ for family in FAMILIES for layer in layers_of(model_of(family))}
    assert found == set(KNOWN)


def test_what_is_not_as_it_is_known_is_refused() -> None:
    model = copy.deepcopy(model_of("lfm2"))
    layer = layers_of(model)[0]
    layer.forward = lambda hidden_states: hidden_states
    with pytest.raises(NotImplementedError, match=r"Lfm2ShortConv at .*conv has a forward pass"):
        recurrent_layers(model)

    class Lfm2ShortConv(nn.Module):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return hidden_states.cumsum(1)

    with pytest.raises(NotImplementedError, match="it mixes tokens by no known function"):
        recurrent_layers(nn.Sequential(Lfm2ShortConv()))


def sharded(family: str) -> list[float]:
    """Recurrent layers that FSDP shards by themselves, whose classes are then others."""
    from torch.distributed.fsdp import fully_shard

    model, mesh = copy.deepcopy(model_of(family)), mesh_of(2, 1)
    truth = conformance.alone(model, FORMS[4])
    parallelize(model, mesh)
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh.sequence_mesh)
        assert type(layer).__name__ not in KNOWN
    fully_shard(model, mesh=mesh.sequence_mesh)
    local = shard_batch(FORMS[4].batch(97), None, mesh, "zigzag")
    loss = model(**local).loss
    loss.backward()
    gradient = model.get_input_embeddings().weight.grad.full_tensor()
    name = next(name for name in truth.gradients if "embed" in name)
    whole = truth.gradients[name]
    return [float((gradient - whole).norm() / whole.norm()), float((loss.detach() - truth.loss).abs())]


@pytest.mark.parametrize("family", ["lfm2", "jamba"])
def test_layers_sharded_by_themselves(pool: Pools, family: str) -> None:
    for errors in pool(2).run(sharded, family):
        assert max(errors) < 1e-5


def replaced_later(family: str) -> str:
    """A layer whose forward pass was put back behind the handle's back."""
    model, mesh = copy.deepcopy(model_of(family)), mesh_of(1, 1)
    handle = parallelize(model, mesh)
    layer = layers_of(model)[0]
    layer.forward = lambda hidden_states, **_: hidden_states
    try:
        conformance.together(model, mesh, FORMS[0])
    except NotImplementedError as refusal:
        return str(refusal)
    finally:
        handle.undo()
    return ""


def test_calls_are_counted(pool: Pools) -> None:
    (told,) = pool(1).run(replaced_later, "lfm2")
    assert "ran 2 of the 3 functions of its layers with a state" in told


def without_layout(family: str) -> str:
    model, mesh = copy.deepcopy(model_of(family)), mesh_of(1, 1)
    handle = parallelize(model, mesh)
    try:
        layers_of(model)[0](torch.zeros(1, 4, model.config.hidden_size))
    except ValueError as error:
        return str(error)
    finally:
        handle.undo()
    return ""


def test_a_layer_without_a_batch_says_so(pool: Pools) -> None:
    assert "Lfm2ShortConv needs a batch from shard_batch" in pool(1).run(without_layout, "lfm2")[0]


def on_a_tree(family: str) -> str:
    model, mesh = copy.deepcopy(model_of(family)), mesh_of(1, 1)
    handle = parallelize(model, mesh)
    docs = Documents.from_tree([4, 3, 2], [-1, 0, 0])
    try:
        model(**shard_batch({"input_ids": torch.arange(9)[None]}, docs, mesh))
    except NotImplementedError as error:
        return str(error)
    finally:
        handle.undo()
    return ""


@pytest.mark.parametrize("family", HYBRIDS)
def test_trees_are_refused(pool: Pools, family: str) -> None:
    assert "on trees each branch would have to begin with" in pool(1).run(on_a_tree, family)[0]

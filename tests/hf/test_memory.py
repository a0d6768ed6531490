"""Settings of memory in transformers models: the same loss and gradients as of documents alone, or a clear refusal."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch

pytest.importorskip("transformers")

from torch import Tensor

from ringattn.hf import parallelize, shard_batch
from ringattn.hf.conformance import FORMS, alone
from ringattn.hf.tiny import read_config, tiny_config, tiny_model, with_parameters_in
from ringattn.memory.settings import MemorySettings
from tests.hf.families import FAMILIES
from tests.parallel.ranks import mesh_of
from tests.pool import Pools

FORM = FORMS[5]  # two packed rows
HOST = {"host_layers": 2, "host_bytes": 2**20}
ALL: dict[str, Any] = {"loss_tile": 5, "mlp_tile": 3, "keep": "attention", **HOST}
FEATURES: dict[str, dict[str, Any]] = {
    "loss_tile": {"loss_tile": 4},
    "mlp_tile": {"mlp_tile": 5},
    "layer": {"keep": "layer"},
    "attention": {"keep": "attention"},
    "offload": {"keep": "layer", **HOST},
    "all": ALL,
}
# What a family cannot have is refused by name; the rest of its settings are exact.
WITHOUT = {
    "opt": ("mlp_tile", "no MLP of its own"),
    "mamba2": ("loss_tile", "cannot have a tiled loss"),
}
# transformers' own experts of this family add float32 to float64.
NARROW = {"nemotron_h"}


def model_of(family: str = "llama") -> Any:
    config = tiny_config(read_config(family), **FAMILIES.get(family, {}))
    config._experts_implementation = "eager"  # grouped products know no float64
    model = tiny_model(config)
    return with_parameters_in(model, torch.float64)


@contextmanager
def without_casts() -> Iterator[None]:
    """Norms, rotary embeddings and softmax of transformers compute in float32 whatever they get; here in float64."""
    to, narrow, softmax = Tensor.to, Tensor.float, torch.nn.functional.softmax

    def kept(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if x.dtype == torch.float64 and torch.float32 in (*args, kwargs.get("dtype")):
            return x
        return to(x, *args, **kwargs)

    def wide_softmax(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return softmax(x, *args, **kwargs | ({"dtype": x.dtype} if x.dtype == torch.float64 else {}))

    with (
        patch.object(torch.nn.functional, "softmax", wide_softmax),
        patch.object(Tensor, "to", kept),
        patch.object(Tensor, "float", lambda x: x if x.dtype == torch.float64 else narrow(x)),
    ):
        yield


def gradients_of(model: Any) -> dict[str, Tensor]:
    found = {}
    for name, p in model.named_parameters():
        found[name] = torch.zeros_like(p) if p.grad is None else p.grad.clone()
        torch.distributed.all_reduce(found[name])
        found[name] /= torch.distributed.get_world_size()
    return found


def largest_error(family: str, settings: dict[str, Any]) -> float | str:
    """The largest error of loss and gradients against documents alone, or what was refused."""
    with without_casts():
        return _largest_error(family, settings)


def _largest_error(family: str, settings: dict[str, Any]) -> float | str:
    model = model_of(family)
    truth = alone(model, FORM)
    model.zero_grad()
    mesh = mesh_of(2, 1)
    try:
        handle = parallelize(model, mesh, MemorySettings(**settings))
        output = model(**shard_batch(FORM.batch(97), None, mesh, "zigzag"))
    except NotImplementedError as error:
        return str(error)
    assert (output.logits is None) == ("loss_tile" in settings)
    output.loss.backward()
    errors = [float((output.loss - truth.loss).abs() / truth.loss)]
    whole = torch.stack([x.norm() for x in truth.gradients.values()]).norm()
    for name, found in gradients_of(model).items():
        expected = truth.gradients[name]
        errors.append(float((found - expected).norm() / torch.maximum(expected.norm(), 1e-4 * whole)))
    handle.undo()
    assert not any("forward" in module.__dict__ for module in model.modules())
    return max(errors)


@pytest.mark.parametrize("feature", FEATURES)
def test_each_feature_gives_the_gradients_of_documents_alone(pool: Pools, feature: str) -> None:
    for error in pool(2).run(largest_error, "llama", FEATURES[feature]):
        assert error < 1e-10


def of_families(families: list[str]) -> dict[str, float | str]:
    return {family: largest_error(family, ALL) for family in families}


@pytest.mark.slow
def test_every_family_has_all_of_it_or_is_told_what_it_cannot_have(pool: Pools) -> None:
    for found in pool(2).run(of_families, [name for name in FAMILIES if name not in NARROW]):
        for family, error in found.items():
            if family in WITHOUT:
                setting, words = WITHOUT[family]
                assert isinstance(error, str), (family, error)
                assert setting in error or "tiled" in error
                assert words in error
            else:
                assert isinstance(error, float), (family, error)
                assert error < 1e-7, (family, error)


def refusals() -> dict[str, str]:
    """What is said to each setting that does not fit, and whether the model stayed as it was."""
    mesh, said = mesh_of(2, 1), {}
    own = model_of()
    own.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.sum()
    checkpointed = model_of()
    checkpointed.gradient_checkpointing_enable()
    cases: dict[str, tuple[Any, dict[str, Any]]] = {
        "own loss": (own, {"loss_tile": 4}),
        "checkpointed": (checkpointed, {"keep": "layer"}),
        "too many layers": (model_of(), {"keep": "layer", "host_layers": 5, "host_bytes": 1}),
        "too much memory": (model_of(), {"keep": "layer", "host_layers": 1, "host_bytes": 2**62}),
        "no mlp": (model_of("opt"), {"mlp_tile": 4}),
    }
    for name, (model, settings) in cases.items():
        try:
            parallelize(model, mesh, MemorySettings(**settings))
            said[name] = "nothing"
        except (ValueError, NotImplementedError, MemoryError) as error:
            said[name] = f"{type(error).__name__}: {error}"
        assert "_ringattn" not in model.__dict__, name
        assert not any("forward" in module.__dict__ for module in model.modules()), name
    return said


def test_what_does_not_fit_is_refused_and_leaves_the_model_alone(pool: Pools) -> None:
    said = pool(2).run(refusals)[0]
    assert "ForCausalLMLoss" in said["own loss"]
    assert "gradient_checkpointing_disable" in said["checkpointed"]
    assert said["too many layers"].startswith("ValueError: host_layers must be at most the 4 layers")
    assert said["too much memory"].startswith("MemoryError: host_bytes=")
    assert said["no mlp"].startswith("NotImplementedError: mlp_tile: OPTForCausalLM has no MLP")


@pytest.mark.parametrize("field", ["loss_tile", "mlp_tile", "every", "host_layers"])
@pytest.mark.parametrize("value", [-1, 0.5, True, "4"])
def test_settings_name_what_came(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{field} must be an integer of at least [01], got {value!r}"):
        MemorySettings(**{field: value})


def in_use() -> dict[str, Any]:
    """A copy, an evaluation, logits without labels, and a batch after one that failed between decoder and head."""
    mesh, found = mesh_of(2, 1), {}
    model = model_of()
    handle = parallelize(model, mesh, MemorySettings(**ALL))
    batch = shard_batch(FORM.batch(97), None, mesh)
    loss = model(**batch).loss
    copied = copy.deepcopy(model)
    found["a copy"] = float(copied(**batch).loss - loss)
    with torch.no_grad():
        found["an evaluation"] = float(model(**batch).loss - loss)
    unlabelled = {name: x for name, x in batch.items() if "label" not in name and "num_items" not in name}
    wanted = model(**unlabelled).logits
    norm = model.model.norm
    hook = norm.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**batch)
    hook.remove()
    found["after a failure"] = float((model(**unlabelled).logits - wanted).abs().max())
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient_checkpointing_disable"):
        model(**batch)
    model.gradient_checkpointing_disable()
    handle.undo()
    handle.undo()
    found["a tuple"] = len(copied(**batch, return_dict=False))
    return found


def test_in_use(pool: Pools) -> None:
    for found in pool(2).run(in_use):
        assert found.pop("a tuple") == 1  # the loss alone
        assert all(abs(value) < 1e-6 for value in found.values()), found


def without_tokens() -> float:
    """A rank that has no token takes part with all of it."""
    model, mesh = model_of(), mesh_of(2, 1)
    ids = torch.arange(3, 4)[None]
    truth = model(input_ids=ids, labels=ids, shift_labels=torch.tensor([[7]])).loss
    parallelize(model, mesh, MemorySettings(**ALL))
    loss = model(**shard_batch({"input_ids": ids, "shift_labels": torch.tensor([[7]])}, None, mesh, "contiguous")).loss
    loss.backward()
    return float(loss - truth)


def test_a_rank_without_tokens(pool: Pools) -> None:
    assert all(abs(error) < 1e-6 for error in pool(2).run(without_tokens))

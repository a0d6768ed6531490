"""Adapters as people use them around a parallelized model: added late, switched, merged, initialised from data."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("peft", reason="PEFT is not installed (pip install 'ringattn[hf]')")

from ringattn.hf import parallelize, shard_batch
from ringattn.hf.conformance import Errors, alone, differences, together
from tests.hf.tuners import FORM, TARGETS, adapted, base_model, config_of
from tests.parallel.ranks import mesh_of
from tests.pool import Pools

TOLERANCE = 1e-5


def local_batch() -> dict[str, Any]:
    return shard_batch(FORM.batch(97), None, mesh_of(2, 1), "zigzag")


def run(model: Any) -> Any:
    return together(model, mesh_of(2, 1), FORM, "zigzag")


def widened(model: Any, seed: int = 1) -> Any:
    """The same numbers on every rank, none of them zero, in what is trained."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return model


def within(errors: list[Errors]) -> bool:
    return all(error.within(TOLERANCE) for error in errors)


def added_late(with_head: bool) -> tuple[Errors, int]:
    """An adapter on a parallelized model; the handles that there are then."""
    from peft import get_peft_model

    options = {"modules_to_save": ["lm_head"]} if with_head else {}
    truth = alone(widened(get_peft_model(base_model(), config_of("LORA", r=4, **TARGETS, **options))), FORM)
    model = base_model()
    parallelize(model, mesh_of(2, 1))
    run(model)
    adapter = widened(get_peft_model(model, config_of("LORA", r=4, **TARGETS, **options)))
    handles = {id(module._ringattn) for module in model.modules() if hasattr(module, "_ringattn")}
    return differences(run(adapter), truth), len(handles)


@pytest.mark.parametrize("with_head", [False, True])
def test_added_to_a_parallelized_model(pool: Pools, with_head: bool) -> None:
    """PEFT copies the modules that it saves: a copied handle would hold a copy of the whole model."""
    for errors, handles in pool(2).run(added_late, with_head):
        assert errors.within(TOLERANCE), errors
        assert handles == 1


def injected() -> Errors:
    """Without a wrapper: what `inject_adapter_in_model`, and transformers' `add_adapter` by it, do."""
    from peft import inject_adapter_in_model

    truth = alone(widened(inject_adapter_in_model(config_of("LORA", r=4, **TARGETS), base_model())), FORM)
    model = base_model()
    parallelize(model, mesh_of(2, 1))
    return differences(run(widened(inject_adapter_in_model(config_of("LORA", r=4, **TARGETS), model))), truth)


def test_adapters_injected_without_a_wrapper_are_exact(pool: Pools) -> None:
    assert within(pool(2).run(injected))


def switched() -> list[Errors]:
    model = adapted("LORA", r=4, **TARGETS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.add_adapter("other", config_of("LORA", r=2, target_modules=["o_proj"]))
    model.set_adapter("other")
    widened(model, 2)
    plain = copy.deepcopy(model)
    truths = [alone(plain, FORM)]
    plain.set_adapter("default")
    truths.append(alone(plain, FORM))
    parallelize(model, mesh_of(2, 1))
    errors = [differences(run(model), truths[0])]
    model.set_adapter("default")
    return [*errors, differences(run(model), truths[1])]


def test_adapters_are_exact_after_each_switch(pool: Pools) -> None:
    for errors in pool(2).run(switched):
        assert within(errors), errors


def taken_away() -> tuple[float, float, float, float]:
    """Differences of losses: disabled, switched on again, merged, and of the base model after unloading."""
    model = adapted("LORA", r=4, **TARGETS)
    truth, base = alone(copy.deepcopy(model), FORM).loss.item(), alone(base_model(), FORM).loss.item()
    parallelize(model, mesh_of(2, 1))
    with model.disable_adapter(), torch.no_grad():
        disabled = model(**local_batch()).loss.item()
    enabled = model(**local_batch()).loss.item()
    other = copy.deepcopy(model).merge_and_unload()
    plain = model.unload()
    assert not hasattr(plain, "peft_config")
    merged, unloaded = other(**local_batch()).loss.item(), plain(**local_batch()).loss.item()
    assert abs(truth - base) > 1e-3
    return disabled - base, enabled - truth, merged - truth, unloaded - base


def test_disabled_merged_and_unloaded(pool: Pools) -> None:
    for differing in pool(2).run(taken_away):
        assert differing == pytest.approx([0.0] * 4, abs=2e-6)


def drawn_by_rank(when: str) -> None:
    from peft import get_peft_model

    model = base_model()
    if when == "before":
        torch.manual_seed(dist.get_rank())
        model = get_peft_model(model, config_of("LORA", r=4, **TARGETS))
    parallelize(model, mesh_of(2, 1))
    if when == "later":
        model(**local_batch())
    if when != "before":
        torch.manual_seed(dist.get_rank())
        model = get_peft_model(model, config_of("LORA", r=4, **TARGETS))
    model(**local_batch())


def drawn_apart(what: str) -> None:
    """What no gradient reaches: the places of a sparse adapter, whose values are all zero, or a frozen weight."""
    from peft import get_peft_model

    model = base_model()
    if what == "places":
        config = config_of("SHIRA", r=4, random_seed=dist.get_rank(), **TARGETS)
    else:
        config = config_of("IA3", target_modules=["k_proj"], feedforward_modules=[])
        model.lm_head.weight.data += dist.get_rank()
    model = get_peft_model(model, config)
    parallelize(model, mesh_of(2, 1))
    model(**local_batch())


@pytest.mark.parametrize("what", ["places", "frozen"])
def test_what_is_not_trained_differs_between_ranks(pool: Pools, what: str) -> None:
    with pytest.raises(ValueError, match="the ranks of a sequence hold different parameters"):
        pool(2).run(drawn_apart, what)


@pytest.mark.parametrize("when", ["before", "after", "later"])
def test_factors_that_differ_between_ranks(pool: Pools, when: str) -> None:
    with pytest.raises(ValueError, match="the ranks of a sequence hold different parameters"):
        pool(2).run(drawn_by_rank, when)


def frozen_only() -> float:
    """Buffers of the model itself are its own business."""
    model = base_model().requires_grad_(False)
    model.register_buffer("noise", torch.full((2,), float(dist.get_rank())))
    parallelize(model, mesh_of(2, 1))
    return model(**local_batch()).loss.item()


def test_models_without_anything_to_train(pool: Pools) -> None:
    first, second = pool(2).run(frozen_only)
    assert first == second


def collects(what: str) -> None:
    from peft import EvaConfig, get_peft_model, initialize_lora_eva_weights
    from peft.tuners.lora.config import CordaConfig, LoraGAConfig
    from peft.tuners.lora.loraga import preprocess_loraga

    model = base_model()
    if what == "eva":
        config = config_of("LORA", r=2, **TARGETS, init_lora_weights="eva", eva_config=EvaConfig())
        torch.manual_seed(0)
        model = get_peft_model(model, config)
        parallelize(model, mesh_of(2, 1))
        initialize_lora_eva_weights(model, [local_batch()])
    elif what == "corda":
        from peft.tuners.lora.corda import preprocess_corda

        config = config_of("LORA", r=2, **TARGETS, init_lora_weights="corda", corda_config=CordaConfig())
        parallelize(model, mesh_of(2, 1))
        preprocess_corda(model, config, lambda: model(**local_batch()))
    else:
        config = config_of("LORA", r=2, **TARGETS, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
        parallelize(model, mesh_of(2, 1))
        preprocess_loraga(model, config, lambda: model(**local_batch()).loss.backward())


@pytest.mark.parametrize("what", ["eva", "corda", "lora_ga"])
def test_initialised_from_what_a_rank_sees(pool: Pools, what: str) -> None:
    if what == "corda":
        pytest.importorskip("attr", reason="CorDA's module of PEFT imports it")
    with pytest.raises(
        NotImplementedError, match=f"peft.tuners.lora.{what.replace('_', '')} collects activations or gradients"
    ):
        pool(2).run(collects, what)


def routed(folder: str) -> Errors:
    """Arrow's router among two experts, which picks for each token; what is trained is the model below."""
    from peft import ArrowConfig
    from peft.tuners.lora import create_arrow_model

    paths = [str(Path(folder, name)) for name in ("a", "b")]
    model = create_arrow_model(base_model(), paths, ArrowConfig(top_k=1))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" not in name)
    truth = alone(model, FORM)
    parallelize(model, mesh_of(2, 1))
    return differences(run(model), truth)


def experts(folder: str) -> None:
    for seed, name in enumerate(("a", "b")):
        widened(adapted("LORA", r=4, **TARGETS), seed).save_pretrained(str(Path(folder, name)))


def test_arrow_routes_among_experts_as_one_rank_does(pool: Pools, tmp_path: Path) -> None:
    pool(1).run(experts, str(tmp_path))
    assert within(pool(2).run(routed, str(tmp_path)))


def regularised() -> tuple[float, dict[str, torch.Tensor], float, dict[str, torch.Tensor]]:
    """AdaLoRA adds a loss of its parameters to that of the targets: once, not once for every rank."""
    model = adapted("ADALORA", init_r=4, total_step=10, **TARGETS)
    truth = alone(model, FORM)
    model.zero_grad()
    factors = {name: p for name, p in model.named_parameters() if "lora_A" in name or "lora_B" in name}
    squares = [p @ p.T if "lora_A" in name else p.T @ p for name, p in factors.items()]
    away = torch.stack([(square - torch.eye(len(square))).norm() for square in squares]).mean()
    weight = model.peft_config["default"].orth_reg_weight
    (weight * away).backward()
    expected = {name: p.grad + truth.gradients[name] for name, p in factors.items()}
    parallelize(model, mesh_of(2, 1))
    found = run(model)
    gradients = {name: found.gradients[name] for name in factors}
    return found.loss.item(), gradients, truth.loss.item() + weight * away.item(), expected


def test_adalora_with_its_regularisation(pool: Pools) -> None:
    for loss, gradients, expected, truth in pool(2).run(regularised):
        assert loss == pytest.approx(expected, rel=1e-6)
        assert len(truth) == 24
        for name, gradient in truth.items():
            assert (gradients[name] - gradient).norm() <= TOLERANCE * gradient.norm(), name


def deeper(when: str) -> None:
    """A model that was made deeper by copies of layers, whose configuration is copied with them."""
    model = base_model("llama")
    model.set_attn_implementation("sdpa")
    layer = copy.deepcopy(model.model.layers[-1])
    layer.self_attn.layer_idx = 4
    model.model.layers.append(layer)
    model.config.num_hidden_layers = 5
    if when == "mended":
        layer.self_attn.config = model.config
    parallelize(model, mesh_of(2, 1))
    model(**local_batch())


def test_copied_layers_need_configurations_of_their_own(pool: Pools) -> None:
    pool(2).run(deeper, "mended")
    with pytest.raises(
        NotImplementedError, match=r"LlamaAttention at model.layers.4.self_attn with a configuration of"
    ):
        pool(2).run(deeper, "as copied")


def copied_part() -> bool:
    model = base_model("llama")
    handle = parallelize(model, mesh_of(2, 1))
    layer: nn.Module = copy.deepcopy(model.model.layers[0])
    return layer.self_attn._ringattn is handle


def test_a_copied_part_copies_no_model(pool: Pools) -> None:
    assert pool(2).run(copied_part) == [True, True]

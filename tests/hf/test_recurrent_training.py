"""Hybrids in what trains them, on 2 ranks: `ringattn check`, the Trainer, ZeRO-3, compiled layers."""

from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("transformers")

from ringattn.hf import parallelize, shard_batch
from ringattn.hf.check import Request
from ringattn.hf.tiny import read_config, tiny_config, tiny_model
from tests.hf import test_trainer_runs, trainer_runs
from tests.hf.families import FAMILIES
from tests.hf.test_check import findings_of
from tests.hf.trainer_runs import same_history
from tests.parallel.ranks import mesh_of
from tests.pool import Pools

# One layer with a state beside one of attention, so that each passes things on to the other.
SMALL: dict[str, dict[str, Any]] = {
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2},
    "nemotron_h": {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2},
}


# qwen3_next has so many parameters that ZeRO-3 and the compiler take minutes.
IN_CI = [pytest.param(one, marks=pytest.mark.nightly) if one == "qwen3_next" else one for one in SMALL]


def hybrid(family: str) -> Any:
    return tiny_model(tiny_config(read_config(family), **(FAMILIES[family] | SMALL[family])))


@pytest.mark.slow
def test_ringattn_check(pool: Pools) -> None:
    findings = pool(2).run(findings_of, Request("granitemoehybrid", 2, 1, policy="zigzag"), None)[0]
    assert [finding for finding in findings if not finding.ok] == []
    names = [finding.name for finding in findings]
    assert sum(name.endswith("= documents alone") for name in names) == 6


def on_a_hybrid(work: str, family: str, *args: Any) -> Any:
    """One of the Trainer's runs, with a hybrid in the place of its model."""
    with mock.patch.object(trainer_runs, "small_model", partial(hybrid, family)):
        return getattr(test_trainer_runs, work)(*args)


@pytest.mark.parametrize("family", ["qwen3_next", "nemotron_h"])
def test_the_trainer(pool: Pools, family: str, tmp_path: Path) -> None:
    expected = pool(1).run(on_a_hybrid, "trained", family, str(tmp_path), 1, 1, {"max_steps": 2})[0]
    for found in pool(2).run(on_a_hybrid, "trained", family, str(tmp_path), 1, 2, {"max_steps": 2}):
        same_history(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("family", IN_CI)
def test_zero_3(pool: Pools, family: str, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (pip install 'ringattn[deepspeed]')")
    sizes = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "gradient_clipping")
    expected, loss = pool(1).run(on_a_hybrid, "unsharded", family, str(tmp_path))[0]
    changes = {"deepspeed": {"zero_optimization": {"stage": 3}} | dict.fromkeys(sizes, "auto")}
    for found, found_loss, kind in pool(2).run(on_a_hybrid, "sharded", family, str(tmp_path), changes, timeout=300.0):
        assert kind == "DeepSpeedEngine"
        same_history(found, expected)
        assert found_loss == pytest.approx(loss, rel=2e-5)


def compiled_layers(family: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Loss and gradients, without and with layers compiled one by one; their graphs break where states are carried."""
    torch._dynamo.reset()
    mesh, model = mesh_of(2, 1), hybrid(family)
    parallelize(model, mesh)
    results = []
    for compiled in (False, True):
        if compiled:
            for layer in model.model.layers:
                layer.compile(backend="aot_eager")
        found = []
        for size in (30, 21):
            ids = torch.randint(3, 97, (1, size), generator=torch.Generator().manual_seed(size))
            loss = model(**shard_batch({"input_ids": ids, "labels": ids}, None, mesh)).loss
            loss.backward()
            found += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
            model.zero_grad()
        results.append(found)
    return results[0], results[1]


@pytest.mark.slow
@pytest.mark.parametrize("family", IN_CI)
def test_compiled_layers(pool: Pools, family: str) -> None:
    for plain, compiled in pool(2).run(compiled_layers, family, timeout=300.0):
        assert len(plain) == len(compiled)
        for a, b in zip(plain, compiled, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-7)

"""A step without a finite loss and gradient changes nothing, says where its numbers came from, and does not last."""

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from ringattn.training.checks.bad_numbers import BadNumbers, check_weights, first_of
from ringattn.training.checks.culprit import documents_of
from ringattn.training.engines.deepspeed import available as deepspeed_available
from ringattn.training.engines.optimizers import step_if_finite
from ringattn.training.health.incidents import read_incidents
from ringattn.training.loop import Trainer
from ringattn.training.packs.packing import PackPlan, Segment
from ringattn.training.report.records import read_metrics
from tests.training import fault_rows
from tests.training.recipe import prepared

SMALL = ("data.seq_len=128", "data.packs_per_step=2", "run.steps=6")


def test_documents_of_rows():
    plan = PackPlan((Segment(7, 10, 14, True), Segment(3, 0, 6, False)), 12)
    first, second = {"document": 7, "start": 10, "stop": 14}, {"document": 3, "start": 0, "stop": 6}
    assert documents_of(plan, None) == [first, second]
    assert documents_of(plan, [3]) == [first]
    assert documents_of(plan, [4, 9]) == [second]
    assert documents_of(plan, [11]) == []  # padding


def test_the_first_of_all_ranks_counts():
    late, early, same = ({"rank": rank, "micro_step": 0, "order": order} for rank, order in ((0, 9), (1, 4), (2, 4)))
    other = {"rank": 3, "micro_step": 1, "order": 1}
    assert first_of([late, early, same, None, other]) == [early, same]
    assert first_of([None, None]) == []


def test_an_optimizer_that_cannot_decide_on_the_device_waits():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], lr=0.5)  # not fused, as torchao's
    for norm, moves in ((float("nan"), False), (float("inf"), False), (1.0, True)):
        weight.grad = torch.full((2,), norm)
        step_if_finite(optimizer, torch.tensor(norm))
        assert (weight.tolist() != [1.0, 1.0]) is moves
        assert bool(optimizer.state) is moves


def state_of(trainer: Trainer) -> list[torch.Tensor]:
    """Weights and the optimizer's states, as they are now."""
    tensors: list[Any] = list(trainer.engine.model.parameters())
    optimizer = getattr(trainer.engine, "_optimizer", None) or trainer.engine._engine.optimizer.optimizer
    tensors += [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    held = [getattr(tensor, "ds_tensor", tensor) for tensor in tensors]
    local = [getattr(tensor, "_local_tensor", tensor).detach() for tensor in held]
    return [one.dequantize() if hasattr(one, "codes") else one.clone() for one in local]


def left_out(output: Path, *overrides: str) -> tuple[bool, bool, list[bool], str]:
    """A step with a NaN in the gradient, between good ones: whether it left everything as it was, whether the next one
    did not, whether the random numbers went on alike, and what was said."""
    trainer = Trainer(prepared(f"run.output={output}", *SMALL, *overrides))
    spoil: list[bool] = []
    model = getattr(trainer.engine.model, "module", trainer.engine.model)
    model.model.layers[0].mlp.register_forward_hook(
        lambda module, given, result: result * float("nan") if spoil else result
    )
    with trainer._batches() as stream:
        trainer._train_step(next(stream))
        before, random = state_of(trainer), torch.get_rng_state()
        spoil.append(True)
        done = trainer._train_step(next(stream))
        same = all(map(torch.equal, state_of(trainer), before))
        after = torch.get_rng_state()
        spoil.clear()
        torch.set_rng_state(random)
        good = trainer._train_step(next(stream))
        moved = not torch.equal(state_of(trainer)[0], before[0])
        assert math.isfinite(good.loss)
        assert trainer.step == 3
        check_weights(trainer.engine.model, 3, trainer.job.device)
    (incident,) = read_incidents(output)
    return same, moved, [math.isfinite(done.norm), torch.equal(random, after)], incident["message"]


needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="no torchao")
WIDE = ["model.config.hidden_size=64", "model.config.intermediate_size=128"]  # shards large enough for 8 bits
needs_deepspeed = [pytest.mark.skipif(not deepspeed_available(), reason="no deepspeed"), pytest.mark.slow]


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        pytest.param(("memory.states_on=host",), marks=pytest.mark.slow),
        pytest.param(("memory.keep=layer",), marks=pytest.mark.slow),
        pytest.param(("memory.moments=int8", *WIDE), marks=[needs_torchao, pytest.mark.nightly]),
        pytest.param(
            ("memory.moments=int8", "memory.states_on=host", *WIDE), marks=[needs_torchao, pytest.mark.nightly]
        ),
        pytest.param(("engine=deepspeed", "engine.zero_stage=1"), marks=needs_deepspeed),
        pytest.param(("engine=deepspeed", "engine.zero_stage=3"), marks=needs_deepspeed),
    ],
    ids=" ".join,
)
def test_a_step_is_left_out(pool, tmp_path, overrides):
    same, moved, (norm_is_finite, _), message = pool(1).run(left_out, tmp_path, *overrides)[0]
    assert same
    assert moved
    assert not norm_is_finite
    assert message.startswith("step 2 is left out: loss nan, gradient norm ")
    assert "rank 0 made it in model.layers.0.mlp, in the forward pass, document" in message


def infinite_loss(output: Path) -> bool:
    """A loss that is infinite with finite gradients leaves the step out, too."""
    trainer = Trainer(prepared(f"run.output={output}", *SMALL))
    right = trainer._forward
    trainer._forward = lambda *given: right(*given) + float("inf")  # type: ignore[method-assign]
    with trainer._batches() as stream:
        before = state_of(trainer)
        trainer._train_step(next(stream))
        return all(map(torch.equal, state_of(trainer), before))


def test_an_infinite_loss_is_left_out(pool, tmp_path):
    assert pool(1).run(infinite_loss, tmp_path) == [True]
    (incident,) = read_incidents(tmp_path)
    assert "it did not come again when the passes were repeated" in incident["message"]
    assert len(incident["packs"]) == 2


def weights(output: Path) -> bool:
    trainer = Trainer(prepared(f"run.output={output}", *SMALL))
    next(iter(trainer.engine.model.parameters()))._local_tensor[ord("e"), 0] = float("nan")
    with trainer._batches() as stream:
        trainer._train_step(next(stream))
    with pytest.raises(BadNumbers, match="weights are not finite after step 1"):
        trainer.save()
    return (output / "checkpoints").exists()


def test_weights_that_are_not_finite_are_named_and_never_saved(pool, tmp_path):
    assert pool(1).run(weights, tmp_path) == [False]
    (incident,) = read_incidents(tmp_path)
    assert "model.embed_tokens, whose weights are not finite" in incident["message"]


@pytest.mark.slow
def test_nan_in_one_ranks_gradient(tmp_path):
    found = fault_rows.bad_gradient(tmp_path, [5, 6])
    assert found.codes == [0, 0], found.said
    assert found.seconds < 20
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in records if record["skipped"]] == [5, 6]
    assert all(record["grad_norm"] is not None for record in records if not record["skipped"])
    assert all("NaN" not in line for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    incidents = read_incidents(tmp_path / "run")
    assert [(one["kind"], one["rank"], one["step"], one["in_a_row"]) for one in incidents] == [
        ("bad-numbers", 1, 5, 1),
        ("bad-numbers", 1, 6, 2),
    ]
    assert "rank 1 made it in model.layers.1.mlp, in the backward pass" in found.said
    assert "rank 0 made it" not in found.said
    assert incidents[0]["found"][0]["documents"]


@pytest.mark.slow
def test_an_infinite_number_is_found_with_its_document(tmp_path):
    found = fault_rows.bad_activation(tmp_path, [5], "data.pad=false")
    assert found.codes == [0, 0], found.said
    (incident,) = read_incidents(tmp_path / "run")
    assert incident["rank"] == 1
    assert [one["module"] for one in incident["found"] if one["rank"] == 1] == ["model.layers.1.mlp"]
    assert len(incident["found"][0]["documents"]) == 1


@pytest.mark.slow
def test_too_many_end_the_run_and_leave_the_good_checkpoints(tmp_path):
    found = fault_rows.bad_gradient(tmp_path, [5, 6, 7, 8], "run.max_bad_steps=2")
    assert set(found.codes) == {1}
    assert (
        f"{BadNumbers.__name__}: no finite loss and gradient in steps 5 to 7, more than run.max_bad_steps=2"
        in found.said
    )
    checkpoints = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert checkpoints == ["step-00000002", "step-00000004"]
    marker = json.loads((tmp_path / "run" / "checkpoints" / checkpoints[-1] / "complete.json").read_text())
    assert marker["step"] == 4

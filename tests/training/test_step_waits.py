"""How often the host waits for the device in a step: once, at its end."""

import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers")

from ringattn.training.loop import Trainer
from ringattn.training.report.metrics import StepSeconds
from tests.pool import Pools
from tests.training.recipe import prepared

READS = {"tolist", "item", "__bool__", "__float__", "__int__", "__index__", "cpu"}
# transformers asks once a forward pass whether positions are those of packed documents. The optimizer's count of steps
# and the state of the generators are host memory everywhere.
NOT_OURS = ("transformers/masking_utils.py", "torch/optim/", "ringattn/hf/local_draws.py")


def place() -> str:
    """The line of code outside of torch that reads, or of its optimizers."""
    for frame in reversed(traceback.extract_stack()):
        name = frame.filename
        if __file__ != name and ("/torch/" not in name or "/torch/optim/" in name):
            return f"{name}:{frame.lineno}"
    return "?"


class Reads(TorchFunctionMode):
    """Notes where values of tensors are read."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in READS:
            self.places.append(place())
        return func(*args, **(kwargs or {}))


class Sizes(TorchDispatchMode):
    """Notes where values of tensors decide about sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.nonzero.default, torch.ops.aten.masked_select.default):
            self.places.append(place())
        return func(*args, **(kwargs or {}))


def trained(output: Path, *overrides: str) -> Callable[[Callable[[Trainer, Any], Any]], Any]:
    """Runs a function on a trainer and the batch of its second step."""

    def with_second_step(function: Callable[[Trainer, Any], Any]) -> Any:
        trainer = Trainer(prepared(f"run.output={output}", "run.steps=4", "data.seq_len=128", *overrides))
        with trainer._batches() as stream:
            trainer._train_step(next(stream))
            return function(trainer, next(stream))

    return with_second_step


def reads_of_a_step(output: Path) -> tuple[list[str], list[str]]:
    def watched(trainer: Trainer, batch: Any) -> tuple[list[str], list[str]]:
        with Sizes() as sizes, Reads() as reads:
            trainer._train_step(batch)
        return reads.places, sizes.places

    return trained(output, "data.packs_per_step=2", "parallel.backend=cpu")(watched)


def test_a_step_is_read_once(pool: Pools, tmp_path: Path) -> None:
    reads, sizes = pool(1).run(reads_of_a_step, tmp_path)[0]
    assert any("transformers/masking_utils.py" in name for name in reads), (
        "what is left out was not seen: the test sees nothing"
    )
    ours = [name for name in reads if not any(other in name for other in NOT_OURS)]
    assert len(ours) == 1, ours
    assert "ringattn/training/loss.py" in ours[0]
    assert not sizes


class Untouched:
    """Stands for plans that nobody may look at."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError("a step looked at the plans of all its packs")

    __iter__ = __getitem__ = __len__ = __getattr__


def step_without_plans(output: Path) -> list[int]:
    def watched(trainer: Trainer, batch: Any) -> list[int]:
        plans: Any = Untouched()
        hidden = replace(batch, plans=plans)
        trainer.health.computes(hidden.counts.digest)
        done = trainer._train_step(hidden)
        told = trainer._metrics(hidden, done, StepSeconds(1.0, 0.0, False), None)
        return [told.targets, told.tokens, int(told.tokens_per_second or 0)]

    return trained(output, "data.packs_per_step=2", "parallel.backend=cpu")(watched)


def test_a_step_does_not_look_at_every_document(pool: Pools, tmp_path: Path) -> None:
    """There may be thousands, and the device waits meanwhile: they were counted as the batch was made."""
    targets, tokens, rate = pool(1).run(step_without_plans, tmp_path)[0]
    assert (tokens, rate) == (512, 256)
    assert 0 < targets <= 256


def waits_of_a_step(output: Path) -> list[str]:
    def watched(trainer: Trainer, batch: Any) -> list[str]:
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                trainer._train_step(batch)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return [f"{one.filename}:{one.lineno}" for one in caught if "synchronizing CUDA operation" in str(one.message)]

    return trained(output, "data.packs_per_step=2", "data.ahead=process")(watched)


@pytest.mark.gpu
def test_on_a_gpu_too(pool: Pools, tmp_path: Path) -> None:
    places = pool(1, "cuda").run(waits_of_a_step, tmp_path, timeout=300)[0]
    ours = [name for name in places if not any(other in name for other in NOT_OURS)]
    assert len(ours) == 1, places


def batches_on_a_gpu(output: Path, place: str) -> None:
    def watched(trainer: Trainer, batch: Any) -> None:
        maker = trainer._batches()._maker
        expected = maker.batches()  # they begin where the step before ended
        for local, right in zip(batch.micro, next(expected).micro, strict=True):
            assert local.ids.is_cuda
            assert local.there is not None
            for name in ("ids", "targets", "positions"):
                assert torch.equal(getattr(local, name).cpu(), getattr(right, name))

    def later(trainer: Trainer, batch: Any) -> None:
        trainer._train_step(batch)

    trained(output / "same", f"data.ahead={place}", "data.packs_per_step=2")(watched)
    trained(output / "later", f"data.ahead={place}", "data.packs_per_step=2")(later)


@pytest.mark.gpu
@pytest.mark.parametrize("place", ["process", "thread"])
def test_batches_are_on_the_gpu_and_right(pool: Pools, tmp_path: Path, place: str) -> None:
    """What arrived on a stream of its own is what the host has, and the attention's plan came along."""
    pool(1, "cuda").run(batches_on_a_gpu, tmp_path, place, timeout=300)

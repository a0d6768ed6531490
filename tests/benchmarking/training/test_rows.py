"""Every row of the training benchmark in tiny form: the same loss and gradients, whoever trains."""

import gc
import time
import weakref
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

pytest.importorskip("transformers")

from benchmarks.training.__main__ import started
from benchmarks.training.attempts import attempt_apart
from benchmarks.training.case import Case, new_model
from benchmarks.training.kernel import MeasuredKernel
from benchmarks.training.measuring import ROWS
from benchmarks.training.options import case_of, checked, parser
from tests.pool import Pools

TINY = "--model tiny --device cpu --dtype float32 --weights float32 --moments float32 --loss-tile 50 --mlp-tile 32"


def options_of(words: str) -> Any:
    return checked(parser().parse_args(f"{TINY} {words}".split()))


def measured(words: str) -> list[dict[str, Any]]:
    with started(options_of(words)) as bench:
        bench.run()
        return [one.as_dict() for one in bench.results]


def plain_loss(words: str, tokens: int) -> float:
    """Of the plain model in float64, each document alone."""
    with started(options_of(words)) as bench:
        case = case_of(bench.options, "hf", tokens, bench.place)
        return float(documents_alone(case, new_model(case, torch.device("cpu")).double()))


def documents_alone(case: Case, model: Any) -> Tensor:
    first, total = 0, torch.zeros((), dtype=torch.float64)
    ids = case.ids(torch.device("cpu"))
    for length in case.docs.lengths:
        own = ids[None, first : first + length]
        first += length
        if length > 1:
            logits = model(input_ids=own, use_cache=False).logits[0, :-1]
            total = total + torch.nn.functional.cross_entropy(logits, own[0, 1:], reduction="sum")
    return total / case.num_targets


@pytest.mark.parametrize(("ranks", "documents"), [(1, "dense"), (2, "packed")])
def test_rows_have_the_loss_of_the_plain_model(pool: Pools, ranks: int, documents: str) -> None:
    words = f"--seq-len 1k --rows ours,hf --host-layers 1 --dry-attention also --documents {documents}"
    wanted = pool(1).run(plain_loss, words, 1024)[0]
    for found in pool(ranks).run(measured, words):
        assert [(one["row"], one["attention"]) for one in found] == [
            ("ours", "dry"), ("ours", "real"), ("hf", "dry"), ("hf", "real"),
        ]  # fmt: skip
        for one in found:
            assert not one["failure"]
            assert one["seconds"] > one["update"] > 0
            assert (abs(one["loss"] - wanted) < 1e-5) == (one["attention"] == "real")
            forward, backward = one["calls"]
            assert forward == backward * (2 if one["row"] == "hf" else 1) > 0


def test_the_floor_is_part_of_a_step(pool: Pools) -> None:
    (found,) = pool(1).run(measured, "--seq-len 256 --rows ours,hf --floor --keep layer")
    for one in found:
        assert one["share"] == pytest.approx(one["floor"] / (one["seconds"] - one["update"]))
    assert found[0]["floor"] == found[1]["floor"] > 0


def whole(grad: Any) -> Tensor:
    return grad.full_tensor() if isinstance(grad, DTensor) else grad


def gradients(row: str, words: str) -> list[Tensor]:
    with started(options_of(words)) as bench:
        made = ROWS[row](case_of(bench.options, row, 1024, bench.place), bench.place, bench.tools)
        made.prepare()
        made.backward(made.forward())
        found = [whole(parameter.grad).double() for parameter in made.model.parameters()]
        made.close()
        return found


def plain_gradients(words: str) -> list[Tensor]:
    with started(options_of(words)) as bench:
        case = case_of(bench.options, "hf", 1024, bench.place)
        model = new_model(case, torch.device("cpu")).double()
        return list(torch.autograd.grad(documents_alone(case, model), list(model.parameters())))


@pytest.mark.parametrize("row", ["ours", "hf", "alst-unsharded"])
def test_rows_have_the_gradients_of_the_plain_model(pool: Pools, row: str) -> None:
    if row.startswith("alst"):
        pytest.importorskip("deepspeed")
    words = "--seq-len 1k --documents packed --host-layers all"
    wanted = pool(1).run(plain_gradients, words)[0]
    for one, other in zip(pool(1).run(gradients, row, words)[0], wanted, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-5


def models_alive() -> list[nn.Module]:
    return [one for one in gc.get_objects() if type(one).__name__.endswith("LlamaForCausalLM")]


def holders(models: list[weakref.ref[nn.Module]]) -> list[str] | None:
    """What still holds models: the types of it, none if they are gone, None if there were never any.

    Garbage is collected several times: a call of gc.collect does nothing while another thread collects.
    """
    for _ in range(20):
        gc.collect()
        if all(ref() is None for ref in models):
            return [] if models else None
        time.sleep(0.1)
    return [str(type(holder)) for ref in models if ref() is not None for holder in gc.get_referrers(ref())]


def lacking(words: str) -> tuple[list[dict[str, Any]], list[str] | None]:
    """Two rows, of which the first has no room for its last kernel call; and what holds its model after it."""
    models: list[weakref.ref[nn.Module]] = []
    with started(options_of(words)) as bench:
        earlier = {id(one) for one in models_alive()}

        def full(self: MeasuredKernel, dout: Tensor, saved: Any, grads: Any) -> None:
            models[:] = [weakref.ref(one) for one in models_alive() if id(one) not in earlier]
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        with mock.patch.object(MeasuredKernel, "backward", full):
            bench.run()
        held = holders(models)
        bench.run()
        return [one.as_dict() for one in bench.results], held


@pytest.mark.parametrize("row", ["ours", "hf", "alst", "alst-unsharded"])
def test_a_row_without_room_leaves_nothing_behind(pool: Pools, row: str) -> None:
    if row.startswith("alst"):
        pytest.importorskip("deepspeed")
    ((first, second), held) = pool(1).run(lacking, f"--seq-len 256 --rows {row} --host-layers all")[0]
    assert first["failure"] == "out of memory"
    assert held == []
    assert not second["failure"]
    assert second["loss"]


def no_room(words: str) -> list[dict[str, Any]]:
    with started(options_of(words)) as bench:
        bench.run()
    return []


def test_several_ranks_do_not_go_on_without_room(pool: Pools) -> None:
    """The others may wait in a collective: the process has to end."""
    with pytest.raises(MemoryError, match="GiB are wanted"):
        pool(2).run(no_room, "--seq-len 16384 --rows ours --host-layers all --host-room 0.0001")


@pytest.mark.nightly
def test_attempts_of_several_ranks_say_what_they_lacked() -> None:
    options = options_of("--longest --gpus 2 --host-layers all --limit 300")
    found = attempt_apart(options, "ours", 4096)
    assert found.peak is not None
    assert found.peak > 0
    options.host_room = 1e-4
    found = attempt_apart(options, "ours", 16384)
    assert found.peak is None
    assert found.failure.startswith("host memory: ")
    options.layers = 3
    options.model = "nothing"
    with pytest.raises(RuntimeError, match="--model must be tiny or one of"):
        attempt_apart(options, "ours", 4096)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_deepspeed_has_the_loss_of_the_plain_model(pool: Pools, ranks: int) -> None:
    pytest.importorskip("deepspeed")
    words = "--seq-len 1k --rows alst,ours,alst --host-layers all --documents packed"
    wanted = pool(1).run(plain_loss, words, 1024)[0]
    for found in pool(ranks).run(measured, words):
        for one in found:
            assert not one["failure"]
            assert abs(one["loss"] - wanted) < 1e-5


def test_what_a_row_cannot_do_stands_in_its_line(pool: Pools) -> None:
    pytest.importorskip("deepspeed")
    (found,) = pool(1).run(measured, "--seq-len 64 --rows alst,ours --moments none")
    assert "moments=none needs the row alst-unsharded" in found[0]["failure"]
    assert not found[1]["failure"]
    assert found[1]["states"] == "weights float32, moments none"
    (found,) = pool(1).run(measured, "--seq-len 16384 --rows ours --host-layers all --host-room 0.0001")
    assert found[0]["failure"].startswith("host memory: ")

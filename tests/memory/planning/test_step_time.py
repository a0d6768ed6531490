"""Predicted seconds: items, what each setting adds, and figures that can be checked by hand."""

from dataclasses import replace
from typing import Any

import pytest

from ringattn.memory.planning.limits import GIB, Limits
from ringattn.memory.planning.parts import Weights
from ringattn.memory.planning.planner import Planner
from ringattn.memory.planning.rates import Rates
from ringattn.memory.planning.settled import Settled
from ringattn.memory.planning.shapes import RunShape
from ringattn.parallel.machine.shipped import SHIPPED
from tests.memory.planning.shapes_of import llama_8b


def settled(values: dict[str, Any], **run: Any) -> Settled:
    given = RunShape(**{"tokens": 65536, "ring": 2, **run})
    return Planner(llama_8b(), given, Limits(1000 * GIB)).settled(values)


def test_items_are_the_whole_and_mfu_counts_no_recomputation() -> None:
    time = settled({"keep": "attention"}).time
    assert time.seconds == sum(time.items.values())
    products = 6.0 * (32 * 218103808 + 128256 * 4096) * 65536
    pairs = 65536 * 65537 / 2
    assert time.flops == pytest.approx(products + 12 * 4096 * 32 * pairs)
    assert time.mfu == pytest.approx(time.flops / time.seconds / 2 / 989e12)
    assert time.tokens_per_second == pytest.approx(65536 / time.seconds / 2)
    local = RunShape(65536, ring=2).local_tokens
    rates = Rates.of(SHIPPED["H200"])
    wanted = products / 65536 * local / (rates.peak * rates.gemm)
    assert time.items["matrix products"] == pytest.approx(wanted)


def test_what_is_computed_again() -> None:
    again = {keep: settled({"keep": keep}).time.items.get("computed again", 0.0) for keep in ("all", "selective")}
    again |= {keep: settled({"keep": keep}).time.items["computed again"] for keep in ("attention", "layer")}
    assert again["all"] == 0 < again["selective"] < again["attention"] < again["layer"]
    forward = settled({}).alive.attention.forward_seconds
    assert again["layer"] - again["attention"] == pytest.approx(forward)
    twice = settled({"keep": "layer", "every": 2}).time.items["computed again"]
    assert twice > again["layer"] + forward / 2


def test_tiles_cost_little_and_offload_only_what_no_kernel_hides() -> None:
    plain = settled({"keep": "attention"}).time.seconds
    assert 1.0 < settled({"keep": "attention", "loss_tile": 2048}).time.seconds / plain < 1.03
    assert 1.0 < settled({"keep": "attention", "mlp_tile": 8192}).time.seconds / plain < 1.03
    short = {"keep": "attention", "host_layers": 32}
    assert "exposed offload" not in settled(short, tokens=2**20).time.items
    planner = Planner(replace(llama_8b(), active=2**24), RunShape(8192, ring=2), Limits(1000 * GIB))
    assert planner.settled(short).time.items["exposed offload"] > 0  # so little is computed


def test_states_on_the_host_are_slower_and_more_ranks_are_faster() -> None:
    here, there = (settled({"states_on": place}).time.items["optimizer"] for place in ("device", "host"))
    assert there > 5 * here
    assert settled({}, ring=4).time.seconds < settled({}).time.seconds
    assert "exposed gathers and reductions" not in settled({}, ring=1).time.items
    one, two = (settled({}, micro_steps=count).time for count in (1, 2))
    assert two.tokens == 2 * one.tokens
    assert two.seconds - two.items["optimizer"] == pytest.approx(2 * (one.seconds - one.items["optimizer"]))


def test_a_measured_step_of_four_h200s() -> None:
    """Four of Llama-8B's layers, 32,768 words, packed documents, everything computed again: 0.68 to 0.80 s measured,
    once kernels were compiled, at 39 to 41 % MFU (benchmarks/results/recipe-h200.md)."""
    ends = Weights(32768 * 4096, 32768 * 4096)
    shape = replace(llama_8b(4), vocabulary=32768, embedding=ends, head=ends)
    run = RunShape(131072, ring=4, lengths=(16384,) * 8)
    time = Planner(shape, run, Limits(141 * GIB)).settled({"keep": "layer"}).time
    assert 0.35 < time.mfu < 0.55

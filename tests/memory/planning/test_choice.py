"""What is chosen: the fastest that fits, and what is said where nothing does."""

from typing import Any

import pytest

from ringattn.memory.planning.choice import longest, plan_run
from ringattn.memory.planning.limits import GIB, Limits
from ringattn.memory.planning.planner import TIE, Planner
from ringattn.memory.planning.shapes import RunShape
from ringattn.memory.settings import MemorySettings, StateSettings
from tests.memory.planning.shapes_of import llama_8b

H200 = Limits(140 * GIB, 1500 * GIB)
MILLION = RunShape(2**20, ring=1, ulysses=8)


def test_nothing_that_fits_is_faster() -> None:
    """Every other way on a grid of settings is slower, or does not fit."""
    limits = Limits(80 * GIB, 500 * GIB)
    run = RunShape(131072, ring=2)
    choice = plan_run(llama_8b(8), run, {}, limits)
    assert not choice.settled.lacking
    planner = Planner(llama_8b(8), run, limits)
    tried = 0
    for loss in (None, 1024, 4096):
        for mlp in (None, 4096):
            for keep in ("all", "selective", "attention", "layer"):
                for away in (0, 4, 8):
                    if keep == "all" and away:
                        continue
                    values = {"loss_tile": loss, "mlp_tile": mlp, "keep": keep, "host_layers": away}
                    other = planner.settled(values)
                    tried += not other.lacking
                    assert other.lacking or other.time.seconds * (1 + TIE) >= choice.time.seconds
    assert tried > 3


def test_what_is_fixed_stays() -> None:
    fixed: dict[str, Any] = {"loss_tile": 512, "keep": "layer", "every": 2, "host_layers": 3, "weights": "bfloat16"}
    fixed |= {"moments": "bfloat16", "reshard": False, "prefetch": 2, "mlp_tile": None, "states_on": "device"}
    choice = plan_run(llama_8b(), MILLION, fixed, H200)
    assert {key: choice.settled.values[key] for key in fixed} == fixed
    assert isinstance(choice.memory, MemorySettings)
    assert isinstance(choice.states, StateSettings)
    assert not choice.alternatives
    # Two of the three layers keep their input, which begins at a multiple of 512 bytes.
    assert choice.memory.host_bytes == 2 * 131072 * 4096 * 2


def test_what_changes_the_numbers_is_not_chosen() -> None:
    limits = Limits(60 * GIB, 64 * GIB)
    with pytest.raises(ValueError, match="moments=int8"):
        plan_run(llama_8b(), RunShape(16384, ring=2), {"states_on": "device"}, limits)
    chosen = plan_run(llama_8b(), MILLION, {"keep": "auto"}, H200)
    assert (chosen.states.weights, chosen.states.moments, chosen.states.reduce) == ("float32",) * 3


def test_layers_go_to_the_host_only_as_far_as_they_must() -> None:
    fixed = {"keep": "attention", "every": 1}
    limits = Limits(80 * GIB, 1500 * GIB)
    choice = plan_run(llama_8b(), RunShape(2**19, ring=4), fixed, limits)
    away = choice.memory.host_layers
    assert 0 < away < 32
    planner = Planner(llama_8b(), RunShape(2**19, ring=4), limits)
    fewer = {**choice.settled.values, "host_layers": away - 1}
    del fewer["host_bytes"]
    assert "GPU" in planner.settled(fewer).lacking
    assert choice.memory.host_bytes == choice.plan.layers.host_bytes


def test_a_refusal_says_what_would_fit() -> None:
    small = Limits(40 * GIB, 100 * GIB)
    with pytest.raises(ValueError, match="keep=auto") as refused:
        plan_run(llama_8b(8), RunShape(131072, ring=2), {"keep": "all"}, small)
    told = str(refused.value)
    assert "131072 tokens of llama_8b do not fit 2 GPUs" in told
    fewer = int(told.partition("at most ")[2].split()[0])
    assert plan_run(llama_8b(8), RunShape(fewer, ring=2), {"keep": "all"}, small).settled.lacking == ""
    with pytest.raises(ValueError, match="16 GPUs"):
        plan_run(llama_8b(), RunShape(2**22, ring=8), {}, H200)


def test_asked_pinned_memory_is_kept() -> None:
    fixed = {"keep": "layer", "host_layers": 4, "host_bytes": 1000}
    with pytest.raises(ValueError, match="host_bytes=1000"):
        plan_run(llama_8b(), MILLION, fixed, H200)
    some = plan_run(llama_8b(), RunShape(2**19, ring=4), {"keep": "attention", "host_bytes": 100 * GIB}, H200)
    assert some.plan.layers.host_bytes <= some.memory.host_bytes == 100 * GIB


def test_the_longest_fits_and_more_does_not() -> None:
    run = RunShape(1, ring=2)
    found = longest(llama_8b(), run, {"keep": "attention"}, H200)
    assert plan_run(llama_8b(), RunShape(found, ring=2), {"keep": "attention"}, H200)
    with pytest.raises(ValueError, match="do not fit"):
        plan_run(llama_8b(), RunShape(int(found * 1.03), ring=2), {"keep": "attention"}, H200)
    assert longest(llama_8b(), run, {}, Limits(10 * GIB, GIB)) == 0
    assert longest(llama_8b(), run, {}, H200) >= found


@pytest.mark.parametrize(
    ("fixed", "told"),
    [
        ({"kept": 1}, "kept is no setting of memory"),
        ({"keep": "some"}, "keep must be one of"),
        ({"loss_tile": 0}, "loss_tile must be an integer of at least 1"),
        ({"keep": "all", "host_layers": 3}, "host_layers=3"),
        ({"every": 2, "keep": "all"}, "every=2"),
    ],
)
def test_wrong_settings_are_named(fixed: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        plan_run(llama_8b(8), RunShape(4096), fixed, H200)


def test_reasons_and_text() -> None:
    choice = plan_run(llama_8b(), MILLION, {"loss_tile": 2048}, H200)
    reasons = {(one.key, one.value): one.reason for one in choice.alternatives}
    assert "GiB of GPU memory" in reasons["keep", "all"]
    assert "slower" in reasons["keep", "layer"]
    assert all(key != "loss_tile" for key, _ in reasons)
    text = choice.text()
    for word in ("loss_tile=2048*", "kept by layers", "together", "tokens/s/GPU", "keep=layer", "H200"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 130

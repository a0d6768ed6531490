"""What is said where nothing fits."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ringattn.memory.planning.limits import GIB
from ringattn.memory.planning.planner import TRIED
from ringattn.memory.planning.ways import Ways

AUTO = "auto"


def refusal(ways: Ways, fixed: Mapping[str, Any]) -> str:
    """Why nothing fits, and what would."""
    least = ways.leanest(fixed)
    peak, run = least.alive.peak(), ways.asked.run
    top = sorted(peak.items.items(), key=lambda pair: -pair[1])[:3]
    told = ", ".join(f"{name} {size / GIB:.1f}" for name, size in top)
    out = list(_ways_out(ways, fixed))
    would = "; it would fit with " + ", or with ".join(out) if out else ""
    return (
        f"{run.tokens} tokens of {ways.asked.model.name} do not fit {run.ranks} GPUs: the leanest settings need "
        f"{least.lacking} (at {peak.name}: {told} GiB){would}"
    )


def _ways_out(ways: Ways, fixed: Mapping[str, Any]) -> Iterator[str]:
    """Changes that make a run fit, each by itself."""
    for key in fixed:
        if key in TRIED or key == "host_layers":
            free = {name: value for name, value in fixed.items() if name != key}
            if not ways.leanest(free).lacking:
                yield f"{key}={AUTO}"
    if chunks := _chunks_that_fit(ways, fixed):
        yield f"parallel.head_chunks={chunks}"
    for small in (
        {"moments": "int8"},
        {"weights": "bfloat16", "moments": "bfloat16"},
        {"weights": "bfloat16", "moments": "int8"},
    ):
        if (
            any(fixed.get(key, "float32") != value for key, value in small.items())
            and not ways.leanest({**fixed, **small}).lacking
        ):
            yield " ".join(f"{key}={value}" for key, value in small.items())
            break
    planner = ways.asked
    for times in (2, 4, 8, 16, 32, 64):
        run = replace(planner.run, ring=planner.run.ring * times)
        if not replace(ways, asked=replace(planner, run=run)).leanest(fixed).lacking:
            yield f"{run.ranks} GPUs"
            break
    if fewer := ways.longest(fixed):
        yield f"at most {fewer} tokens"


def _chunks_that_fit(ways: Ways, fixed: Mapping[str, Any]) -> int:
    """The fewest chunks of heads, more than were asked for, that make a run fit; 0 if none do."""
    if ways.free.chunks:
        return 0
    asked = ways.asked.run.head_chunks
    planners = replace(ways, free=replace(ways.free, chunks=True)).planners
    fitting = (
        one.run.head_chunks for one in planners if one.run.head_chunks > asked and not one.leanest(fixed).lacking
    )
    return min(fitting, default=0)

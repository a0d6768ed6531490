"""Why ranks stand still or are gone, in words, from what their records and stacks say. No I/O."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ringattn.training.health.record import NO_LAYER, Standing
from ringattn.training.health.stacks import Stack

SHOWN = 16  # ranks, of more only the first
AFTER_ALL = 1_000_000  # micro-steps and layers
_ORDER = ("starting", "joining", "data", "forward pass", "backward pass", "optimizer step", "saving", "done")


@dataclass(frozen=True)
class Verdict:
    """What is wrong with a run.

    Arguments:
        kind: of the incident: `rank-gone`, `rank-stopped`, `rank-failed`, `connection-lost`, `hang` or `launcher-gone`.
        ranks: those it is about.
        cause: in one sentence, with the ranks.
        restart: whether the same command may come further.
        facts: where all ranks are, and what else JSON can hold.
    """

    kind: str
    ranks: tuple[int, ...]
    cause: str
    restart: bool = True
    facts: dict[str, Any] = field(default_factory=dict)


def gone(one: Standing, host: str, out_of_memory: int, stack: Stack | None) -> Verdict:
    """Of a rank that ended without a word.

    Arguments:
        out_of_memory: processes that the kernel ended on this machine since the run started.
        stack: what it wrote, if it crashed.
    """
    who = f"rank {one.rank} (process {one.pid} on {host}) is gone in {one.where()}"
    if stack is not None and stack.crashed:
        return Verdict("rank-gone", (one.rank,), f"{who}: {_crash(stack)}")
    if out_of_memory:
        return Verdict(
            "rank-gone", (one.rank,),
            f"{who}: out of memory, the kernel ended {out_of_memory} process{'es' * (out_of_memory > 1)} here because "
            "the host's memory was full; fewer memory.host_layers or fewer ranks on this machine need less",
            restart=False,
        )  # fmt: skip
    if one.told:
        return Verdict("rank-gone", (one.rank,), f"{who}: it was told to stop, and killed before it had saved")
    if one.phase in ("starting", "joining") and not one.step:
        return Verdict("rank-gone", (one.rank,), f"{who}: it was ended by a signal, or crashed, before it trained")
    return Verdict("rank-gone", (one.rank,), f"{who}: it was killed (SIGKILL), by a person, a scheduler or the system")


def _crash(stack: Stack) -> str:
    if not stack.waits:
        return f"it crashed: {stack.crashed}"
    cause = f"it crashed in {stack.call} at {stack.where}: {stack.crashed}"
    if stack.crashed.startswith("Aborted"):
        cause += ", as gloo does when a peer's message has another size: a collective was skipped, or batches differ"
    return cause


def failed(one: Standing) -> Verdict:
    """Of a rank that raised."""
    return Verdict("rank-failed", (one.rank,), f"rank {one.rank} failed in step {one.step}: {one.message}")


def disconnected(ranks: Sequence[Standing], host: str) -> Verdict:
    """Of ranks that lost their connections, where no rank says why."""
    first = ranks[0]
    numbers = tuple(one.rank for one in ranks)
    verb = "lost its connection" if len(ranks) == 1 else "lost their connections"
    return Verdict(
        "connection-lost", numbers,
        f"{names(numbers)} on {host} {verb} to other ranks in step {first.step}: a link is cut, or another machine is "
        "gone",
    )  # fmt: skip


def stopped(ranks: Sequence[Standing], host: str, seconds: float) -> Verdict:
    """Of ranks that a signal holds."""
    names = ", ".join(f"rank {one.rank} (process {one.pid} on {host}, {one.where()})" for one in ranks)
    verb = "is" if len(ranks) == 1 else "are"
    cause = f"{names} {verb} stopped by a signal (SIGSTOP, or a debugger) for {seconds:.0f} s"
    return Verdict("rank-stopped", tuple(one.rank for one in ranks), cause)


def hang(standings: Mapping[int, Standing], stacks: Mapping[int, Stack], world_size: int, seconds: float) -> Verdict:
    """Why no rank goes on, although all run.

    Arguments:
        standings, stacks: by rank, as far as they are known.
        seconds: that nothing has changed for.
    """
    still = f"nothing has changed for {seconds:.0f} s"
    missing = sorted(set(range(world_size)) - set(standings))
    if missing:
        cause = (
            f"{still}: nothing is known of {names(missing)}: their machine is gone, or does not reach the run's folder"
        )
        return Verdict("hang", tuple(missing), cause)
    # Only of ranks in the same step: one that is behind has the batch before.
    newest = max(one.step for one in standings.values())
    odd = _minority({rank: (one.batch, one.plans) for rank, one in standings.items() if one.step == newest})
    if odd:
        computes = "computes" if len(odd) == 1 else "compute"
        return Verdict(
            "hang", odd, f"{still}: {names(odd)} {computes} another batch or other plans than the other ranks"
        )
    waiting = {rank for rank, stack in stacks.items() if stack.waits}
    busy = sorted(set(stacks) - waiting)
    if waiting and busy:
        at = "; ".join(f"rank {rank} is at {stacks[rank].where or '?'}" for rank in busy[:SHOWN])
        cause = f"{still}: {_wait(waiting)} for {names(busy)}: {at}, and in no collective"
        return Verdict("hang", tuple(busy), cause)
    if waiting:
        calls = {rank: (stacks[rank].call, stacks[rank].where) for rank in sorted(waiting)}
        odd = _minority(calls)
        if len(odd) * 2 >= len(calls):  # no majority: who skips one is further than the others
            most = max(progress(standings[rank]) for rank in calls)
            ahead = tuple(rank for rank in calls if progress(standings[rank]) == most)
            odd = ahead if len(ahead) < len(calls) else odd
        if odd:
            return Verdict("hang", odd, _skipped(still, odd, calls, standings))
    behind = _behind(standings)
    if behind:
        others = sorted(set(standings) - set(behind))
        where = standings[behind[0]].where()
        return Verdict("hang", behind, f"{still}: {names(behind)} fell behind, in {where}, and {_wait(others)}")
    cause = f"{still}: all ranks wait in the same place: a link between them is cut or very slow"
    return Verdict("hang", tuple(sorted(standings)), cause)


def table(standings: Mapping[int, Standing], stacks: Mapping[int, Stack], suspects: Sequence[int]) -> list[str]:
    """Where every rank is, a line each, suspects first."""
    ordered = [r for r in suspects if r in standings] + [r for r in sorted(standings) if r not in suspects]
    lines = []
    for rank in ordered[:SHOWN]:
        stack = stacks.get(rank)
        at = ""
        if stack is not None and stack.where:
            at = f"; {'waits in ' + stack.call if stack.waits else 'runs'} at {stack.where}"
        lines.append(f"rank {rank}: {standings[rank].where()}{at}")
    if len(ordered) > SHOWN:
        lines.append(f"and {len(ordered) - SHOWN} ranks more")
    return lines


def _skipped(
    still: str, odd: Sequence[int], calls: Mapping[int, tuple[str, str]], standings: Mapping[int, Standing]
) -> str:
    rest = sorted(set(calls) - set(odd))
    usual = calls[rest[0]]
    return (
        f"{still}: ranks wait in different collectives, so one was skipped or called twice: {names(odd)} in "
        f"{calls[odd[0]][0]} at {calls[odd[0]][1]} ({standings[odd[0]].where()}), {names(rest)} in {usual[0]} at "
        f"{usual[1]} ({standings[rest[0]].where()})"
    )


def progress(one: Standing) -> tuple[int, int, int, int, int]:
    """How far a rank is; of two, the larger is ahead. Layers run backwards in the backward pass."""
    layer = one.layer if one.phase != "backward pass" or one.layer == NO_LAYER else AFTER_ALL - one.layer
    phase = _ORDER.index(one.phase) if one.phase in _ORDER else 0
    micro_step = one.micro_step if one.phase in ("forward pass", "backward pass") else AFTER_ALL * (phase > 4)
    return one.step, micro_step, phase, layer, one.transfers


def _behind(standings: Mapping[int, Standing]) -> tuple[int, ...]:
    """Ranks that are less far than others, if not all are alike."""
    least = min(progress(one) for one in standings.values())
    found = tuple(rank for rank, one in sorted(standings.items()) if progress(one) == least)
    return found if len(found) < len(standings) else ()


def _minority(values: Mapping[int, Any]) -> tuple[int, ...]:
    """Ranks whose value is not that of most; of two equal halves the later ranks."""
    counts = Counter(values.values())
    if len(counts) < 2:
        return ()
    (first, _), *_ = counts.most_common(1)
    return tuple(sorted(rank for rank, value in values.items() if value != first))


def _wait(ranks: Any) -> str:
    return f"{names(ranks)} {'waits' if len(ranks) == 1 else 'wait'}"


def names(ranks: Any) -> str:
    ordered = sorted(ranks)
    shown = ", ".join(map(str, ordered[:SHOWN])) + (", ..." if len(ordered) > SHOWN else "")
    return f"rank {shown}" if len(ordered) == 1 else f"ranks {shown}"

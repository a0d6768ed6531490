"""What records and stacks say in words: the right ranks, and the likely cause."""

from dataclasses import replace
from typing import Any

from ringattn.training.health import causes
from ringattn.training.health.record import NO_LAYER, Standing
from ringattn.training.health.stacks import Stack, read_stacks

BEGIN = Standing(
    0, 4, 0, 100, 1, 0.0, 7, 1, "forward pass", 3, 0, "", True, False, 1, 11, 22, 0.5, 0.0, ""
)  # fmt: skip
WAITS = Stack(True, "all_reduce", "ringattn/training/loss.py:17 brought")


def standings(**by_rank: dict[str, Any]) -> dict[int, Standing]:
    """Four ranks alike, but for what is given of some, as in r2={"layer": 1}."""
    return {rank: replace(BEGIN, rank=rank, pid=100 + rank, **by_rank.get(f"r{rank}", {})) for rank in range(4)}


def stacks(**by_rank: Stack) -> dict[int, Stack]:
    return {rank: by_rank.get(f"r{rank}", WAITS) for rank in range(4)}


def test_a_rank_in_no_collective_is_what_the_others_wait_for() -> None:
    runs = Stack(False, "", "mine.py:3 compute")
    found = causes.hang(standings(), stacks(r2=runs), 4, 60)
    assert found.ranks == (2,)
    assert found.cause == (
        "nothing has changed for 60 s: ranks 0, 1, 3 wait for rank 2: rank 2 is at mine.py:3 compute, and in no "
        "collective"
    )


def test_ranks_in_different_collectives_skipped_one() -> None:
    other = Stack(True, "barrier", "ringattn/training/checkpoint.py:70 save_checkpoint")
    found = causes.hang(standings(), stacks(r3=other), 4, 60)
    assert found.ranks == (3,)
    assert "skipped or called twice: rank 3 in barrier" in found.cause
    assert "ranks 0, 1, 2 in all_reduce" in found.cause
    # Of two halves the one that is further left one out.
    further: dict[str, Any] = {"step": 8}
    found = causes.hang(standings(r0=further, r1=further), stacks(r0=other, r1=other), 4, 60)
    assert found.ranks == (0, 1)


def test_the_rank_that_is_least_far_is_behind() -> None:
    assert causes.hang(standings(r1={"layer": 2}), {}, 4, 60).ranks == (1,)
    further: dict[str, Any] = {f"r{rank}": {"transfers": 3} for rank in range(3)}
    assert causes.hang(standings(**further), {}, 4, 60).ranks == (3,)
    backward = {"phase": "backward pass"}
    everywhere = {f"r{rank}": backward | {"layer": 2 if rank != 1 else 3} for rank in range(4)}
    assert causes.hang(standings(**everywhere), {}, 4, 60).ranks == (1,)
    found = causes.hang(standings(r0={"phase": "data", "layer": NO_LAYER, "micro_step": 0}), stacks(), 4, 60)
    assert found.ranks == (0,)
    assert "rank 0 fell behind, in step 7, data, and ranks 1, 2, 3 wait" in found.cause


def test_other_batches_and_plans_are_told_apart_from_slow_links() -> None:
    found = causes.hang(standings(r2={"batch": 12}), stacks(), 4, 60)
    assert found.ranks == (2,)
    assert "rank 2 computes another batch or other plans" in found.cause
    # A rank that is a step behind has the batch before, and that is not why.
    found = causes.hang(standings(r2={"batch": 12, "step": 6}), stacks(), 4, 60)
    assert "fell behind" in found.cause
    found = causes.hang(standings(), stacks(), 4, 60)
    assert found.ranks == (0, 1, 2, 3)
    assert "cut or very slow" in found.cause


def test_ranks_of_which_nothing_is_known_are_on_a_machine_that_is_gone() -> None:
    known = {rank: one for rank, one in standings().items() if rank < 2}
    found = causes.hang(known, {}, 4, 60)
    assert found.ranks == (2, 3)
    assert "nothing is known of ranks 2, 3" in found.cause


def test_why_a_rank_is_gone() -> None:
    one = standings()[2]
    assert "killed (SIGKILL)" in causes.gone(one, "host", 0, None).cause
    memory = causes.gone(one, "host", 1, None)
    assert "out of memory" in memory.cause
    assert not memory.restart
    crashed = causes.gone(one, "host", 0, Stack(False, "", "", "Segmentation fault"))
    assert "it crashed: Segmentation fault" in crashed.cause
    skipped = causes.gone(one, "host", 0, replace(WAITS, crashed="Aborted"))
    assert "it crashed in all_reduce at ringattn/training/loss.py:17 brought: Aborted, as gloo does" in skipped.cause
    assert "a collective was skipped" in skipped.cause
    assert "killed before it had saved" in causes.gone(replace(one, told=True), "host", 0, None).cause
    assert "before it trained" in causes.gone(replace(one, step=0, phase="joining"), "host", 0, None).cause


def test_lost_connections_without_a_reason_are_a_link_or_a_machine() -> None:
    found = causes.disconnected([one for one in standings().values() if one.rank < 2], "host")
    assert found.ranks == (0, 1)
    assert found.cause == (
        "ranks 0, 1 on host lost their connections to other ranks in step 7: a link is cut, or another machine is gone"
    )
    assert found.restart


def test_a_table_is_short_and_has_suspects_first() -> None:
    many = {rank: replace(BEGIN, rank=rank) for rank in range(100)}
    lines = causes.table(many, {99: WAITS}, [99])
    assert len(lines) == causes.SHOWN + 1
    assert lines[0].startswith("rank 99: step 7, micro-step 1, forward pass, layer 3; waits in all_reduce at ")
    assert lines[-1] == "and 84 ranks more"


DUMP = """Thread 0x00007f01 (most recent call first):
  File "/lib/python3.11/threading.py", line 324 in wait
  File "/x/ringattn/training/packs/batches.py", line 90 in _fill

Current thread 0x00007f00 (most recent call first):
  File "/v/site-packages/torch/distributed/distributed_c10d.py", line 3252 in all_reduce
  File "/v/site-packages/torch/distributed/c10d_logger.py", line 83 in wrapper
  File "/x/ringattn/training/loss.py", line 17 in brought
  File "/x/ringattn/training/loop.py", line 190 in _train_step
"""


def test_stacks_say_who_waits_and_where() -> None:
    found = read_stacks(DUMP)
    assert found == Stack(True, "all_reduce", "ringattn/training/loss.py:17 brought")
    runs = DUMP.replace("torch/distributed/distributed_c10d.py", "torch/nn/functional.py").replace(
        "torch/distributed/c10d_logger.py", "torch/nn/modules/module.py"
    )
    assert read_stacks(runs) == Stack(False, "", "ringattn/training/loss.py:17 brought")
    assert read_stacks("Fatal Python error: Segmentation fault\n\n" + DUMP).crashed == "Segmentation fault"
    assert read_stacks("").where == ""

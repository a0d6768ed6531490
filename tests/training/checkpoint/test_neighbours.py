"""What a machine holds for the one before it: sent after each copy, and brought to whoever lacks it at a start."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from ringattn.training.checkpoint import Place, SaveFailed
from ringattn.training.checkpoint import neighbours as neighbours_module
from ringattn.training.checkpoint.memory_copies import make_rank_folder
from ringattn.training.checkpoint.neighbours import (
    Holding,
    bring_home,
    journeys,
    remove_guests,
    share_with_neighbour,
)
from ringattn.training.checkpoint.snapshot import snapshot_of
from ringattn.training.checkpoint.together import Together
from ringattn.training.checkpoint.writing import write_checkpoint
from ringattn.training.resuming.restoring import choose
from tests.pool import Pools
from tests.training.checkpoint.test_restoring import flip, state, tree

RANKS, A_MACHINE = 4, 2


def place(output: Path, machine: int | None = None) -> Place:
    """Of this rank, in a folder for each of two machines."""
    rank = dist.get_rank()
    machine = rank // A_MACHINE if machine is None else machine
    own = make_rank_folder(output / f"machine{machine}", rank)
    return Place(own, 1, shared=False, kind="copy in memory", run="r", neighbour=A_MACHINE)


def copied(output: Path, steps: list[int]) -> None:
    together = Together()
    neighbours_module.CHUNK = 1000  # several messages a file
    for step in steps:
        write_checkpoint(place(output), state(step), snapshot_of(tree(step)), together)
        share_with_neighbour(place(output), step, together)
    together.close()


def found(output: Path, machine: int | None = None) -> tuple[int, int] | None:
    """The step that is taken, and whose state this rank read."""
    together = Together()
    try:
        memory = place(output, machine)
        bring_home(memory, together)
        chosen = choose(output, Place(output / "checkpoints", 1), memory, together)
        if chosen is None:
            return None
        opened = chosen.opened(dist.get_rank())
        assert torch.equal(opened.own("x"), tree(chosen.state.step)["x"])
        return chosen.state.step, opened.own("rank")
    finally:
        together.close()


def test_a_machine_keeps_the_newest_of_the_one_before(pool: Pools, tmp_path: Path) -> None:
    pool(RANKS).run(copied, tmp_path, [3, 6])
    for machine, guests in ((0, (2, 3)), (1, (0, 1))):
        kept = sorted((tmp_path / f"machine{machine}" / "guests").glob("*/*"))
        assert [path.parent.name for path in kept] == [f"rank-{rank:05d}" for rank in guests]
        assert [path.name for path in kept] == ["step-00000006"] * 2


@pytest.mark.parametrize("lost", [0, 1])
def test_a_machine_that_is_lost_is_no_loss(pool: Pools, tmp_path: Path, lost: int) -> None:
    pool(RANKS).run(copied, tmp_path, [3, 6])
    shutil.rmtree(tmp_path / f"machine{lost}")
    assert pool(RANKS).run(found, tmp_path) == [(6, rank) for rank in range(RANKS)]
    assert pool(RANKS).run(found, tmp_path) == [(6, rank) for rank in range(RANKS)], "nothing has to travel twice"


def changed_places(output: Path) -> tuple[int, int] | None:
    return found(output, machine=1 - dist.get_rank() // A_MACHINE)


def test_ranks_may_change_machines(pool: Pools, tmp_path: Path) -> None:
    pool(RANKS).run(copied, tmp_path, [6])
    for machine in range(2):
        shutil.rmtree(tmp_path / f"machine{machine}" / "guests")
    assert pool(RANKS).run(changed_places, tmp_path) == [(6, rank) for rank in range(RANKS)]


def test_what_is_lost_on_both_is_lost(pool: Pools, tmp_path: Path) -> None:
    pool(RANKS).run(copied, tmp_path, [6])
    shutil.rmtree(tmp_path / "machine1")
    shutil.rmtree(tmp_path / "machine0" / "guests")
    assert pool(RANKS).run(found, tmp_path) == [None] * RANKS


def test_a_damaged_guest_is_named_and_not_taken(pool: Pools, tmp_path: Path) -> None:
    pool(RANKS).run(copied, tmp_path, [6])
    shutil.rmtree(tmp_path / "machine1")
    flip(tmp_path / "machine0" / "guests" / "rank-00003" / "step-00000006" / "rank-00003.safetensors")
    assert pool(RANKS).run(found, tmp_path) == [None] * RANKS
    (incident,) = (tmp_path / "incidents").glob("*bad-checkpoint*")
    assert "rank-00003.safetensors is damaged" in incident.read_text()


def without_room(output: Path) -> str:
    """The guests' folder of one machine cannot be made."""
    together = Together()
    write_checkpoint(place(output), state(3), snapshot_of(tree(3)), together)
    if dist.get_rank() == 2:
        (output / "machine1" / "guests").write_text("in the way")
    try:
        share_with_neighbour(place(output), 3, together)
    except SaveFailed as error:
        return str(error)
    finally:
        together.close()
    return ""


def test_a_machine_without_room_fails_on_every_rank(pool: Pools, tmp_path: Path) -> None:
    told = pool(RANKS).run(without_room, tmp_path)
    assert len(set(told)) == 1
    assert told[0].startswith("rank 2: ")
    assert sorted((tmp_path / "machine0").glob("rank-*/step-*")), "its own copies stay"


def short_read(output: Path) -> str:
    """A file of one rank becomes shorter while it travels."""
    together = Together()
    write_checkpoint(place(output), state(3), snapshot_of(tree(3)), together)
    right = neighbours_module._files
    if dist.get_rank() == 1:
        neighbours_module._files = lambda folder: [(name, size + 5) for name, size in right(folder)]
    try:
        share_with_neighbour(place(output), 3, together)
    except SaveFailed as error:
        return str(error)
    finally:
        neighbours_module._files = right
        together.close()
    return ""


def test_a_file_that_cannot_be_read_keeps_nobody_waiting(pool: Pools, tmp_path: Path) -> None:
    told = pool(RANKS).run(short_read, tmp_path)
    assert len(set(told)) == 1
    assert "rank 1: " in told[0]
    assert "has become shorter" in told[0]
    assert not [*tmp_path.glob("machine*/guests/*/*")], "half a copy, or one of a failed exchange"


def test_guests_go(tmp_path: Path) -> None:
    for step in (3, 6):
        (tmp_path / "guests" / "rank-00000" / f"step-{step:08d}").mkdir(parents=True)
    remove_guests(tmp_path, 6)
    assert [path.name for path in tmp_path.glob("guests/*/*")] == ["step-00000006"]
    remove_guests(tmp_path)
    assert not (tmp_path / "guests").exists()
    remove_guests(tmp_path)


@given(st.data())
def test_only_what_is_whole_travels_and_to_those_that_lack_it(data: st.DataObject) -> None:
    """Against a plain statement of what should be."""
    count = data.draw(st.integers(1, 4))
    keys = [(owner, step) for owner in range(count) for step in range(3)]
    machines = [data.draw(st.sets(st.sampled_from(keys))) for _ in range(count)]
    homes = [{step for owner, step in keys if owner == rank and (owner, step) in machines[rank] and data.draw(st.booleans())} for rank in range(count)]  # fmt: skip  # noqa: E501
    holdings = [
        Holding(home, {key: Path(f"{rank}/{key[0]}/step-{key[1]}") for key in machine})
        for rank, (home, machine) in enumerate(zip(homes, machines, strict=True))
    ]
    found = journeys(holdings)
    whole = [step for step in range(3) if all(any((owner, step) in one for one in machines) for owner in range(count))]
    at_home = [step for step in range(3) if all(step in home for home in homes)]
    if not whole or max(whole) in at_home:
        assert found == []
        return
    assert sorted(one.owner for one in found) == [rank for rank in range(count) if max(whole) not in homes[rank]]
    for one in found:
        assert (one.owner, max(whole)) in machines[one.source]
        assert one.folder == holdings[one.source].machine[one.owner, max(whole)]
        assert one.source == one.owner or (one.owner, max(whole)) not in machines[one.owner]

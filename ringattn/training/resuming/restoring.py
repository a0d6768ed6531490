"""Which checkpoint a run goes on from: the newest that every rank finds good, on disk or in memory.

`job.py` looks at markers and sizes, on each rank alone. Here, where ranks can talk, checksums are verified, and every
rank takes the same one.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ringattn.training.checkpoint.folders import Found, found_in, none_good, remove_partial, set_aside
from ringattn.training.checkpoint.marker import BadCheckpoint, OldCheckpoint, TrainState
from ringattn.training.checkpoint.memory_copies import held_parts, saved_copies
from ringattn.training.checkpoint.saved_state import SavedState
from ringattn.training.checkpoint.tensors import check_sum
from ringattn.training.checkpoint.together import Together
from ringattn.training.checkpoint.writing import Place
from ringattn.training.health.incidents import record_incident


@dataclass(frozen=True)
class Chosen:
    """A checkpoint whose files hold what was written.

    Arguments:
        folders: of the checkpoint, on this rank: one, or of a copy that another number of ranks wrote one for each.
        place: where it was found.
    """

    folders: tuple[Path, ...]
    state: TrainState
    place: Place

    @property
    def folder(self) -> Path:
        """The first, to be named."""
        return self.folders[0]

    def opened(self, rank: int) -> SavedState:
        """Its tensors, for a rank."""
        if self.place.shared:
            return SavedState.of(self.folder, rank)
        return saved_copies(self.place.root.parent, self.state.step, rank, self.state.world_size)


def choose(
    output: Path, disk: Place, memory: Place | None, together: Together, before: int | None = None
) -> Chosen | None:
    """The newest good checkpoint, the same on every rank; None if there is none at all. Collective.

    Every byte of a candidate is read once, by the ranks together, about 2 GB/s each. What was found bad on the way is
    named, recorded as an incident `bad-checkpoint` and renamed aside, once a good one is found; it is never deleted.

    Arguments:
        before: the latest step that may be taken; later checkpoints are renamed aside, too, since the run will come by
            them again. None for any.

    Raises BadCheckpoint on every rank if there are checkpoints on disk and none is good, and RuntimeError if ranks see
    different ones.
    """
    found = _seen_by_all(disk.root, together)
    copies = _copies(memory, together)
    bad: list[Found] = []
    candidates = [(disk, (one,)) for one in found] + [(memory, parts) for parts in copies]
    # Of the same step, the copy in memory comes first.
    for place, parts in sorted(candidates, key=lambda each: (-each[1][0].step, each[0] is disk)):
        one, step = parts[0], parts[0].step
        assert place is not None
        if before is not None and step > before:
            bad.append(Found(one.folder, step, None, f"{one.folder} is of a step after {before}, which is taken back"))
            continue
        if one.old:
            raise OldCheckpoint(one.reason)
        reason = one.reason or _verified(parts, place, together)
        if reason:
            bad.append(Found(one.folder, step, None, reason))
            continue
        _put_aside(output, bad, disk, together)
        if together.rank == 0:
            remove_partial(disk.root)
        assert one.marker is not None
        return Chosen(tuple(part.folder for part in parts), one.marker.state, place)
    if found:
        raise none_good(disk.root, [one.reason for one in bad if one.folder.parent == disk.root])
    _put_aside(output, bad, disk, together)
    return None


def _seen_by_all(root: Path, together: Together) -> list[Found]:
    """What rank 0 finds on disk. Raises RuntimeError on every rank if another one finds something else."""
    found = list(found_in(root)) if together.rank == 0 else []
    whole = next((one.step for one in found or found_in(root) if one.marker is not None), -1)
    told = together.gather((whole, found))
    newest = [step for step, _ in told]
    if len(set(newest)) > 1:
        raise RuntimeError(
            f"run.output={root.parent} must be on a file system that all machines share; "
            f"newest checkpoint by rank: {newest}"
        )
    return told[0][1]


def _copies(memory: Place | None, together: Together) -> list[tuple[Found, ...]]:
    """Copies in memory of this run that every rank can go on from, newest first: of each the parts that this one is to
    verify."""
    if memory is None:
        return []
    held = held_parts(memory.root.parent, memory.runs)
    mine = {which: parts for which in held if (parts := _usable(which[1], held[which], memory, together))}
    everywhere = set.intersection(*map(set, together.gather(sorted(mine))))
    return [mine[which] for which in sorted(everywhere, reverse=True)]


def _usable(count: int, parts: Mapping[int, Found], memory: Place, together: Together) -> tuple[Found, ...]:
    """The parts of a copy from which a rank goes on, () if it cannot.

    Of as many ranks that is its own part. Of another number it is all of them, as its rows may be in any: its machine
    must hold them all. DeepSpeed's are read by as many ranks alone.
    """
    if count == together.count:
        own = parts.get(together.rank)
        return (own,) if own is not None and own.folder.parent == memory.root else ()
    engines = {one.marker.state.engine for one in parts.values() if one.marker is not None}
    if "deepspeed" in engines or any(rank not in parts for rank in range(count)):
        return ()
    return tuple(parts[rank] for rank in range(count))


def _verified(parts: Sequence[Found], place: Place, together: Together) -> str:
    """Why the files of a checkpoint do not hold what was written, or "". Of one on disk, ranks share the files."""
    files = [(one.folder / name, one.marker.files[name]) for one in parts if one.marker for name in one.marker.files]
    files.sort(key=lambda each: each[0])
    reason = ""
    try:
        for path, expected in files[together.rank :: together.count] if place.shared else files:
            check_sum(path, expected)
    except BadCheckpoint as error:
        reason = str(error)
    return next((why for why in together.gather(reason) if why), "")


def _put_aside(output: Path, bad: list[Found], disk: Place, together: Together) -> None:
    """Names what was found bad, and renames it: of what is on disk rank 0, of copies each rank its own."""
    for one in bad:
        shared = one.folder.parent == disk.root
        aside = set_aside(one.folder) if together.rank == 0 or not shared else None
        if together.rank == 0:
            renamed = f"; it is now {aside.name}" if aside else ""
            record_incident(output, "bad-checkpoint", one.reason + renamed, folder=str(one.folder), step=one.step)
            print(f"warning: not taken: {one.reason}{renamed}", file=sys.stderr, flush=True)

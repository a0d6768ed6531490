"""Copies of the newest state on the next machine too: a machine that is lost does not take its ranks' states along.

A rank sends what it has just copied to the rank of the same number on the next machine, which keeps it as a guest, in
`FOLDER/ringattn-UID-NAME-DIGEST/guests/rank-00000/`. At a start every rank looks what its machine holds: its own
copies, those of ranks beside it, and guests. A state that all machines hold together is brought to the ranks that lack
it, so that ranks may change machines, too.
"""

import shutil
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ringattn.training.checkpoint.folders import begin, complete, is_whole, partial_of
from ringattn.training.checkpoint.marker import MARKER, read_marker
from ringattn.training.checkpoint.memory_copies import GUESTS, held_parts, rank_folder
from ringattn.training.checkpoint.together import SaveFailed, Together
from ringattn.training.checkpoint.writing import Place

CHUNK = 1 << 26  # bytes of one message
Files = list[tuple[str, int]]  # names and bytes


class Holding(NamedTuple):
    """What a rank finds on its machine.

    Arguments:
        home: steps of its own copies.
        machine: folders of all copies, by owner and step.
    """

    home: set[int]
    machine: dict[tuple[int, int], Path]


class Journey(NamedTuple):
    """A copy that has to travel: from a folder of a rank's machine to the rank that owns it, which may be the same."""

    source: int
    owner: int
    folder: Path


class Parcel(NamedTuple):
    """Files that go to a rank, or come from it, and their folder here."""

    peer: int
    folder: Path
    files: Files


class Chunk(NamedTuple):
    """A part of a file: what one message holds."""

    name: str
    start: int
    size: int


def share_with_neighbour(place: Place, step: int, together: Together) -> None:
    """Gives the copy of a step to the next machine and takes that of the one before. Collective.

    Arguments:
        place: of copies; its `neighbour` is how many ranks further the next machine's is.

    Raises SaveFailed on every rank if one could not be read or kept.
    """
    ahead = (together.rank + place.neighbour) % together.count
    owner = (together.rank - place.neighbour) % together.count
    source = place.folder(step)
    target = rank_folder(place.root.parent / GUESTS, owner) / source.name
    if all(together(lambda: is_whole(target))):
        return
    files = together(lambda: _files(source))
    _carry(together, Parcel(ahead, source, files[together.rank]), Parcel(owner, target, files[owner]))
    for older in target.parent.iterdir():
        if older != target:
            shutil.rmtree(older, ignore_errors=True)


def bring_home(place: Place, together: Together) -> None:
    """Brings the newest state that the machines hold together to its ranks, if it is newer than what each has of its
    own. Collective. Whether files hold what was written is found later, when their checksums are compared.

    Raises SaveFailed on every rank if one could not be read or kept.
    """
    for journey in journeys(together.gather(_holding(place, together))):
        _travel(journey, place, together)


def _travel(journey: Journey, place: Place, together: Together) -> None:
    source, owner, folder = journey
    target = place.folder(int(folder.name.removeprefix("step-")))
    if source == owner:
        together(lambda: _copy(folder, target) if together.rank == owner else None)
        return
    files = together(lambda: _files(folder) if together.rank == source else [])[source]
    out = Parcel(owner, folder, files) if together.rank == source else None
    _carry(together, out, Parcel(source, target, files) if together.rank == owner else None)


def journeys(holdings: Sequence[Holding]) -> list[Journey]:
    """Which copies have to travel, by what every rank finds: those of the newest step that is there of all ranks."""
    there: dict[tuple[int, int], list[int]] = {}
    for rank, one in enumerate(holdings):
        for copy in one.machine:
            there.setdefault(copy, []).append(rank)
    ranks = range(len(holdings))
    newest = max((step for _, step in there if all((rank, step) in there for rank in ranks)), default=-1)
    if newest <= max(set.intersection(*(one.home for one in holdings)), default=-1):
        return []
    found = []
    for owner in ranks:
        if newest not in holdings[owner].home:
            holders = there[owner, newest]
            source = owner if owner in holders else holders[0]
            found.append(Journey(source, owner, holdings[source].machine[owner, newest]))
    return found


def remove_guests(copies: Path, step: int | None = None) -> None:
    """Deletes what a machine keeps for others; of all steps but one, or all of it. Any rank may, also several."""
    for folder in (copies / GUESTS).glob("rank-*/step-*"):
        if step is None or folder.name != f"step-{step:08d}":
            shutil.rmtree(folder, ignore_errors=True)
    if step is None:
        shutil.rmtree(copies / GUESTS, ignore_errors=True)


def _holding(place: Place, together: Together) -> Holding:
    held = held_parts(place.root.parent, place.runs)
    machine = {
        (owner, step): one.folder
        for (step, count), parts in held.items()
        if count == together.count
        for owner, one in parts.items()
    }
    home = {step for (owner, step), folder in machine.items() if folder.parent == place.root and owner == together.rank}
    return Holding(home, machine)


def _files(folder: Path) -> Files:
    """The marker comes last."""
    names = [*sorted(read_marker(folder).files), MARKER]
    return [(name, (folder / name).stat().st_size) for name in names]


def _copy(source: Path, target: Path) -> None:
    files = _files(source)
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    begin(target, sum(size for _, size in files))
    for name, _ in files:
        shutil.copyfile(source / name, partial_of(target) / name)
    complete(target, read_marker(partial_of(target)))


def _carry(together: Together, out: Parcel | None, into: Parcel | None) -> None:
    """Sends the files of a folder to a rank, and makes a folder of what comes from one. Collective.

    A disk that fails does not keep other ranks waiting: it is told when everything has travelled.
    """
    together(lambda: _begin(into) if into else None)
    failed: list[OSError] = []
    for sent, taken in zip_longest(_chunks(out), _chunks(into)):
        works, arrived = [], None
        if out and sent:
            leaving = _read(out.folder, sent, failed)
            works.append(together.send(leaving, out.peer))
        if into and taken:
            arrived = torch.empty(taken.size, dtype=torch.uint8)
            works.append(together.take(arrived, into.peer))
        for work in works:
            work.wait()
        if into and taken and arrived is not None:
            _write(partial_of(into.folder), taken, arrived, failed)
    try:
        together(lambda: _raise(failed))
        together(lambda: complete(into.folder, read_marker(partial_of(into.folder))) if into else None)
    except SaveFailed:
        if into:
            shutil.rmtree(partial_of(into.folder), ignore_errors=True)
        raise


def _begin(into: Parcel) -> None:
    into.folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    begin(into.folder, sum(size for _, size in into.files))


def _chunks(parcel: Parcel | None) -> Iterator[Chunk]:
    for name, size in parcel.files if parcel else ():
        for start in range(0, size, CHUNK):
            yield Chunk(name, start, min(CHUNK, size - start))


def _read(folder: Path, chunk: Chunk, failed: list[OSError]) -> Tensor:
    found = torch.zeros(chunk.size, dtype=torch.uint8)
    try:
        with open(folder / chunk.name, "rb", buffering=0) as file:
            file.seek(chunk.start)
            view, done = memoryview(found.numpy().data), 0
            while done < chunk.size and (count := file.readinto(view[done:])):
                done += count
        if done < chunk.size:
            failed.append(OSError(None, f"{folder / chunk.name} has become shorter", None))
    except OSError as error:
        failed.append(error)
    return found


def _write(folder: Path, chunk: Chunk, arrived: Tensor, failed: list[OSError]) -> None:
    if failed:
        return
    try:
        with open(folder / chunk.name, "ab", buffering=0) as file:
            view, done = memoryview(arrived.numpy().data), 0
            while done < chunk.size:
                done += file.write(view[done:]) or 0
    except OSError as error:
        failed.append(error)


def _raise(failed: list[OSError]) -> None:
    if failed:
        raise failed[0]

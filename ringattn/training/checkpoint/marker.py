"""What completes a checkpoint: a JSON file with the small part of its state, and size and checksum of every file."""

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

MARKER = "complete.json"
FORMAT = 2
"""Of the files of a checkpoint: 2 holds safetensors and JSON alone. Before, markers had no such number."""

# What earlier versions wrote, in pickles: torch.distributed.checkpoint, DeepSpeed, and random states.
_OF_PICKLES = (".metadata", ".distcp", ".pt", ".pth", ".pkl", ".pickle", ".bin")


class BadCheckpoint(ValueError):
    """A checkpoint that is not to be trusted; the message names folder, file and reason."""


class OldCheckpoint(BadCheckpoint):
    """A checkpoint of a version that wrote pickles, which run code when they are read."""


@dataclass(frozen=True)
class TrainState:
    """The small part of a checkpoint, held in its marker.

    Arguments:
        step: optimiser steps done; the schedule needs nothing else.
        tokens: tokens seen.
        position: of the data stream, as its `state_dict`.
        corpus: fingerprint of the corpus.
        engine, world_size: that wrote it.
    """

    step: int
    tokens: int
    position: dict[str, Any]
    corpus: str
    engine: str
    world_size: int


@dataclass(frozen=True)
class FileSum:
    """Size in bytes and CRC-32 of a file."""

    size: int
    crc32: int


@dataclass(frozen=True)
class Marker:
    """A marker that can be believed.

    Arguments:
        state: the small part of the checkpoint.
        files: every other file of the folder by its name.
        run: the run that wrote it, where that matters; see `memory_copies.py`.
    """

    state: TrainState
    files: dict[str, FileSum]
    run: str = ""


def write_marker(folder: Path, marker: Marker) -> None:
    """Writes the marker into a folder whose other files are written, in the place of another if there is one. It
    reaches the disk before this returns."""
    body = asdict(marker.state) | {"format": FORMAT, "run": marker.run}
    body["files"] = {name: [one.size, one.crc32] for name, one in sorted(marker.files.items())}
    partial = folder / f"{MARKER}.{os.getpid()}.partial"
    with open(partial, "w") as file:
        json.dump(body | {"checksum": _checksum(body)}, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / MARKER)


def read_marker(folder: Path) -> Marker:
    """The marker of a checkpoint, whose files are there with their sizes; what is in them is not read.

    Raises BadCheckpoint, and OldCheckpoint for one of a version that wrote pickles.
    """
    path = folder / MARKER
    try:
        body = json.loads(path.read_text())
    except FileNotFoundError:
        _refuse_pickles(folder, ())
        raise BadCheckpoint(f"{folder}: {MARKER} is not there") from None
    except OSError as error:
        raise BadCheckpoint(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # of UTF-8 and JSON
        raise BadCheckpoint(f"{path} is damaged: {error}") from None
    if not isinstance(body, dict):
        raise BadCheckpoint(f"{path} is damaged: it holds no object")
    if "format" not in body and "step" in body:
        raise _old(folder)
    marker = _believed(path, body)
    _check_files(folder, marker.files)
    return marker


def _believed(path: Path, body: dict[str, Any]) -> Marker:
    """A marker whose checksum and values are right."""
    stated, number = body.pop("checksum", None), body.pop("format", None)
    if isinstance(number, int) and number > FORMAT:
        raise BadCheckpoint(f"{path} has format {number}, of a newer version; this one reads {FORMAT}")
    if number != FORMAT or stated != _checksum(body | {"format": number}):
        raise BadCheckpoint(f"{path} is damaged: it does not have the checksum that it states")
    try:
        files = {name: FileSum(int(size), int(crc32)) for name, (size, crc32) in body.pop("files").items()}
        run = str(body.pop("run"))
        state = TrainState(**body)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise BadCheckpoint(f"{path} is damaged: {error}") from None
    wrong = [one.name for one in fields(state) if type(getattr(state, one.name)) is not _TYPES[one.name]]
    if wrong:
        raise BadCheckpoint(f"{path} is damaged: {', '.join(wrong)} have other types than they should")
    if outside := [name for name in files if Path(name).name != name]:
        raise BadCheckpoint(f"{path} names files outside of its folder: {', '.join(outside)}")
    return Marker(state, files, run)


_TYPES = {"step": int, "tokens": int, "position": dict, "corpus": str, "engine": str, "world_size": int}


def _check_files(folder: Path, files: Mapping[str, FileSum]) -> None:
    for name, expected in files.items():
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            raise BadCheckpoint(f"{folder / name} cannot be read: {error.strerror}") from None
        if size != expected.size:
            raise BadCheckpoint(f"{folder / name} has {size:,} bytes, {expected.size:,} were written")
    _refuse_pickles(folder, files)


def _refuse_pickles(folder: Path, own: Mapping[str, FileSum] | tuple[()]) -> None:
    """Files of the kinds that earlier versions read are nobody's here."""
    try:
        foreign = sorted(path.name for path in folder.iterdir() if path.name.endswith(_OF_PICKLES))
    except OSError as error:
        raise BadCheckpoint(f"{folder} cannot be read: {error.strerror}") from None
    if foreign := [name for name in foreign if name not in own]:
        raise BadCheckpoint(
            f"{folder / foreign[0]} is not of this checkpoint: it is named like a pickle, which runs code when it is "
            "read; it was not read"
        )


def _old(folder: Path) -> OldCheckpoint:
    return OldCheckpoint(
        f"{folder} was written by a version of ringattn whose checkpoints were pickles (format 1, before version 0.1.0 "
        "was released). Reading one runs whatever code is in it, so this version does not; finish the run with the "
        "version that began it, or choose another run.output"
    )


def _checksum(body: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())

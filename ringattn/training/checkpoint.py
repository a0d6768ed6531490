"""Checkpoints that are complete or absent: written aside, marked when every rank is done, then renamed."""

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

MARKER = "complete.json"
PARTIAL = ".partial"
_NAME = re.compile(r"step-(\d{8})")


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


def complete_checkpoints(root: Path) -> list[Path]:
    """Folders of complete checkpoints, oldest first; what a killed process left behind is not among them."""
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if _NAME.fullmatch(path.name) and (path / MARKER).is_file()]
    return sorted(found)


def newest_checkpoint(root: Path) -> tuple[Path, TrainState] | None:
    """The newest complete checkpoint and its state. Raises ValueError if its marker cannot be read."""
    found = complete_checkpoints(root)
    if not found:
        return None
    marker = found[-1] / MARKER
    try:
        return found[-1], TrainState(**json.loads(marker.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{marker} cannot be read: {error}; remove {found[-1].name} to go on from the checkpoint before it"
        ) from None


def save_checkpoint(
    root: Path, state: TrainState, write: Callable[[Path], None], keep: int, random_states: bool = True
) -> Path:
    """Saves as `root/step-00000010`. Collective; `root` must be seen by all ranks.

    Every rank calls `write(folder)` on a `.partial` folder and adds its random states; when all of them are done rank 0
    writes the marker and renames the folder, then deletes all but the newest `keep`. A process killed at any point
    leaves the checkpoints before it untouched, and at most a `.partial` folder that the next save removes.
    """
    final = root / f"step-{state.step:08d}"
    partial = final.with_name(final.name + PARTIAL)
    # Decided before the barrier: afterwards rank 0 may already have renamed.
    exists = (final / MARKER).is_file()
    dist.barrier()
    if exists:
        return final
    if dist.get_rank() == 0:
        for left in root.glob(f"step-*{PARTIAL}"):
            shutil.rmtree(left)
        partial.mkdir(parents=True)
    dist.barrier()
    write(partial)
    if random_states:
        torch.save(_random_states(), partial / f"random-{dist.get_rank():05d}.pt")
    dist.barrier()
    if dist.get_rank() == 0:
        _commit(partial, final, state)
        for old in complete_checkpoints(root)[:-keep]:
            _discard(old)
    dist.barrier()
    return final


def load_random_states(folder: Path) -> bool:
    """Restores this rank's random generators; False if the checkpoint was written by fewer ranks."""
    path = folder / f"random-{dist.get_rank():05d}.pt"
    if not path.is_file():
        return False
    states: dict[str, Any] = torch.load(path, weights_only=False)
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])  # noqa: NPY002  libraries use the global generator
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    return True


def _random_states() -> dict[str, Any]:
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}  # noqa: NPY002
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _commit(partial: Path, final: Path, state: TrainState) -> None:
    with open(partial / MARKER, "w") as marker:
        json.dump(asdict(state), marker)
        marker.flush()
        os.fsync(marker.fileno())
    if final.exists():  # incomplete, or it would have been kept
        shutil.rmtree(final)
    os.rename(partial, final)


def _discard(folder: Path) -> None:
    """Deletes a checkpoint; renamed first, so that a half-deleted one is never taken for a complete one."""
    doomed = folder.with_name(folder.name + PARTIAL)
    os.rename(folder, doomed)
    shutil.rmtree(doomed)

"""Faults of disks, files and ranks that save, each brought about in a run of two ranks, and what came of it.

Every function here takes an empty folder and an undisturbed run, and returns `Facts`: a page of faults can be made of
them.
"""

import io
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from ringattn.training.data.corpus import text_corpus
from ringattn.training.health.incidents import read_incidents
from tests.training.forked import all_end, fork_rank
from tests.training.test_runs import LIMIT, SMALL, curve, free_port, variables_of

STEPS, EVERY = 16, 4
SCRIPT = "tests/training/checkpoint/faulty_save.py"
Curve = list[tuple[int, float, float]]


@dataclass(frozen=True)
class Facts:
    """What came of a fault.

    Arguments:
        fault: in words.
        seconds: from the fault to the end of the run, or to what was printed about it.
        told: what was printed, of all ranks.
        codes: exit codes of the ranks that met the fault.
        steps_lost: steps that were done and had to be done again.
        same_curve: whether the whole curve, or the tokens, are those of the undisturbed run.
        kinds: of the incidents in the run's folder.
    """

    fault: str
    seconds: float
    told: str
    codes: tuple[int | None, ...]
    steps_lost: int
    same_curve: bool
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class Undisturbed:
    """A run of which every checkpoint is there."""

    output: Path
    curve: Curve


def started(
    output: Path, *overrides: str, fault: str = "", memories: Sequence[Path] = ()
) -> tuple[tuple[int | None, ...], str, float]:
    """A run of two ranks: exit codes, what was printed, and when it ended.

    Arguments:
        memories: folders for copies in memory, of each rank one; then each believes to be alone on a machine.
    """
    log, port = output / "ranks.log", free_port()
    output.mkdir(exist_ok=True)
    log.unlink(missing_ok=True)
    arguments = [*SMALL, f"run.steps={STEPS}", f"run.save_every={EVERY}", f"run.output={output}", *overrides]
    script, arguments = (SCRIPT, [str(output), fault, *arguments]) if fault else ("recipes/train.py", arguments)
    ranks = []
    for rank in range(2):
        variables, own = variables_of(rank, 2, port), list(arguments)
        if memories:
            variables |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
            own.append(f"run.memory_folder={memories[rank]}")
        ranks.append(fork_rank(own, variables, log, log, script=script))
    assert all_end(ranks, LIMIT), log.read_text()
    return tuple(rank.exitcode for rank in ranks), log.read_text(), time.time()


def undisturbed(output: Path) -> Undisturbed:
    """The run that others are compared with."""
    codes, told, _ = started(output, "run.keep=9")
    assert codes == (0, 0), told
    return Undisturbed(output, curve(output))


def killed_in_write(folder: Path, whole: Undisturbed, asynchronous: bool) -> Facts:
    """SIGKILL of a rank in the middle of writing a checkpoint."""
    same = f"run.async_save={str(asynchronous).lower()}"
    codes, told, ended = started(folder, same, fault="1:kill@12")
    happened = (folder / "happened").stat().st_mtime
    return _continued(folder, whole, "SIGKILL in the write of a checkpoint", codes, told, ended - happened, same)


def failing_disk(folder: Path, whole: Undisturbed, error: str, last: int, *overrides: str) -> Facts:
    """A disk that takes no checkpoint of the steps 8 to `last`; EROFS, ENOSPC, EIO."""
    codes, told, _ = started(folder, "run.keep=1", *overrides, fault=f"1:{error}@8-{last}")
    first = min((folder / "incidents").glob("*failed-save*")).stat().st_mtime
    seconds = max(0.0, first - (folder / "happened").stat().st_ctime)
    if 0 in codes:
        same = curve(folder) == whole.curve
        return Facts(f"{error} in a save", seconds, told, codes, 0, same, _kinds(folder))
    return _continued(folder, whole, f"{error} in every save", codes, told, seconds)


def damaged(folder: Path, whole: Undisturbed, fault: str, damage: Callable[[Path], None]) -> Facts:
    """The newest checkpoint, of step 12, damaged between two starts."""
    shutil.copytree(whole.output, folder, dirs_exist_ok=True)
    shutil.rmtree(folder / "checkpoints" / f"step-{STEPS:08d}")
    damage(folder / "checkpoints" / "step-00000012")
    began = time.time()
    return _continued(folder, whole, fault, (), "", 0.0, since=began)


def killed_between_saves(folder: Path, whole: Undisturbed) -> Facts:
    """SIGKILL of a rank in step 15 of a run that saves nothing on disk, with copies in memory every 3 steps."""
    (folder / "memory").mkdir()
    same = ("run.save_every=0", "run.memory_every=3", f"run.memory_folder={folder / 'memory'}", "run.async_save=true")
    codes, told, ended = started(folder, *same, fault="1:step@15")
    seconds = ended - (folder / "happened").stat().st_mtime
    facts = _continued(folder, whole, "SIGKILL between saves, with copies in memory", codes, told, seconds, *same)
    assert not list((folder / "memory").iterdir()), "copies of a run that is done"
    return facts


def machine_lost(folder: Path, whole: Undisturbed) -> Facts:
    """One of two machines is lost in step 15, with its memory; another comes in its place. Each kept the other's
    copies, and nothing was saved on disk."""
    memories = [folder / f"memory{rank}" for rank in range(2)]
    for memory in memories:
        memory.mkdir()
    same = ("run.save_every=0", "run.memory_every=3", "run.memory_neighbours=true")
    codes, told, ended = started(folder, *same, fault="1:step@15", memories=memories)
    seconds = ended - (folder / "happened").stat().st_mtime
    shutil.rmtree(memories[1])
    memories[1].mkdir()
    facts = _continued(
        folder, whole, "a machine is lost, copies in memory", codes, told, seconds, *same, memories=memories
    )
    assert not [path for memory in memories for path in memory.iterdir()], "copies of a run that is done"
    return facts


def corrupt_token_cache(folder: Path) -> Facts:
    """A flipped bit in the tokens of a text corpus between two starts."""
    (folder / "a.txt").write_text("some text " * 100)

    def opened() -> tuple[str, bytes]:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as told:
            corpus = text_corpus([folder / "a.txt"], "bytes", "text", False, folder / "cache")
        return told.getvalue(), bytes(corpus.read(0, 0, corpus.length(0)).astype("uint8"))

    _, right = opened()
    (tokens,) = (folder / "cache").rglob("tokens.bin")
    data = bytearray(tokens.read_bytes())
    data[500] ^= 1
    tokens.write_bytes(data)
    began = time.time()
    told, again = opened()
    return Facts("corrupt token cache", time.time() - began, told, (), 0, again == right, ())


def _continued(
    folder: Path,
    whole: Undisturbed,
    fault: str,
    codes: tuple[int | None, ...],
    told: str,
    seconds: float,
    *overrides: str,
    since: float = 0.0,
    memories: Sequence[Path] = (),
) -> Facts:
    """Starts again, undisturbed."""
    done = curve(folder)[-1][0]
    again, text, _ = started(folder, *overrides, memories=memories)
    assert again == (0, 0), text
    resumed = int(text.split("from step ")[1].split()[0])
    if since:
        bad = [path.stat().st_mtime for path in (folder / "incidents").glob("*bad-checkpoint*")]
        seconds, done = min(bad, default=float("inf")) - since, 12
    return Facts(fault, seconds, told + text, codes, done - resumed, curve(folder) == whole.curve, _kinds(folder))


def _kinds(folder: Path) -> tuple[str, ...]:
    return tuple(one["kind"] for one in read_incidents(folder))


def truncate(checkpoint: Path) -> None:
    """Takes the end of a shard away."""
    part = checkpoint / "rank-00001.safetensors"
    os.truncate(part, part.stat().st_size - 1000)


def flip_byte(checkpoint: Path) -> None:
    """Turns one byte of a shard's numbers."""
    part = checkpoint / "rank-00001.safetensors"
    data = bytearray(part.read_bytes())
    data[-1000] ^= 0x40
    part.write_bytes(data)


def delete_marker(checkpoint: Path) -> None:
    """Takes away what completes the checkpoint."""
    (checkpoint / "complete.json").unlink()


def halve_marker(checkpoint: Path) -> None:
    """Leaves half of it."""
    marker = checkpoint / "complete.json"
    marker.write_text(marker.read_text()[:150])


DAMAGES = {
    "truncated shard": (truncate, "rank-00001.safetensors has"),
    "flipped byte in a shard": (flip_byte, "rank-00001.safetensors is damaged: its checksum is"),
    "deleted metadata": (delete_marker, "step-00000012: complete.json is not there"),
    "half-written marker": (halve_marker, "complete.json is damaged: "),
}

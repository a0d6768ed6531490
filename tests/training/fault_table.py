"""Writes docs/faults.md: every fault, made on purpose in a tiny run on gloo and the CPU, and what came of it.

    python -m tests.training.fault_table docs/faults.md

Takes about ten minutes on two cores. Tests hold what each row promises: tests/training/checkpoint/test_faults.py,
tests/training/health/test_faults.py, test_agreement.py, test_bad_numbers.py, test_stragglers.py, test_recomputing.py.
"""

import argparse
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path

import torch

from tests.training import fault_rows
from tests.training.checkpoint import faults as of_disks
from tests.training.fault_rows import Fault
from tests.training.health import faults as of_ranks

HEAD = """# What happens when something fails

Every row is a fault that was made on purpose in a tiny run of two or three ranks (gloo, CPU), and what was seen.
Seconds are from the fault, or from the start of the ranks where the fault is there from the start, to what names it. A
step lost is one that was trained and had to be trained again, with a checkpoint every few steps. Tests hold each row
(`python -m pytest -m slow tests/training`). What to do about each is in
[Training](training.md#when-something-fails). A link between two hosts that is slow, loses packets or is cut, and a host
that is lost and comes back, are in `tests/launch/test_two_hosts.py`: hosts are network namespaces there.

{when}

| fault | named after, s | what is printed | steps lost | afterwards |
| --- | --- | --- | --- | --- |
"""


@dataclass(frozen=True)
class Row:
    """A line of the page."""

    fault: str
    seconds: float | None
    said: str
    lost: int | None
    after: str

    def markdown(self) -> str:
        seconds = "" if self.seconds is None else f"{self.seconds:.1f}"
        lost = "" if self.lost is None else str(self.lost)
        return f"| {self.fault} | {seconds} | {self.said} | {lost} | {self.after} |"


def quoted(text: str, words: str, folder: Path) -> str:
    """The first line that has some words, as code, without places of this machine."""
    found = next((line.strip() for line in text.splitlines() if words in line), "")
    short = found.replace(str(folder), "RUN").replace("RUN/out", "RUN").replace("|", "/").replace("`", "'")
    return f"`{short if len(short) <= 260 else short[:257] + '...'}`" if short else ""


def rank_rows(folder: Path) -> Iterator[Row]:
    """Ranks and launchers that end, stand still or are told to stop."""
    for number, (name, row) in enumerate(of_ranks.ROWS.items()):
        own = folder / f"rank{number}"
        own.mkdir()
        fact = row(own)
        after = {True: "starts again by itself or by the same command", False: "something has to be changed first"}
        curve = ", on the same curve" if fact.curve else ""
        said = quoted(f"ringattn: {fact.said}", "", own)
        yield Row(name, fact.seconds, said, fact.steps_lost, after[fact.ending.restart] + curve)


def disk_rows(folder: Path) -> Iterator[Row]:
    """Disks, files, and ranks that save."""
    whole = of_disks.undisturbed(folder / "whole")
    rows: list[tuple[str, Callable[[Path], of_disks.Facts], str]] = [
        ("SIGKILL of a rank in a write", partial(of_disks.killed_in_write, whole=whole, asynchronous=False), "is gone"),
        ("a full disk", lambda f: of_disks.failing_disk(f, whole, "ENOSPC", 12), "warning:"),
        (
            "a read-only disk",
            lambda f: of_disks.failing_disk(f, whole, "EROFS", 99, "run.max_failed_saves=2"),
            "error:",
        ),
        ("a killed rank, copies in memory", lambda f: of_disks.killed_between_saves(f, whole), "going on from"),
        ("a lost machine, copies on its neighbour", lambda f: of_disks.machine_lost(f, whole), "going on from"),
        ("a corrupt token cache", of_disks.corrupt_token_cache, "warning:"),
    ]
    for fault, (damage, _) in of_disks.DAMAGES.items():
        rows.append((fault, partial(of_disks.damaged, whole=whole, fault=fault, damage=damage), "warning: not taken"))
    for number, (name, row, words) in enumerate(rows):
        own = folder / f"disk{number}"
        own.mkdir()
        facts = row(own)
        after = "goes on, on the same curve" if facts.same_curve else ""
        yield Row(name, facts.seconds, quoted(facts.told, words, own), facts.steps_lost, after)


def number_rows(folder: Path) -> Iterator[Row]:
    """Ranks that disagree, make bad numbers, or are slow."""
    rows: list[tuple[Callable[[Path], Fault], str, str]] = [
        (partial(fault_rows.other_configuration, override="optim.lr=0.1"), "error:", "refused on all ranks, exit 2"),
        (partial(fault_rows.other_configuration, override="run.steps=7"), "error:", "refused on all ranks, exit 2"),
        (partial(fault_rows.other_configuration, override="data.seq_len=64"), "error:", "refused on all ranks, exit 2"),
        (fault_rows.other_documents, "error:", "refused on all ranks, exit 2"),
        (fault_rows.other_code, "error:", "refused on all ranks, exit 2"),
        (fault_rows.refused_rank, "error:", "refused on all ranks, exit 2"),
        (fault_rows.absent_rank, "error:", "refused; `run.start_timeout` was 2 s"),
        (fault_rows.second_run, "error:", "the first run goes on; the second is refused, exit 2"),
        (fault_rows.other_batch, "not one run", "stops in that step"),
        (fault_rows.other_learning_rate_later, "not one run", "stops in that step"),
        (partial(fault_rows.bad_gradient, steps=[5, 6]), "warning:", "steps are left out, the run goes on"),
        (partial(fault_rows.bad_activation, steps=[5]), "warning:", "the step is left out, the run goes on"),
        (fault_rows.silent_fault, "computed twice", "stops; `run.recompute_every` was set"),
        (fault_rows.slow_rank, "own time", "goes on; a table names it"),
        (fault_rows.slow_link, "slow link", "goes on; a line names it"),
    ]
    for number, (row, words, after) in enumerate(rows):
        own = folder / f"number{number}"
        own.mkdir()
        found = row(own)
        yield Row(found.name, found.seconds or None, quoted(found.said, words, own), found.steps_lost, after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    page = parser.parse_args().page
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    when = f"{date.today()}, {versions}, 2 cores, `run.hang_after=5`."
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for rows in (rank_rows, disk_rows, number_rows):
            for row in rows(Path(folder)):
                print(row.markdown(), file=sys.stderr, flush=True)
                lines.append(row.markdown())
    page.write_text(HEAD.format(when=when) + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

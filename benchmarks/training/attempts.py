"""One length tried, for the search of the longest.

With one GPU in this process: a row that has no room is taken apart, and the next one starts anew. With several each
attempt is a torchrun of its own: a rank without room leaves the others in a collective, and is ended with them.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from benchmarks.training.case import Place
from benchmarks.training.longest import Attempt
from benchmarks.training.measuring import GIB, measure, resident_bytes, told_lack
from benchmarks.training.options import case_of, words_of
from benchmarks.training.report import write_json
from benchmarks.training.rows import Tools

LACK = ".lack"  # ends the name of the file in which a process says that it had no room
# What a search asks for itself in each attempt.
_OWN = "longest", "gpus", "rows", "seq_len", "json", "steps", "dry_attention", "floor", "profile", "precision", "limit"


def gpu_room(device: torch.device, asked: float | None) -> float:
    """GiB that torch may allocate on the device: what was asked for, or what is free. Of a CPU what was asked for."""
    if device.type != "cuda":
        return float("inf") if asked is None else asked
    free, total = torch.cuda.mem_get_info(device)
    if asked is None:
        return (free + torch.cuda.memory_reserved(device)) / GIB
    torch.cuda.set_per_process_memory_fraction(min(1.0, asked * GIB / total), device)
    return asked


def attempt_here(options: argparse.Namespace, row: str, tokens: int, place: Place, tools: Tools) -> Attempt:
    """A dry step in this process, of the only rank."""
    began, room = time.monotonic(), gpu_room(place.device, options.room)
    case = replace(case_of(options, row, tokens, place), dry=True, steps=0)
    result = measure(case, place, tools)
    peak = result.allocated if place.device.type == "cuda" else resident_bytes() / GIB
    return judged(Attempt(tokens, None if result.failure else peak, room, time.monotonic() - began, result.failure))


def attempt_apart(options: argparse.Namespace, row: str, tokens: int) -> Attempt:
    """A dry step of several ranks, in processes of their own. Raises RuntimeError if they fail for another reason than
    a lack of room."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "attempt.json")
        own = ["--rows", row, "--seq-len", str(tokens), "--steps", "0", "--dry-attention", "only", "--json", str(path)]
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.gpus),
            "-m", "benchmarks.training", *words_of(options, _OWN), *own,
        ]  # fmt: skip
        code, told = finished(command, options.limit)
        seconds, lack = time.monotonic() - began, path.with_name(path.name + LACK)
        if lack.exists():
            return Attempt(tokens, None, 0.0, seconds, lack.read_text(encoding="utf-8"))
        if "SIGKILL" in told:
            return Attempt(tokens, None, 0.0, seconds, "killed: the host had no room, most likely")
        if code:
            raise RuntimeError(f"{' '.join(command)} failed:\n{told[-4000:]}")
        found = json.loads(path.read_text(encoding="utf-8"))
    result = found["results"][0]
    peak = result["resident"] if result["allocated"] is None else result["allocated"]
    failure = result["failure"]
    return judged(Attempt(tokens, None if failure else peak, found["facts"]["room"], seconds, failure))


def finished(command: list[str], limit: float) -> tuple[int, str]:
    """The exit code of a command and what it said. Raises RuntimeError if it does not end within `limit` seconds, when
    its processes are ended with it: torchrun's ranks would keep their GPUs."""
    started = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )  # fmt: skip
    try:
        told, _ = started.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, signal.SIGKILL)
        told, _ = started.communicate()
        raise RuntimeError(f"{' '.join(command)} did not end within {limit:.0f} s:\n{told[-4000:]}") from None
    return started.returncode, told


def judged(attempt: Attempt) -> Attempt:
    """The same; one that took more than there is did not fit. On a CPU nobody else says so."""
    if attempt.peak is None or attempt.peak <= attempt.room:
        return attempt
    return replace(attempt, peak=None, failure=f"{attempt.peak:.2f} GiB of {attempt.room:.2f}")


def end_without_room(error: BaseException, path: Path | None, facts: dict[str, Any]) -> NoReturn:
    """Ends this rank at once, and says why in a file beside the results. torchrun ends the other ranks."""
    told = told_lack(error)
    print(f"rank {os.environ.get('RANK', '0')}: {told}", flush=True)
    if path is not None:
        path.with_name(path.name + LACK).write_text(told, encoding="utf-8")
        if not path.exists():
            write_json(path, facts, [], {})
    os._exit(1)

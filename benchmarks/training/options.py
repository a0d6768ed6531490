"""The command line, and the cases that it asks for."""

import argparse
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.training.case import Case, Place, model_config, packs
from benchmarks.training.measuring import ROWS
from benchmarks.training.planned import plan, run_of
from ringattn.memory.settings import CHOICES, MemorySettings, StateSettings

GIB = 2**30
DOCUMENTS = "dense", "packed", "short", "hist"


def parser() -> argparse.ArgumentParser:
    """All options."""
    import benchmarks.training

    made = argparse.ArgumentParser(
        "benchmarks.training",
        description=benchmarks.training.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = made.add_argument_group("what is trained")
    what.add_argument(
        "--rows", default="ours,hf,alst", help=f"of {', '.join(ROWS)}; a peer that is not installed says so"
    )
    what.add_argument("--model", default="llama_8b", help="a file of configs/model, or tiny")
    what.add_argument("--layers", type=int, help="instead of the model's own number")
    what.add_argument("--seq-len", default="32k", help="tokens of the stream over all ranks, as 32k,65536; 1k is 1,024")
    what.add_argument(
        "--documents", choices=DOCUMENTS, default="dense", help="dense: one; see ringattn.benchmarking.workloads"
    )
    what.add_argument("--steps", type=int, default=1, help="steps that are timed, beside the first one")
    what.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the computation")
    what.add_argument("--kernel", default="auto", help="attention's kernel for all rows, a backend's name")
    what.add_argument("--device", choices=("cuda", "cpu"), help="default: a GPU where there is one")
    what.add_argument(
        "--ulysses", type=int, help="ranks of ours that exchange heads; the others are a ring. Default: 1"
    )
    what.add_argument("--head-chunks", type=int, default=1, help="of ours, computed one after another")
    what.add_argument("--seed", type=int, default=3)
    memory = made.add_argument_group("memory: fields of ringattn.memory.settings; a peer takes of them what it has")
    memory.add_argument("--loss-tile", type=_count_or_none, default=2048, help="tokens, or none")
    memory.add_argument("--mlp-tile", type=_count_or_none, default=8192, help="tokens, or none")
    memory.add_argument("--keep", choices=CHOICES["keep"], default="attention", help="peers keep layers' inputs")
    memory.add_argument("--every", type=int, default=1)
    memory.add_argument("--host-layers", default="0", help="a number or all; ALST's are all or none")
    memory.add_argument("--weights", choices=CHOICES["weights"], default="bfloat16")
    memory.add_argument(
        "--moments", choices=(*CHOICES["moments"], "none"), default="bfloat16", help="none: no optimizer"
    )
    memory.add_argument("--reduce", choices=CHOICES["reduce"], default="float32")
    memory.add_argument("--states-on", choices=CHOICES["states_on"], default="device")
    memory.add_argument("--fused", choices=("none", "compile", "liger"), default="none", help="elementwise work")
    memory.add_argument("--no-reshard", action="store_true", help="layers' weights stay from forward to backward")
    memory.add_argument("--prefetch", type=int, default=1)
    how = made.add_argument_group("how it is measured")
    how.add_argument("--dry-attention", nargs="?", const="only", choices=("only", "also"),
                     help="attention writes zeros; also: beside real rows")  # fmt: skip
    how.add_argument(
        "--floor", action="store_true", help="attention's kernel and the matrix products alone, at each length"
    )
    how.add_argument("--longest", action="store_true", help="find each row's longest stream, from --seq-len on, dry")
    how.add_argument("--precision", type=float, default=0.03, help="of the longest, as a share of it")
    how.add_argument("--limit", type=float, default=3600.0, help="seconds of the search of one row")
    how.add_argument("--gpus", type=int, default=1, help="ranks of --longest: each attempt of several is a torchrun")
    how.add_argument("--room", type=float, help="GiB a GPU that may be used, as if it had no more")
    how.add_argument("--host-room", type=float, help="GiB of the host for layers' shares; default: what is free now")
    how.add_argument("--profile", type=Path, help="write a profile of one more step of each row here, as Markdown")
    how.add_argument("--json", type=Path, help="write everything here, after every row")
    return made


def checked(options: argparse.Namespace) -> argparse.Namespace:
    """The same options. Raises ValueError for those that cannot be."""
    if unknown := [row for row in options.rows.split(",") if row not in ROWS]:
        raise ValueError(f"--rows must be of {', '.join(ROWS)}, got {unknown[0]!r}")
    for name, least in (("steps", 0), ("gpus", 1), ("layers", 1), ("every", 1), ("head_chunks", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if options.longest and not 0 < options.precision < 1:
        raise ValueError(f"--precision must be a share between 0 and 1, got {options.precision}")
    if options.gpus > 1 and not options.longest:
        raise ValueError(f"--gpus={options.gpus} is for --longest: start other runs with torchrun")
    lengths(options)
    return options


def lengths(options: argparse.Namespace) -> list[int]:
    """Tokens of --seq-len, in the order that they are measured in: the shortest first."""
    found = []
    for word in options.seq_len.lower().split(","):
        number, factor = (word[:-1], 1024) if word.endswith("k") else (word, 1)
        number, factor = (word[:-1], 2**20) if word.endswith("m") else (number, factor)
        if not number.isdecimal() or not int(number):
            raise ValueError(f"--seq-len must be numbers of tokens as 65536, 64k or 1m, got {word!r}")
        found.append(int(number) * factor)
    return sorted(found)


def case_of(options: argparse.Namespace, row: str, tokens: int, place: Place) -> Case:
    """The case of a row at a length, without dry attention."""
    config: Any = model_config(options.model, options.layers)
    layers = config.num_hidden_layers
    host = layers if options.host_layers == "all" else int(options.host_layers)
    if not 0 <= host <= layers:
        raise ValueError(f"--host-layers must be all or a number of the {layers} layers, got {options.host_layers}")
    docs, dtype = packs(options.documents, tokens, options.seed), getattr(torch, options.dtype)
    updates = options.moments != "none"
    states = StateSettings(
        weights=options.weights, moments=options.moments if updates else options.weights, reduce=options.reduce,
        states_on=options.states_on, reshard=not options.no_reshard, prefetch=options.prefetch,
    )  # fmt: skip
    memory: dict[str, Any] = {
        "loss_tile": options.loss_tile, "mlp_tile": options.mlp_tile, "keep": options.keep, "every": options.every,
    }  # fmt: skip
    room = free_host_memory() if options.host_room is None else options.host_room
    case = Case(
        row, config, docs, MemorySettings(**memory), states, updates, dtype, steps=options.steps, seed=options.seed,
        host_room=room / place.ranks, fused=options.fused, head_chunks=options.head_chunks,
    )  # fmt: skip
    planned = plan(config, run_of(case, place), {**memory, "host_layers": host}, states, place.device.type)
    return replace(case, memory=planned.memory)


def free_host_memory() -> float:
    """GiB of the host that this process may still take: what is available, within its control group's limit."""
    free = float("inf")
    with suppress(OSError), open("/proc/meminfo") as file:
        free = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable:")) / 2**20
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        free = min(free, (int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())) / GIB)
    return 0.95 * free


def _count_or_none(word: str) -> int | None:
    return None if word == "none" else int(word)


def words_of(options: argparse.Namespace, but: Sequence[str]) -> list[str]:
    """The options as words again, for another process, without some of them."""
    words = []
    for name, value in vars(options).items():
        flag = "--" + name.replace("_", "-")
        if name in but or value is False or (value is None and name not in ("loss_tile", "mlp_tile")):
            continue
        words += [flag] if value is True else [flag, "none" if value is None else str(value)]
    return words

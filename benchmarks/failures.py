"""Failures on GPUs: how soon they are named, what restarts lose, and what saving costs.

    python -m benchmarks.failures faults                two ranks, NCCL over NVLink
    python -m benchmarks.failures faults --hosts        the same, as if each rank were on a machine of its own
                                                        (sockets); on one GPU both ranks have it
    python -m benchmarks.failures saving --folder /data             one rank, a model of 1.2 billion parameters
    python -m benchmarks.failures saving --folder /data --ranks 2 data.packs_per_step=2   the same with collectives

Without GPUs `faults` runs on gloo and the CPU. Each part prints a table in Markdown.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from ringattn.training.health.incidents import read_ending, read_incidents
from ringattn.training.report.records import read_metrics
from tests.training.forked import ROOT
from tests.training.health.faults import FAULTY
from tests.training.test_runs import free_port

FAULTS = {
    "none": "no fault",
    "kill-forward": "SIGKILL in the forward pass",
    "kill-backward": "SIGKILL in the backward pass",
    "stop": "SIGSTOP",
    "skip": "a collective is skipped",
    "memory": "out of memory",
}
STEPS, AT_STEP, HANG_AFTER, LIMIT = 12, 9, 10, 150
SMALL = [
    "model.config.num_hidden_layers=4",
    "data.seq_len=4096",
    "data.packs_per_step=2",
    f"run.steps={STEPS}",
    "run.save_every=0",
    "run.memory_every=3",
    "run.report=false",
    f"run.hang_after={HANG_AFTER}",
    "engine.compile=none",  # a run of these starts some twenty times
    "run.deterministic=true",  # so that what went on is seen to be the same run
]


def variables(rank: int, ranks: int, port: int, hosts: bool) -> dict[str, str]:
    """A rank's environment; with `hosts` NCCL takes each rank for another machine's."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    given = os.environ | {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in own.items()}
    given["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    if hosts:
        given |= {"NCCL_HOSTID": f"host{rank}", "NCCL_IB_DISABLE": "1", "NCCL_SOCKET_IFNAME": "lo"}
        given |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        if count := torch.cuda.device_count():
            given["CUDA_VISIBLE_DEVICES"] = str(rank % count)
    return given


def run(output: Path, fault: str, hosts: bool, ranks: int, overrides: Sequence[str]) -> list[int]:
    """A run of the recipe, with a fault in rank 1; exit codes. What ranks write is in OUTPUT/ranks.log."""
    output.mkdir(parents=True, exist_ok=True)
    port = free_port()
    where = f"kill-forward:{ranks}:0" if fault == "none" else f"{fault}:1:{AT_STEP}"  # a rank that is not there
    words = [sys.executable, FAULTY, where, *SMALL, f"run.output={output}", *overrides]
    with open(output / "ranks.log", "a") as log:
        started = [
            subprocess.Popen(words, cwd=ROOT, env=variables(rank, ranks, port, hosts), stdout=log, stderr=log)
            for rank in range(ranks)
        ]
        deadline = time.monotonic() + LIMIT
        for process in started:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    return [process.returncode for process in started]


def faults(folder: Path, hosts: bool, kinds: Sequence[str], at_once: int, overrides: Sequence[str]) -> Iterator[str]:
    """Rows: the fault, seconds until it was written down, what was said, and how the same command went on.

    Arguments:
        kinds: of `FAULTS`; the run without a fault is always there.
        at_once: so many of them run side by side.
    """
    with ThreadPoolExecutor(at_once) as threads:
        right = threads.submit(one_fault, folder, "none", hosts, overrides)
        others = [threads.submit(one_fault, folder, kind, hosts, overrides) for kind in kinds if kind != "none"]
        yield right.result().row(right.result().curve)
        for told in as_completed(others):
            yield told.result().row(right.result().curve)


@dataclass(frozen=True)
class Told:
    """What came of a fault.

    Arguments:
        kind: of `FAULTS`.
        seconds: until it was written down.
        said: how the run ended, and kinds of incidents.
        codes, again: exit codes of the ranks, and of the same command after it; none where nothing had failed.
        start: the step that the second went on from.
        curve: losses and gradient norms of all steps.
    """

    kind: str
    seconds: float
    said: str
    codes: list[int]
    again: list[int] | None
    start: int
    curve: list[tuple[float, float]]

    def row(self, right: list[tuple[float, float]]) -> str:
        """Beside the run without a fault."""
        if self.again is None:
            return f"| {FAULTS[self.kind]} | | {self.said} | | {self.codes} |"
        pairs = [pair for one, other in zip(self.curve, right, strict=False) for pair in zip(one, other, strict=True)]
        apart = max((abs(a / b - 1) for a, b in pairs), default=0.0)
        after = f"from step {self.start}, {len(self.curve)} of {STEPS} steps, {apart:.0e} apart"
        after = after if self.again == [0, 0] else str(self.again)
        lost = AT_STEP - 1 - self.start
        return f"| {FAULTS[self.kind]} | {self.seconds:.1f} | {self.said} | {lost} | {self.codes}, then {after} |"


def one_fault(folder: Path, kind: str, hosts: bool, overrides: Sequence[str]) -> Told:
    """A run with a fault, and the same command again."""
    output, memory = folder / kind, folder / f"{kind}-memory"
    memory.mkdir(parents=True)
    own = [f"run.memory_folder={memory}", *overrides]
    codes = run(output, kind, hosts, 2, own)
    ending = read_ending(output)
    if kind == "none":
        said = ending.why if ending else (output / "ranks.log").read_text()[-400:]
        return Told(kind, 0.0, said, codes, None, 0, curve(output))
    at = float((output / "fault-time").read_text()) if (output / "fault-time").exists() else float("nan")
    seconds = (output / "exit.json").stat().st_mtime - at if ending else float("nan")
    said = " ".join(ending.why.split()) if ending else "nothing"
    extra = sorted({one["kind"] for one in read_incidents(output)}) if output.exists() else []
    print(f"{kind}: {seconds:.1f} s, {said}", file=sys.stderr, flush=True)  # what is known stays, if time runs out
    again = run(output, kind, hosts, 2, own)
    text = (output / "ranks.log").read_text()
    start = int(text.rsplit("from step ", 1)[1].split()[0]) if "from step " in text else 0
    return Told(kind, seconds, f"{said[:220]} ({', '.join(extra)})", codes, again, start, curve(output))


def curve(output: Path) -> list[tuple[float, float]]:
    path = output / "metrics.jsonl"
    return [(one["loss"], one["grad_norm"]) for one in read_metrics(path)] if path.exists() else []


# The shape of Llama 3.2 1B.
BILLION = [
    "model=llama_8b",
    "model.config.num_hidden_layers=16",
    "model.config.hidden_size=2048",
    "model.config.intermediate_size=8192",
    "model.config.num_attention_heads=32",
    "model.config.num_key_value_heads=8",
    "model.config.head_dim=64",
    "model.config.tie_word_embeddings=true",
    "data.seq_len=32768",
    "data.packs_per_step=1",
    "run.steps=50",
    "run.keep=1",
]
# The recipe, with a clock: for each step, when it began and when it was over.
TIMED = """
import os, runpy, sys, time
from ringattn.training import loop
step, save = loop.Trainer._train_step, loop.Trainer.save
def timed(self, *given, **named):
    began = time.perf_counter()
    done = step(self, *given, **named)
    if os.environ["RANK"] == "0":
        with open(out, "a") as file:
            print(self.step, began, time.perf_counter(), file=file)
    return done
def saved(self, places=None):
    if way == "none":
        os._exit(0)
    save(self, places)
loop.Trainer._train_step, loop.Trainer.save = timed, saved
out, way, sys.argv = sys.argv[1], sys.argv[2], ["recipes/train.py", *sys.argv[3:]]
runpy.run_path("recipes/train.py", run_name="__main__")
"""
AFTER = 3  # steps in which a GPU may still copy and a thread write
WAYS = {
    "none": ("nothing is saved", ["run.save_every=0"]),
    "wait": ("the training waits for the disk", ["run.async_save=false", "run.save_every={every}"]),
    "thread": ("a thread writes it", ["run.async_save=true", "run.save_every={every}"]),
    "memory": (
        "copies in memory, a thread writes them",
        ["run.async_save=true", "run.memory_every={every}", "run.save_every=0"],
    ),
}


class Times(NamedTuple):
    """By step: when it began and when it was over, in seconds."""

    began: dict[int, float]
    over: dict[int, float]

    def between(self, step: int) -> float:
        """From a step's end to the next one's start."""
        return self.began[step + 1] - self.over[step]

    def after(self, step: int) -> float:
        """From a step's end to that of the last of those after it."""
        return self.over[min(step + AFTER, max(self.over))] - self.over[step]


def read_times(path: Path) -> Times:
    lines = [line.split() for line in path.read_text().splitlines()]
    return Times(*({int(line[0]): float(line[at]) for line in lines} for at in (1, 2)))


def saving(folder: Path, ways: Sequence[str], every: int, ranks: int, overrides: Sequence[str]) -> Iterator[str]:
    """Rows: how it is saved; seconds between the step that is saved and the next; seconds by which that and the three
    steps take longer than the same ones of a run that saves nothing; a step's, the median; the share; GB on disk. The
    last save of a run is waited for in every case and is left out.

    Arguments:
        every: so many steps are between two saves.
        ranks: that train, each on a GPU of its own.
    """
    right: Times | None = None
    for way in ("none", *ways):
        name, own = WAYS[way]
        output, times = folder / way, folder / f"{way}.txt"
        words = [sys.executable, "-c", TIMED, str(times), way, *BILLION, *overrides, f"run.output={output}"]
        words += [one.format(every=every) for one in own]
        output.mkdir(parents=True)
        port, log = free_port(), folder / f"{way}.log"
        with open(log, "w") as file:
            started = [
                subprocess.Popen(words, cwd=ROOT, env=variables(rank, ranks, port, False), stdout=file, stderr=file)
                for rank in range(ranks)
            ]
            codes = [process.wait() for process in started]
        if any(codes):
            yield f"| {name} | {log.read_text()[-600:]!r} | | | | |"
            continue
        found = read_times(times)
        steps = sorted(found.over[step] - found.began[step] for step in found.over)
        median = steps[len(steps) // 2]
        if right is None:
            right = found
            usual = sorted(found.between(step) for step in list(found.over)[1:-1])
            yield f"| {name} | {usual[len(usual) // 2]:.3f} | | {median:.3f} | | |"
            continue
        saves = [step for step in found.over if step % every == 0 and step != max(found.over)]
        longer = [found.after(step) - right.after(step) for step in saves]
        size = sum(path.stat().st_size for path in (output / "checkpoints").rglob("*") if path.is_file())
        yield (
            f"| {name} | {', '.join(f'{found.between(step):.3f}' for step in saves)} | "
            f"{', '.join(f'{one:.3f}' for one in longer)} | {median:.3f} | {max(longer) / median:.2f} | "
            f"{size / 1e9:.2f} |"
        )
        shutil.rmtree(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("faults", "saving"))
    parser.add_argument("--hosts", action="store_true", help="as if each rank were on a machine of its own")
    parser.add_argument("--folder", type=Path, help="on the disk that is to be written to; default a temporary one")
    parser.add_argument("--kinds", default=",".join(FAULTS), help="of faults; default all: %(default)s")
    parser.add_argument("--at-once", type=int, default=1, help="so many faults side by side")
    parser.add_argument("--ways", default="wait,thread,memory", help="of saving; default all: %(default)s")
    parser.add_argument(
        "--every", type=int, default=24, help="steps between saves; a disk should have time to write one"
    )
    parser.add_argument("--ranks", type=int, default=1, help="of saving, each on a GPU of its own")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_intermixed_args()  # options between overrides
    kinds, ways = args.kinds.split(","), args.ways.split(",")
    if wrong := [one for one in kinds if one not in FAULTS] + [one for one in ways if one not in WAYS]:
        parser.error(f"--kinds must be of {', '.join(FAULTS)} and --ways of {', '.join(WAYS)}, got {', '.join(wrong)}")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{device}, torch {torch.__version__}, run.hang_after={HANG_AFTER}\n")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        if args.what == "faults":
            print("| fault | named after, s | what was said | steps lost | exit codes, and the same command again |")
            print("|---|---|---|---|---|")
            rows = faults(Path(folder), args.hosts, kinds, args.at_once, args.overrides)
        else:
            print(
                "| a save | before the next step, s | longer with three steps, s | a step, s | of a step | GB on disk |"
            )
            print("|---|---|---|---|---|---|")
            rows = saving(Path(folder), ways, args.every, args.ranks, args.overrides)
        for row in rows:
            print(row, flush=True)


if __name__ == "__main__":
    main()

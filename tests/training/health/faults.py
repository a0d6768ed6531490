"""Faults, made on purpose in tiny runs, and what came of them: rows of a table, each a function of an empty folder.

for name, row in ROWS.items():
    fact = row(folder)
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

from ringattn.training.health.incidents import Ending, read_ending, read_incidents
from ringattn.training.report.records import read_metrics
from tests.training.forked import ROOT, all_end, fork_rank
from tests.training.test_runs import environment, free_port, variables_of

FAULTY = "tests/training/health/faulty.py"
STEPS, SAVE_EVERY, AT_STEP = 6, 2, 4  # a fault in step 4 loses step 3 and what there is of step 4
HANG_AFTER = 5  # seconds
LIMIT = 200  # seconds after which a run of these hangs
SMALL = [
    "model.config.hidden_size=32",
    "model.config.intermediate_size=48",
    "model.config.num_hidden_layers=2",
    "model.config.num_attention_heads=4",
    "model.config.num_key_value_heads=2",
    "data.seq_len=256",
    "data.packs_per_step=2",
    f"run.steps={STEPS}",
    f"run.save_every={SAVE_EVERY}",
    "run.dtype=float32",
    f"run.hang_after={HANG_AFTER}",
]
Curve = list[tuple[int, float, float]]


@dataclass(frozen=True)
class Fact:
    """What came of a fault.

    Arguments:
        fault: in words.
        seconds: from the fault to its record on disk; None where nothing is to be detected.
        within: what is promised for that.
        said: the sentence that names it.
        printed: all that the run wrote on stdout and stderr.
        ending: what exit.json said.
        incidents: kinds of incidents.
        steps_lost: whole steps that had to be done again.
        curve: of the run after it was started again, None where it was not.
    """

    fault: str
    seconds: float | None
    within: float
    said: str
    printed: str
    ending: Ending
    incidents: tuple[str, ...] = ()
    steps_lost: int = 0
    curve: Curve | None = None


def curve(output: Path) -> Curve:
    return [(one["step"], one["loss"], one["grad_norm"]) for one in read_metrics(output / "metrics.jsonl")]


def start_forked(output: Path, *overrides: str, fault: str = "", ranks: int = 2) -> list[BaseProcess]:
    """Ranks without torchrun; what they and their monitor write is in OUTPUT/ranks.log."""
    output.mkdir(parents=True, exist_ok=True)
    log, port = output / "ranks.log", free_port()
    arguments = [*([fault] if fault else []), *SMALL, f"run.output={output}", *overrides]
    script = FAULTY if fault else "recipes/train.py"
    return [fork_rank(arguments, variables_of(rank, ranks, port), log, log, script=script) for rank in range(ranks)]


def run_forked(output: Path, *overrides: str, fault: str = "", ranks: int = 2) -> str:
    """A whole run: what was written."""
    in_time = all_end(start_forked(output, *overrides, fault=fault, ranks=ranks), LIMIT)
    text = (output / "ranks.log").read_text()
    assert in_time, f"hangs:\n{text}"
    wait_for(lambda: not monitors_of(output), "the monitor outlives its ranks")
    return (output / "ranks.log").read_text()


def monitors_of(output: Path) -> list[str]:
    """Command lines of monitors of a run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if "ringattn.training.health.monitor" in text and f'"{output}"' in text:
            found.append(text)
    return found


def wait_for(holds: Callable[[], object], what: str, seconds: float = LIMIT) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def wait_for_step(output: Path, step: int) -> None:
    path = output / "metrics.jsonl"
    wait_for(lambda: path.exists() and curve(output) and curve(output)[-1][0] >= step, f"step {step} never came")


def in_a_rank(name: str, kind: str, rank: int, within: float, folder: Path) -> Fact:
    """A fault of one rank, and the same command again.

    A collective is skipped in a step after which nothing is saved: gloo ends a rank whose next one, in the same group,
    is of another size.
    """
    step = AT_STEP + (kind == "skip")
    output = folder / "out"
    printed = run_forked(output, fault=f"{kind}:{rank}:{step}")
    fact = judged(name, output, within, float((output / "fault-time").read_text()), printed)
    again = run_forked(output, fault=f"{kind}:{rank}:{step}")[len(printed) :]
    start = int(again.split("from step ")[1].split()[0])
    return Fact(**{**vars(fact), "curve": curve(output), "steps_lost": step - 1 - start})


def judged(name: str, output: Path, within: float, at: float, printed: str) -> Fact:
    """What a run left that ended with a fault at a time."""
    ending = read_ending(output)
    assert ending is not None, f"no exit.json:\n{printed}"
    kinds = tuple(one["kind"] for one in read_incidents(output))
    seconds = (output / "exit.json").stat().st_mtime - at
    return Fact(name, seconds, within, ending.why, printed, ending, kinds)


def launch(output: Path, *overrides: str, options: tuple[str, ...] = ()) -> "subprocess.Popen[str]":
    """`ringattn train` with two ranks."""
    command = [sys.executable, "-m", "ringattn", "train", "--nproc", "2", *options, *SMALL]
    output.mkdir(parents=True, exist_ok=True)
    with open(output / "ranks.log", "a") as log:
        return subprocess.Popen(
            [*command, f"run.output={output}", *overrides],
            cwd=ROOT, env=environment(), text=True, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def child_of(pid: int) -> int:
    """The first process that another one has started."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(found[0])


def ranks_of(output: Path) -> list[int]:
    """Processes of the recipe in a folder, but for what they were started by."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if f"run.output={output}" in words and not {"torch.distributed.run", "ringattn.commands._agent", "ringattn"} & {
            *words
        }:
            found.append(int(path.parent.name))
    return found


def launcher_killed(name: str, which: str, within: float, folder: Path) -> Fact:
    """SIGKILL of torchrun, or of `ringattn train`, and a run in the same folder at once."""
    output = folder / "out"
    steps = "run.steps=100000"
    process = launch(output, steps)
    try:
        wait_for_step(output, SAVE_EVERY + 1)
        at = time.time()
        os.kill(child_of(process.pid) if which == "torchrun" else process.pid, signal.SIGKILL)
        wait_for(lambda: not ranks_of(output), "ranks live on without their launcher", within + LIMIT / 4)
        gone = time.time() - at
        process.wait(LIMIT)
        wait_for(lambda: not monitors_of(output), "the monitor outlives its ranks")
    finally:
        end(process)
    fact = judged(name, output, within, at, (output / "ranks.log").read_text())
    return Fact(**{**vars(fact), "seconds": gone})


def told(name: str, number: int, within: float, folder: Path, kind: str = "slow5") -> Fact:
    """A signal to `ringattn train` in the middle of a step that is longer than torchrun's own patience would be."""
    output = folder / "out"
    command = [sys.executable, "-m", "ringattn", "train", "--nproc", "2", *SMALL, f"run.output={output}"]
    command.append("run.hang_after=100")  # a long step is no hang
    output.mkdir(parents=True)
    # `ringattn train` starts the recipe that stands in its folder: here one with a fault.
    program = (
        f"import sys; from pathlib import Path; from ringattn.commands import train; sys.argv = {command[2:]!r}; "
        f"train.RECIPE = Path({str(folder / 'recipe.py')!r}); "
        "from ringattn.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    (folder / "recipe.py").write_text(
        "import runpy, sys\n"
        f"printing = '--cfg' in sys.argv\nscript = {str(ROOT / 'recipes' / 'train.py')!r} if printing else {FAULTY!r}\n"
        f"sys.argv = [script, *([] if printing else ['{kind}:1:{AT_STEP}']), *sys.argv[1:]]\n"
        "runpy.run_path(script, run_name='__main__')\n"
    )
    with open(output / "ranks.log", "a") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", program], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            env=environment() | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1"},
        )  # fmt: skip
    try:
        wait_for((output / "fault-time").exists, "the step never came")
        at = time.time()
        process.send_signal(number)
        code = process.wait(LIMIT)
    finally:
        end(process)
    printed = (output / "ranks.log").read_text()
    assert code == 75, printed
    fact = judged(name, output, within, at, printed)
    run_forked(output)
    return Fact(**{**vars(fact), "curve": curve(output), "steps_lost": AT_STEP - fact.ending.step})


def end(process: "subprocess.Popen[str] | subprocess.Popen[bytes]") -> None:
    """What is left of a run is killed, however its test went."""
    for pid in [process.pid, *_below(process.pid)]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def _below(pid: int) -> list[int]:
    try:
        own = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [one for child in own for one in (child, *_below(child))]


ROWS: dict[str, Callable[[Path], Fact]] = {
    name: partial(function, name, *arguments)
    for name, function, *arguments in (
        ("SIGKILL of a rank in its forward pass", in_a_rank, "kill-forward", 1, 5.0),
        ("SIGKILL of a rank in its backward pass", in_a_rank, "kill-backward", 1, 5.0),
        ("SIGKILL of a rank in its optimizer step", in_a_rank, "kill-optimizer", 0, 5.0),
        ("SIGSTOP of a rank", in_a_rank, "stop", 1, HANG_AFTER + 10.0),
        ("a rank that stands still", in_a_rank, "sleep", 0, HANG_AFTER + 10.0),
        ("a rank that skips a collective", in_a_rank, "skip", 1, HANG_AFTER + 10.0),
        ("out of memory on one rank", in_a_rank, "memory", 1, 5.0),
        ("SIGKILL of torchrun", launcher_killed, "torchrun", 10.0),
        ("SIGKILL of ringattn train", launcher_killed, "ringattn", 30.0),
        ("SIGTERM in a long step", told, signal.SIGTERM, 30.0),
        ("SIGUSR1 in a long step", told, signal.SIGUSR1, 30.0),
    )
}

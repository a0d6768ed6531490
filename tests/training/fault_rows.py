"""Faults of ranks that disagree, make bad numbers or are slow: each injected into a small run, and what became of it.

Every function here is a row of docs/faults.md: it runs the fault on gloo and the CPU and returns what was seen.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from ringattn.training.checkpoint import complete_checkpoints
from ringattn.training.health.incidents import read_incidents
from tests.training.forked import all_end, fork_rank
from tests.training.test_runs import SMALL, free_port, variables_of

LIMIT = 120.0  # seconds after which a run hangs


@dataclass(frozen=True)
class Fault:
    """One row.

    Arguments:
        name: of the fault.
        codes: exit codes of the ranks.
        seconds: from the start of the ranks (where that is when the fault is there) or from the fault to the message.
        said: what the screens show, all ranks'.
        steps_lost: that a restart has to do again; None where nothing is to be restarted.
        facts: further ones.
    """

    name: str
    codes: list[int | None]
    seconds: float
    said: str
    steps_lost: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def run_with(
    output: Path,
    overrides: Sequence[str] = (),
    own: Mapping[int, Sequence[str]] | None = None,
    faults: Mapping[int, Callable[[], object]] | None = None,
    ranks: int = 2,
) -> tuple[list[int | None], float, str]:
    """Exit codes, seconds and screens of a run.

    Arguments:
        own: overrides of single ranks.
        faults: what is called in single ranks before they train.
    """
    output.mkdir(parents=True, exist_ok=True)
    log, port = output.with_name(f"{output.name}.log"), free_port()
    log.unlink(missing_ok=True)
    started = time.monotonic()
    processes = [
        fork_rank(
            [*SMALL, f"run.output={output}", *overrides, *(own or {}).get(rank, ())],
            variables_of(rank, ranks, port),
            log,
            log,
            (faults or {}).get(rank),
        )
        for rank in range(ranks)
    ]
    in_time = all_end(processes, LIMIT)
    seconds = time.monotonic() - started
    assert in_time, f"hangs:\n{log.read_text()}"
    return [process.exitcode for process in processes], seconds, log.read_text()


def other_configuration(tmp_path: Path, override: str) -> Fault:
    """The last of three ranks was started with another value of a key."""
    codes, seconds, said = run_with(tmp_path / "run", own={2: [override]}, ranks=3)
    return Fault(f"a rank with another {override.partition('=')[0]}", codes, seconds, said)


def other_documents(tmp_path: Path) -> Fault:
    """One rank's files hold other text."""
    for rank in range(2):
        (tmp_path / f"{rank}.txt").write_text(f"On machine {rank} the file says something else. " * 200)
    files = {rank: [f"data.files=[{tmp_path / f'{rank}.txt'}]"] for rank in range(2)}
    common = ("data=text", f"data.cache={tmp_path / 'cache'}", "data.tokenizer=bytes")
    codes, seconds, said = run_with(tmp_path / "run", common, own=files)
    return Fault("a rank with other documents", codes, seconds, said)


def other_code(tmp_path: Path) -> Fault:
    """One rank runs another version of the package."""
    codes, seconds, said = run_with(tmp_path / "run", faults={1: _change_code})
    return Fault("a rank with other code", codes, seconds, said)


def _change_code() -> None:
    from ringattn.training.start import agreement

    right = agreement.code_version()
    name = "the code ringattn/training/loop.py"
    agreement.code_version = lambda: right | {name: "0123456789ab"}  # type: ignore[assignment]


def refused_rank(tmp_path: Path) -> Fault:
    """A rank other than 0 cannot start."""
    codes, seconds, said = run_with(tmp_path / "run", own={1: ["run.steps=-3"]})
    return Fault("a rank that refuses to start", codes, seconds, said)


def absent_rank(tmp_path: Path) -> Fault:
    """One of the ranks never comes."""
    codes, seconds, said = run_with(tmp_path / "run", ["run.start_timeout=2"], faults={1: partial(time.sleep, 6)})
    return Fault("a rank that never comes", codes, seconds, said)


def second_run(tmp_path: Path) -> Fault:
    """Somebody starts the same command again while it trains."""
    output, log, port = tmp_path / "run", tmp_path / "first.log", free_port()
    overrides = [*SMALL, f"run.output={output}", "run.steps=100000", "run.save_every=0"]
    first = [fork_rank(overrides, variables_of(rank, 2, port), log, log) for rank in range(2)]
    try:
        deadline = time.monotonic() + LIMIT
        while not (output / "metrics.jsonl").exists():
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        codes, seconds, said = run_with(output, ["run.steps=100000", "run.save_every=0"])
        assert all(rank.exitcode is None for rank in first), "the first run goes on"
    finally:
        for rank in first:
            rank.kill()
            rank.join()
    return Fault("a second run in the same folder", codes, seconds, said)


def other_batch(tmp_path: Path, step: int = 4) -> Fault:
    """From a step on one rank reads other packs than it should."""
    output = tmp_path / "run"
    codes, _, said = run_with(
        output, ["parallel.data=2", "run.save_every=2"], faults={1: partial(_read_other_packs, output, step)}
    )
    seconds = _seconds_to(output, "disagreement")
    return Fault("a rank with another batch", codes, seconds, said, _lost(output, step))


def _read_other_packs(output: Path, step: int) -> None:
    from ringattn.training.packs.packing import Packer

    right, count = Packer.step, 0

    def other(self: Packer, packs: int) -> Any:
        nonlocal count
        count += 1
        if count == step:
            _mark(output)
            right(self, packs)  # passes one batch over
        return right(self, packs)

    Packer.step = other  # type: ignore[method-assign]


def other_learning_rate_later(tmp_path: Path, step: int = 5) -> Fault:
    """From a step on one rank has another learning rate."""
    output = tmp_path / "run"
    codes, _, said = run_with(output, ["run.save_every=2"], faults={1: partial(_change_rate, output, step)})
    seconds = _seconds_to(output, "disagreement")
    return Fault("a rank whose learning rate changes", codes, seconds, said, _lost(output, step))


def _change_rate(output: Path, step: int) -> None:
    from ringattn.training.schedule import Schedule

    right = Schedule.__call__

    def other(self: Schedule, number: int) -> float:
        if number < step - 1:
            return right(self, number)
        _mark(output)
        return right(self, number) * 1.01

    Schedule.__call__ = other  # type: ignore[method-assign]


def bad_gradient(tmp_path: Path, steps: Sequence[int], *overrides: str) -> Fault:
    """In some steps one rank's gradient is NaN."""
    output = tmp_path / "run"
    codes, _, said = run_with(
        output,
        ["run.save_every=2", "run.steps=10", *overrides],
        faults={1: partial(_spoil, output, tuple(steps), True)},
    )
    seconds = _seconds_to(output, "bad-numbers")
    return Fault("NaN in one rank's gradient", codes, seconds, said, _lost(output, steps[-1]) if codes[0] else 0)


def bad_activation(tmp_path: Path, steps: Sequence[int], *overrides: str) -> Fault:
    """In some steps a module of one rank gives an infinite number, in the last of its tokens."""
    output = tmp_path / "run"
    codes, _, said = run_with(
        output,
        ["run.save_every=2", "run.steps=10", *overrides],
        faults={1: partial(_spoil, output, tuple(steps), False)},
    )
    seconds = _seconds_to(output, "bad-numbers")
    return Fault("an infinite number in one rank's forward pass", codes, seconds, said, 0 if not codes[0] else None)


def _spoil(output: Path, steps: tuple[int, ...], gradient: bool) -> None:
    """Breaks the second layer's MLP in the steps (from 1), each time that their passes are done."""
    from ringattn.hf.layers import mlps_of
    from ringattn.training.loop import Trainer

    made = Trainer.__init__

    def init(self: Trainer, *given: Any) -> None:
        made(self, *given)

        def after(module: Any, given: Any, result: Any) -> Any:
            if self.step + 1 not in steps:
                return result
            _mark(output)
            if gradient and result.requires_grad:
                result.register_hook(lambda found: found * float("nan"))
                return result
            if not gradient:
                result = result.clone()
                result[:, -1] = float("inf")
            return result

        model = self.engine.model
        mlps_of(getattr(model, "module", model))[1].register_forward_hook(after)

    Trainer.__init__ = init  # type: ignore[method-assign]


def silent_fault(tmp_path: Path, *overrides: str) -> Fault:
    """In one of the two computations of step 6 one rank's layer gives other numbers."""
    output = tmp_path / "run"
    codes, _, said = run_with(
        output, ["run.save_every=2", "run.recompute_every=3", *overrides], faults={1: partial(_compute_wrong, output)}
    )
    return Fault("one rank computes wrong, once", codes, _seconds_to(output, "silent-fault"), said, _lost(output, 6))


def _compute_wrong(output: Path) -> None:
    from ringattn.hf.layers import mlps_of
    from ringattn.training.loop import Trainer

    made, count = Trainer.__init__, 0

    def init(self: Trainer, *given: Any) -> None:
        made(self, *given)

        def after(module: Any, given: Any, result: Any) -> Any:
            nonlocal count
            if self.step != 5 or count:
                return result
            count += 1
            _mark(output)
            return result * 1.5

        mlps_of(self.engine.model)[1].register_forward_hook(after)

    Trainer.__init__ = init  # type: ignore[method-assign]


def slow_rank(tmp_path: Path, seconds: float = 0.2) -> Fault:
    """One rank sleeps in every forward pass."""
    output = tmp_path / "run"
    codes, _, said = run_with(
        output, ["run.straggler_every=10", "run.steps=11", "run.save_every=0"], faults={1: partial(_sleep, seconds)}
    )
    return Fault("a slow rank", codes, 0.0, said, None, {"after_steps": 10})


def _sleep(seconds: float) -> None:
    from ringattn.training.loop import Trainer

    right = Trainer._forward

    def forward(self: Trainer, *given: Any) -> Any:
        time.sleep(seconds)
        return right(self, *given)

    Trainer._forward = forward  # type: ignore[method-assign]


def slow_link(tmp_path: Path, seconds: float = 0.05) -> Fault:
    """Messages between two of four ranks take long. Each rank waits as long as the others."""
    output = tmp_path / "run"
    overrides = ["run.straggler_every=4", "run.steps=5", "run.save_every=0", "parallel.ring=4"]
    delay = partial(_delay_link, seconds)
    codes, _, said = run_with(output, overrides, faults={1: delay, 3: delay}, ranks=4)
    return Fault("a slow link", codes, 0.0, said, None, {"after_steps": 4})


def _delay_link(seconds: float) -> None:
    from ringattn.training.checks import links

    right = links._exchange

    def exchange(out: Any, into: Any, peer: int, group: Any) -> float:
        late = (peer in (1, 3) and seconds) or 0.0
        time.sleep(late)
        return right(out, into, peer, group) + late

    links._exchange = exchange


def _mark(output: Path) -> None:
    """Notes when a fault happens first."""
    path = output.with_name(f"{output.name}.fault")
    if not path.exists():
        path.write_text(repr(time.time()))


def _seconds_to(output: Path, kind: str) -> float:
    """From the fault to the record of it."""
    record = next(one for one in read_incidents(output) if one["kind"] == kind)
    happened = float(output.with_name(f"{output.name}.fault").read_text())
    return datetime.fromisoformat(record["time"]).timestamp() - happened


def _lost(output: Path, step: int) -> int:
    """Steps before the fault's that no checkpoint holds."""
    found = complete_checkpoints(output / "checkpoints")
    return step - 1 - (int(found[-1].name.removeprefix("step-")) if found else 0)

"""Batches made ahead, in a thread or in a process: the same, with plans once the model is known, and no orphan."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from ringattn import Layout, Mask, MeshShape, parallel_attention
from ringattn.parallel.mesh.mesh import SequenceMesh
from ringattn.parallel.planning import planner
from ringattn.parallel.planning.ahead import from_bytes, to_bytes
from ringattn.recurrent import halo_plan, parallel_convolution, parallel_recurrence, recurrence
from ringattn.training.data.corpus import Corpus, corpus_of
from ringattn.training.model.flops import StepFlops
from ringattn.training.packs.ahead import BatchesAhead
from ringattn.training.packs.grouping import DocumentCost, GroupedPacker
from ringattn.training.packs.making_process import MakingProcess, _pickled
from ringattn.training.packs.packing import Packer
from ringattn.training.packs.placing import BatchMaker
from tests.parallel.ranks import mesh_of
from tests.pool import Pools

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[3]


class Ended(Packer):
    """One whose stream breaks at the third step."""

    def step(self, packs: int):
        if self.position.index > 3:
            raise OSError("the disk is gone")
        return super().step(packs)


class Odd(Exception):
    """One that cannot be made again from what a pickle holds."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def maker_on(mesh: SequenceMesh, packer: type[Packer] = Packer) -> BatchMaker:
    corpus = corpus_of([np.arange(100 + length) % 251 for length in range(40)], 256)
    return BatchMaker(packer(corpus, 300, seed=3), 2, 0, 1, mesh, "auto", None)


def layers_on(layout: Layout) -> torch.Tensor:
    """One of attention, one that carries a state and its convolution."""
    x = torch.ones(layout.tokens(), 2, 8, requires_grad=True)
    out = parallel_attention(x, x, x, layout, mask=Mask(window=(50, 0)))
    out = parallel_convolution(out.flatten(1), torch.ones(16, 4), None, layout).view_as(x)
    out = parallel_recurrence(x, x, out, layout, decay=-x[..., 0])
    out.sum().backward()
    return out.detach()


@contextmanager
def plans_made_here() -> Iterator[list[object]]:
    """The layouts that are planned in this thread, others may plan as well."""
    made: list[object] = []
    thread = threading.get_ident()

    def noting(plan: Any) -> Any:
        def noted(layout: Layout, *args: object) -> object:
            if threading.get_ident() == thread:
                made.append(layout)
            return plan(layout, *args)

        return noted

    with ExitStack() as stack:
        for place, name in ((planner, "_plans"), (recurrence, "_plan"), (halo_plan, "_make")):
            stack.enter_context(mock.patch.object(place, name, noting(getattr(place, name))))
        yield made


def batches_of(place: str) -> list[tuple[object, ...]]:
    """What five steps were given, how many plans its layers had to make, and what it computed."""
    mesh, seen = mesh_of(1, 1), []
    with BatchesAhead(maker_on(mesh), mesh, CPU, 1, place) as stream:
        for _ in range(5):
            batch = next(stream)
            with plans_made_here() as made:
                outs = [layers_on(local.layout) for local in batch.micro]
            tensors = [x.tolist() for one in batch.micro for x in (one.ids, one.targets, one.positions)]
            counts = [local.count for local in batch.micro]
            assert counts == [int((local.targets >= 0).sum()) for local in batch.micro]
            seen.append((tensors, [out.tolist() for out in outs], batch.position, batch.epoch, len(made)))
    return seen


def test_a_process_makes_what_a_thread_makes(pool: Pools) -> None:
    steps = {place: pool(1).run(batches_of, place)[0] for place in ("thread", "process", "auto")}
    assert [step[:-1] for step in steps["process"]] == [step[:-1] for step in steps["thread"]]
    assert [step[:-1] for step in steps["auto"]] == [step[:-1] for step in steps["thread"]]
    for place in steps:
        planned = [step[-1] for step in steps[place]]
        assert planned[0] == 3 * 2, "nobody knows the model before its first step of two packs"
        assert planned[-1] == (0 if place == "process" else 3 * 2), "a process plans, a thread leaves that to the loop"


def mixers_after_steps() -> list[int]:
    """How many of them are asked for at each step."""
    mesh, found = mesh_of(1, 1), []
    maker = maker_on(mesh)
    with BatchesAhead(maker, mesh, CPU, 1, "process") as stream:
        for _ in range(4):
            for local in next(stream).micro:
                layers_on(local.layout)
            found.append(len(maker.mixers))
    return found


def test_what_is_asked_for_does_not_grow_with_the_steps(pool: Pools) -> None:
    assert pool(1).run(mixers_after_steps)[0] == [0, 3, 3, 3]


@contextmanager
def a_process(packer: type[Packer] = Packer) -> Iterator[MakingProcess]:
    mesh = mesh_of(1, 1)
    process = MakingProcess(maker_on(mesh, packer), mesh)
    try:
        yield process
    finally:
        process.close()


def error_of_a_step() -> str:
    with a_process(Ended) as process:
        batches = process.batches()
        next(batches)
        with pytest.raises(OSError, match="the disk is gone") as caught:
            list(batches)
    return "".join(caught.value.__notes__)


def test_an_error_in_the_process_is_raised_in_the_loop(pool: Pools) -> None:
    note = pool(1).run(error_of_a_step)[0]
    assert "in the process that makes batches ahead" in note
    assert "in step" in note


def test_errors_arrive_whether_they_can_be_pickled_or_not() -> None:
    for error, kind, text in ((OSError("full"), OSError, "full"), (Odd(1, 2), RuntimeError, "Odd: 1 and 2")):
        _, found = from_bytes(_pickled(error), MeshShape())
        assert type(found) is kind
        assert str(found) == text
        assert "in the process" in found.__notes__[0]


def killed_and_signalled() -> tuple[int, str]:
    """How many batches came after signals that end other processes, and what is said when it is killed."""
    with a_process() as process:
        batches = process.batches()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):  # before it could look at them
            process._process.send_signal(number)
        came = len([next(batches) for _ in range(2)])
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            process._process.send_signal(number)
        came += len([next(batches) for _ in range(2)])
        process._process.kill()
        with pytest.raises(RuntimeError, match="exit code -9") as caught:
            next(batches)
        return came, str(caught.value)


def test_signals_are_the_parents_alone_and_its_end_is_told(pool: Pools) -> None:
    came, told = pool(1).run(killed_and_signalled)[0]
    assert came == 4
    assert told.startswith("the process that makes batches ahead ended")


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


PARENT = """
    import sys, time
    from tests.training.packs.test_ahead import maker_on
    from ringattn.training.packs.making_process import MakingProcess
    from ringattn import init_mesh
    mesh = init_mesh(device_type="cpu")
    process = MakingProcess(maker_on(mesh), mesh)
    next(process.batches())
    print(process._process.pid, flush=True)
    time.sleep(600)
"""


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks into /proc")
def test_it_dies_with_a_parent_that_is_killed() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PARENT)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        child = int(parent.stdout.readline())
        assert alive(child)
    finally:
        parent.kill()
        parent.wait()
    deadline = time.monotonic() + 10
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(child)


def test_closing_waits_for_nobody(pool: Pools) -> None:
    assert pool(1).run(seconds_to_close)[0] < 5


def seconds_to_close() -> float:
    """Of a process that has not even started, and of which a thread waits for a batch."""
    mesh = mesh_of(1, 1)
    with BatchesAhead(maker_on(mesh), mesh, CPU, 2, "process"):
        began = time.monotonic()
    return time.monotonic() - began


def test_a_corpus_on_disk_is_not_copied(tmp_path: Path) -> None:
    np.arange(100_000, dtype=np.uint16).tofile(tmp_path / "tokens.bin")
    tokens = np.memmap(tmp_path / "tokens.bin", np.uint16, mode="r")
    corpus = Corpus(tokens, np.array([0, 60_000, 100_000]), 2**16, "x")
    sent = to_bytes(corpus)
    assert len(sent) < 2000
    arrived = from_bytes(sent, MeshShape())
    assert np.array_equal(arrived.tokens, tokens)
    assert isinstance(arrived.tokens, np.memmap)
    assert arrived.read(1, 5, 9).tolist() == corpus.read(1, 5, 9).tolist()
    part = Corpus(tokens[100:200], np.array([0, 100]), 2**16, "y")
    assert from_bytes(to_bytes(part), MeshShape()).read(0, 0, 3).tolist() == [100, 101, 102]


def test_streams_of_equal_cost_can_be_sent() -> None:
    corpus = corpus_of([np.zeros(length, np.uint8) for length in range(5, 90)], 256)
    flops = StepFlops(1000, ((Mask(), 8),))
    packer = GroupedPacker(corpus, 64, 0, DocumentCost(flops.attention, flops.per_token), delay=2)
    packer.step(4)
    arrived = from_bytes(to_bytes(packer), MeshShape())
    assert [arrived.step(4) for _ in range(5)] == [packer.step(4) for _ in range(5)]

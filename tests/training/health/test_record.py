"""A rank's record is read as it was written, and costs next to nothing."""

import time
from pathlib import Path

import pytest
import torch
from torch import nn

from ringattn.training.health import places, processes
from ringattn.training.health.rank import Health, StopRequest
from ringattn.training.health.record import SIZE, Record, read_record


def record_in(folder: Path) -> tuple[Record, Path]:
    path = folder / "0-1.record"
    return Record.in_file(path, rank=3, world_size=8, local_rank=1, started=77), path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    record, path = record_in(tmp_path)
    assert path.stat().st_size == SIZE
    record.begin(12)
    record.at("forward pass")
    record.at("backward pass")
    record.at("forward pass")
    record.layer(5)
    record.comes_to("heads")
    record.comes_to("keys")
    record.computes(batch=2**64 - 1, plans=7, attempt=9)
    record.took(step=1.5, kernels=0.5)
    found = read_record(path)
    assert found is not None
    assert (found.rank, found.world_size, found.local_rank, found.started) == (3, 8, 1, 77)
    assert (found.step, found.micro_step, found.phase, found.layer) == (12, 2, "forward pass", 5)
    assert (found.attempt, found.batch, found.plans) == (9, 2**64 - 1, 7)
    assert (found.step_seconds, found.kernel_seconds) == (1.5, 0.5)
    assert (found.transfers, found.transfer) == (2, "keys")
    assert found.where() == "step 12, micro-step 2, forward pass, layer 5, its transfer 2 (keys)"
    assert abs(found.changed - time.monotonic()) < 100
    record.told()  # by a signal, in the middle of a layer
    assert read_record(path).where() == found.where()  # type: ignore[union-attr]
    record.layer(6)
    assert read_record(path).where() == "step 12, micro-step 2, forward pass, layer 6"  # type: ignore[union-attr]
    record.at("optimizer step")
    assert read_record(path).where() == "step 12, optimizer step"  # type: ignore[union-attr]


def test_the_first_failure_stays_and_is_cut_to_the_room_there_is(tmp_path: Path) -> None:
    record, path = record_in(tmp_path)
    record.failed("ä" * 5000)
    record.failed("another")
    found = read_record(path)
    assert found is not None
    assert found.phase == "failed"
    assert found.message.startswith("ää")
    assert len(found.message) < SIZE


def test_files_that_are_no_records_say_nothing(tmp_path: Path) -> None:
    path = tmp_path / "0-1.record"
    assert read_record(path) is None
    for data in (b"", b"x" * SIZE, b"RAH2" + b"\xff" * (SIZE - 4)):
        path.write_bytes(data)
        assert read_record(path) is None


def test_a_request_to_stop_is_in_the_record(tmp_path: Path) -> None:
    import os
    import signal

    record, path = record_in(tmp_path)
    with StopRequest(record) as stop:
        assert read_record(path).listens  # type: ignore[union-attr]
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.requested
        assert read_record(path).told  # type: ignore[union-attr]
    assert not read_record(path).listens  # type: ignore[union-attr]


class Model(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(layers))
        self.config = type("Config", (), {"get_text_config": lambda config: config, "num_hidden_layers": layers})()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("compiled", [False, True])
def test_layers_are_followed_forwards_and_backwards_where_they_are_not_compiled(compiled: bool) -> None:
    seen: list[int] = []
    health = Health()
    health.record.layer = seen.append  # type: ignore[method-assign]
    model = Model(3)
    if compiled:
        model.layers[1].compile(backend="eager")
    health.watch_layers(model)
    model(torch.randn(2, 4, requires_grad=True)).sum().backward()
    assert seen == ([0, 2, 2, 0] if compiled else [0, 1, 2, 2, 1, 0])


def test_a_model_without_layers_is_not_followed() -> None:
    model = Model(3)
    model.config.num_hidden_layers = 4
    Health().watch_layers(model)
    assert not any(layer._forward_pre_hooks for layer in model.layers)


def test_a_write_takes_microseconds() -> None:
    """A step of a model of 32 layers and 4 micro-steps writes some 600 times: at 20 µs each (here it takes one), and
    steps of seconds, that is far below 0.2 %."""
    record = Record()
    took = []
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(1000):
            record.layer(3)
        took.append((time.perf_counter() - began) / 1000)
    assert min(took) < 20e-6


def test_processes_are_known_by_when_they_began() -> None:
    import os

    began = processes.started(os.getpid())
    assert processes.state(os.getpid(), began) == processes.ALIVE
    if began:
        assert processes.state(os.getpid(), began + 1) == processes.GONE
    assert processes.state(2**22 + 1, 0) == processes.GONE
    assert processes.out_of_memory_kills() >= 0


def test_of_files_that_may_be_written_once_the_first_stays(tmp_path: Path) -> None:
    path = tmp_path / "health" / "verdict.json"
    assert places.write_json(path, {"by": 0}, first=True)
    assert not places.write_json(path, {"by": 1}, first=True)
    assert places.read_json(path) == {"by": 0}
    assert places.write_json(path, {"by": 2})
    assert places.read_json(path) == {"by": 2}
    assert [one.name for one in path.parent.iterdir()] == ["verdict.json"]
    path.write_text("[")
    assert places.read_json(path) is None
    assert not places.write_json(path / "below", {})

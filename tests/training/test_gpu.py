"""What lives between steps, on GPUs."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from ringattn.memory.settings import StateSettings
from ringattn.training.checkpoint.host_copy import HostCopy
from ringattn.training.checkpoint.snapshot import snapshot_of
from ringattn.training.engines import build_engine
from tests.parallel.ranks import mesh_of
from tests.pool import Pools
from tests.training.checkpoint.late import differing
from tests.training.parts import load_parts, save_parts
from tests.training.test_states import SMALL, distance, options_of, train


def curve_on_gpus(ranks: int, states: StateSettings, folder: Path | None = None) -> list[tuple[float, float]]:
    """A run in bfloat16, its step compiled; it is written and read again in the middle where a folder is given."""
    torch.manual_seed(0)
    mesh = mesh_of(ranks, 1, "cuda")
    given: dict[str, Any] = {"dtype": torch.bfloat16}
    engine = build_engine("fsdp2", mesh, options_of(mesh, states, **given))
    found = train(engine, mesh, 0, 6)
    if folder is not None:
        save_parts(engine, folder)
        engine = build_engine("fsdp2", mesh, options_of(mesh, states, **given))
        load_parts(engine, folder)
    return found + train(engine, mesh, 6, 12)


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.gpu), pytest.param(2, marks=pytest.mark.gpu(2))])
def test_states_on_gpus(pool: Pools, tmp_path: Path, ranks: int) -> None:
    """NCCL cannot reduce what is on the host, which gloo hides, and optimizers have other kernels there.

    Where weights are in float32 these are the whole difference. Otherwise limits are twice those of the CPU.
    """
    workers = pool(ranks, "cuda")
    expected = workers.run(curve_on_gpus, ranks, StateSettings(), timeout=300)[0]
    assert expected[-1][0] < expected[0][0] - 1
    for number, (settings, limit) in enumerate(
        [
            (StateSettings(states_on="host"), 0.005),
            (StateSettings(reshard=False, prefetch=2), 0.005),
            (StateSettings(prefetch=0), 0.005),
            *((settings, 2 * limit) for settings, limit in SMALL.values()),
            (StateSettings(weights="bfloat16", moments="int8", states_on="host"), 0.04),
        ]
    ):
        if settings.moments != "float32":
            pytest.importorskip("torchao")
        folder = tmp_path / str(number)
        folder.mkdir()
        found = workers.run(curve_on_gpus, ranks, settings, folder, timeout=300)[0]
        assert distance(found, expected) < limit, settings


def late(copy: HostCopy) -> Callable[[], None]:
    """The copy that comes next begins when its stream has slept for about a second."""
    assert copy._stream is not None
    with torch.cuda.stream(copy._stream._stream):
        torch.cuda._sleep(2 * 10**9)
    return lambda: None


def is_under_way(copy: HostCopy) -> bool:
    return copy._stream is not None and not copy._stream._over.query()


@pytest.fixture
def host_copy() -> Iterator[HostCopy]:
    made = HostCopy(torch.device("cuda"))
    yield made
    made.close()


@pytest.mark.gpu
def test_a_copy_for_the_thread_is_of_its_moment(host_copy: HostCopy) -> None:
    """Page-locked, so that the device fills it beside its kernels: after those that came before, while nobody waits,
    and before those that come after `hold`."""
    device = torch.device("cuda")
    tensors = {
        "a": torch.rand(9 << 20, device=device),  # more than is copied at a time
        "b": torch.ones(3, 5, device=device, dtype=torch.bfloat16).T,
    }
    host_copy.take_memory(snapshot_of(tensors))
    assert host_copy._locked
    host_copy.of(snapshot_of(tensors))  # a kernel that is used for the first time is loaded when the device has a rest
    host_copy.wait()
    for held in (True, False):
        expected = {name: (tensor + 1).cpu() for name, tensor in tensors.items()}
        late(host_copy)
        torch.cuda._sleep(10**8)
        for tensor in tensors.values():
            tensor.add_(1)
        found = host_copy.of(snapshot_of(tensors)).tensors
        assert is_under_way(host_copy)
        if held:
            host_copy.hold()
            assert is_under_way(host_copy)
        for tensor in tensors.values():
            tensor.zero_()
        host_copy.wait()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor) == held, "nothing would be seen of a wait that is missing"


@pytest.mark.gpu
def test_memory_that_is_copied_goes_to_nobody_else(host_copy: HostCopy) -> None:
    device = torch.device("cuda")
    torch.cuda.empty_cache()  # so that each tensor has a piece of its own
    weights = torch.rand(1 << 22, device=device)
    expected, place = weights.cpu(), weights.data_ptr()
    host_copy.take_memory(snapshot_of({"a": weights}))
    late(host_copy)
    found = host_copy.of(snapshot_of({"a": weights})).tensors["a"]
    del weights
    other = torch.zeros(1 << 22, device=device)
    assert is_under_way(host_copy)
    assert other.data_ptr() != place
    host_copy.wait()
    assert torch.equal(found, expected)
    assert torch.empty(1 << 22, device=device).data_ptr() == place, "it would not have been given to anybody"


@pytest.mark.gpu
@pytest.mark.parametrize("overrides", [(), ("memory.moments=int8",), ("memory.states_on=host",), ("optim=muon",)])
def test_a_run_saves_beside_its_next_step(pool: Pools, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    if "memory.moments=int8" in overrides:
        pytest.importorskip("torchao")
    given = ("data.seq_len=4096", *overrides)
    count, names = pool(1, "cuda").run(differing, tmp_path / "held", late, True, *given, timeout=300)[0]
    assert count > 90
    assert names == set()
    if not overrides:
        _, names = pool(1, "cuda").run(differing, tmp_path / "loose", late, False, *given, timeout=300)[0]
        assert any(name.endswith("exp_avg") for name in names), "nothing would be seen of a wait that is missing"

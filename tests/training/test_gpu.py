"""What lives between steps, on GPUs."""

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


@pytest.mark.gpu
def test_a_copy_for_the_thread_is_of_its_moment() -> None:
    """Page-locked, so that the device fills it at the speed of its link, and filled when the call returns."""
    device = torch.device("cuda")
    tensors = {"a": torch.rand(1 << 20, device=device), "b": torch.ones(3, 5, device=device, dtype=torch.bfloat16).T}
    expected = {name: tensor.cpu() for name, tensor in tensors.items()}
    copy = HostCopy(device)
    copy.take_memory(snapshot_of(tensors))
    found = copy.of(snapshot_of(tensors)).tensors
    for tensor in tensors.values():
        tensor.zero_()
    torch.cuda.synchronize()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor)
    assert copy._locked
    copy.close()

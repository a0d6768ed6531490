"""Tile candidates fit the device they are for (FEATURES rows 58 to 60)."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import FlexKernelOptions

from ringattn.kernels.backends.cpu import CpuFlash
from ringattn.kernels.spec import CallSpec
from ringattn.kernels.tuning import tuned_backend
from ringattn.kernels.tuning.measured import MeasuredCall
from ringattn.kernels.tuning.tiles import MOST, Tile, shared_memory_limit, tiles, tiles_here
from ringattn.kernels.tuning.tuner import Event, Tuner

SPEC = CallSpec("cuda", torch.bfloat16, 128, 128, 32, 8)
KIB = 1024


def device(kib: int) -> SimpleNamespace:
    return SimpleNamespace(shared_memory_per_block=48 * KIB, shared_memory_per_block_optin=kib * KIB)


@pytest.fixture(autouse=True)
def no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RINGATTN_SHARED_MEMORY_KIB", raising=False)


def test_row_58_preferred_tiles() -> None:
    chosen = {(kib, dim): tiles(dim, dim, 2, kib * KIB, 8192)[0] for kib in (48, 99, 227) for dim in (64, 128, 256)}
    assert chosen == {
        (48, 64): Tile(128, 128, 1, 8),
        (48, 128): Tile(64, 64, 1, 4),
        (48, 256): Tile(32, 32, 1, 4),
        (99, 64): Tile(128, 128, 2, 8),
        (99, 128): Tile(128, 128, 1, 8),
        (99, 256): Tile(64, 64, 1, 4),
        (227, 64): Tile(128, 128, 3, 8),
        (227, 128): Tile(128, 128, 3, 8),
        (227, 256): Tile(128, 128, 1, 8),
    }


def test_row_59_candidates_are_the_same_every_time_and_few() -> None:
    lists = [tiles(64, 64, 2, 227 * KIB, 8192) for _ in range(3)]
    assert lists[0] == lists[1] == lists[2]
    assert len(lists[0]) == len(set(lists[0])) == MOST


def test_row_60_devices_have_different_candidates() -> None:
    small, middle, large = (tiles(128, 128, 2, shared_memory_limit(device(kib)), 8192) for kib in (48, 99, 227))
    assert small != middle != large
    assert set(small) < {tile for tile in [*middle, *small] if tile.shared_memory(128, 128, 2) <= 99 * KIB}
    for found, kib in ((small, 48), (middle, 99), (large, 227)):
        assert found
        assert all(tile.shared_memory(128, 128, 2) <= kib * KIB for tile in found)
    assert max(tile.block_k for tile in large) == 128  # not the 64 that a limit of 99 KiB would leave
    assert Tile(128, 128, 3, 8).shared_memory(128, 128, 2) == (128 * 128 + 3 * 128 * 256) * 2


def test_row_60_the_environment_lowers_and_never_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RINGATTN_SHARED_MEMORY_KIB", "64")
    assert shared_memory_limit(device(227)) == 64 * KIB
    assert shared_memory_limit(device(48)) == 48 * KIB
    monkeypatch.setenv("RINGATTN_SHARED_MEMORY_KIB", "64 KiB")
    with pytest.raises(ValueError, match="RINGATTN_SHARED_MEMORY_KIB"):
        shared_memory_limit(device(227))


def test_row_60_a_device_without_an_opt_in_has_what_it_has() -> None:
    assert shared_memory_limit(SimpleNamespace(shared_memory_per_block=64 * KIB)) == 64 * KIB


def test_row_59_tiles_are_not_longer_than_documents() -> None:
    assert {max(tile.block_q, tile.block_k) for tile in tiles(64, 64, 2, 227 * KIB, 33)} == {16, 32}
    assert tiles(64, 64, 2, 227 * KIB, 0)


def test_row_60_a_head_dim_that_fits_no_tile_has_none() -> None:
    assert tiles(4096, 4096, 4, 48 * KIB, 64) == []


def test_row_60_tiles_are_of_cuda_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: device(99))
    assert tiles_here(SPEC, 8192) == tiles(128, 128, 2, 99 * KIB, 8192)
    assert tiles_here(replace(SPEC, device="cpu"), 8192) == []


@pytest.mark.parametrize("tile", tiles(64, 64, 2, 227 * KIB, 8192))
def test_row_75_kernel_options_are_what_the_kernel_takes(tile: Tile) -> None:
    """Its backward kernels walk the outer tile in whole inner ones, and its masks are in tiles of 128."""
    options = tile.kernel_options()
    assert options["bwd_BLOCK_N1"] % options["bwd_BLOCK_M1"] == options["bwd_BLOCK_M2"] % options["bwd_BLOCK_N2"] == 0
    assert all(128 % value == 0 for name, value in options.items() if "BLOCK" in name)
    assert {name.partition("_")[2] for name in options if "BLOCK" in name} | {"num_stages", "num_warps"} <= set(
        FlexKernelOptions.__annotations__
    )
    assert Tile(**tile.choice()) == tile


class TiledFlex(CpuFlash):
    """Stands for FlexAttention where it cannot run: tiles of three stages are wrong, one is quick."""

    eager = False

    def __init__(self, kernel_options: dict[str, int] | None = None) -> None:
        self.name, self.options = "flex", kernel_options or {}

    def forward(self, *args: Any) -> torch.Tensor:
        lse = super().forward(*args)
        return lse + (self.options.get("num_stages") == 3)


def test_row_63_a_tile_with_wrong_numbers_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are timed, and the quickest becomes the backend's."""
    quick = Tile(64, 64, 2, 4)
    monkeypatch.setattr(tuned_backend, "FlexAttention", TiledFlex)
    monkeypatch.setattr(
        tuned_backend, "tiles_here", lambda spec, longest: [Tile(128, 64, 3, 4), quick, Tile(64, 64, 1, 4)]
    )
    monkeypatch.setattr(tuned_backend, "choose", lambda spec, name: TiledFlex())
    ran: list[dict[str, int]] = []
    monkeypatch.setattr(MeasuredCall, "run", lambda self, backend: ran.append(backend.options))
    tuned_backend._with_tile.cache_clear()
    events: list[Event] = []
    tuner = Tuner(None, "on", [events.append], lambda run, device: run() or cost(ran[-1], quick))
    monkeypatch.setattr(tuned_backend, "tuner", lambda: tuner)
    spec = CallSpec("cpu", torch.float32, 16, 16, 4, 2)
    backend: Any = tuned_backend.tuned_backend(spec, [64], name="flex")
    assert backend.options == quick.kernel_options()
    assert [event.kind for event in events] == ["timed", "refused", "timed", "timed", "measured"]
    assert ran[0] == {}  # torch's own choice is a candidate
    tuned_backend._with_tile.cache_clear()


def cost(options: dict[str, int], quick: Tile) -> float:
    return 1.0 if options == quick.kernel_options() else 2.0

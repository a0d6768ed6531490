"""Tile candidates fit the device that they are for."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention.flex_attention import FlexKernelOptions

from ringattn.kernels.spec import CallSpec
from ringattn.kernels.tuning.tiles import MOST, Tile, shared_memory_limit, tiles, tiles_here

SPEC = CallSpec("cuda", torch.bfloat16, 128, 128, 32, 8)
KIB = 1024


def device(kib: int) -> SimpleNamespace:
    return SimpleNamespace(shared_memory_per_block=48 * KIB, shared_memory_per_block_optin=kib * KIB)


@pytest.fixture(autouse=True)
def no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RINGATTN_SHARED_MEMORY_KIB", raising=False)


def test_the_preferred_tile_fills_the_shared_memory() -> None:
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


def test_candidates_are_the_same_every_time_and_few() -> None:
    lists = [tiles(64, 64, 2, 227 * KIB, 8192) for _ in range(3)]
    assert lists[0] == lists[1] == lists[2]
    assert len(lists[0]) == len(set(lists[0])) == MOST


def test_devices_have_different_candidates() -> None:
    small, middle, large = (tiles(128, 128, 2, shared_memory_limit(device(kib)), 8192) for kib in (48, 99, 227))
    assert small != middle != large
    assert set(small) < {tile for tile in [*middle, *small] if tile.shared_memory(128, 128, 2) <= 99 * KIB}
    for found, kib in ((small, 48), (middle, 99), (large, 227)):
        assert found
        assert all(tile.shared_memory(128, 128, 2) <= kib * KIB for tile in found)
    assert max(tile.block_k for tile in large) == 128  # not the 64 that a limit of 99 KiB would leave
    assert Tile(128, 128, 3, 8).shared_memory(128, 128, 2) == (128 * 128 + 3 * 128 * 256) * 2


def test_the_environment_lowers_and_never_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RINGATTN_SHARED_MEMORY_KIB", "64")
    assert shared_memory_limit(device(227)) == 64 * KIB
    assert shared_memory_limit(device(48)) == 48 * KIB
    monkeypatch.setenv("RINGATTN_SHARED_MEMORY_KIB", "64 KiB")
    with pytest.raises(ValueError, match="RINGATTN_SHARED_MEMORY_KIB"):
        shared_memory_limit(device(227))


def test_a_device_without_an_opt_in_has_what_it_has() -> None:
    assert shared_memory_limit(SimpleNamespace(shared_memory_per_block=64 * KIB)) == 64 * KIB


def test_tiles_are_not_longer_than_documents() -> None:
    assert {max(tile.block_q, tile.block_k) for tile in tiles(64, 64, 2, 227 * KIB, 33)} == {16, 32}
    assert tiles(64, 64, 2, 227 * KIB, 0)


def test_a_head_dim_that_fits_no_tile_has_none() -> None:
    assert tiles(4096, 4096, 4, 48 * KIB, 64) == []


def test_tiles_are_of_cuda_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: device(99))
    assert tiles_here(SPEC, 8192) == tiles(128, 128, 2, 99 * KIB, 8192)
    assert tiles_here(replace(SPEC, device="cpu"), 8192) == []


@pytest.mark.parametrize("tile", tiles(64, 64, 2, 227 * KIB, 8192))
def test_kernel_options_are_what_the_kernel_takes(tile: Tile) -> None:
    """Its backward kernels walk the outer tile in whole inner ones, and its masks are in tiles of 128."""
    options = tile.kernel_options()
    assert options["bwd_BLOCK_N1"] % options["bwd_BLOCK_M1"] == options["bwd_BLOCK_M2"] % options["bwd_BLOCK_N2"] == 0
    assert all(128 % value == 0 for name, value in options.items() if "BLOCK" in name)
    assert {name.partition("_")[2] for name in options if "BLOCK" in name} | {"num_stages", "num_warps"} <= set(
        FlexKernelOptions.__annotations__
    )
    assert Tile(**tile.choice()) == tile

"""What is saved comes back on any number of ranks, in a format that runs nothing when it is read."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ringattn.training.checkpoint.marker import BadCheckpoint, FileSum
from ringattn.training.checkpoint.saved_state import SavedState, part_name, write_part
from ringattn.training.checkpoint.snapshot import is_blocked, snapshot_of
from ringattn.training.checkpoint.tensors import check_sum, open_tensors, sum_of, write_tensors
from tests.pool import Pools

SIZES = [(7, 3), (2, 5), (1,), (16, 64), (5,)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8, torch.int64, torch.bool]
DTYPES += [torch.float8_e4m3fn]


def test_any_tensor_comes_back_bit_by_bit(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {"empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5)}
    for dtype in DTYPES:
        numbers = torch.randint(0, 2, (3, 5), generator=generator, dtype=torch.int64)
        tensors[f"of {dtype}"] = numbers.to(dtype)
    tensors["of columns"] = torch.rand(4, 6, generator=generator).T
    path = tmp_path / "a.safetensors"
    found = write_tensors(path, tensors, '{"é": 1}')
    assert found == sum_of(path)
    assert path.stat().st_size == found.size
    for name, tensor in load_file(path).items():
        assert torch.equal(tensor.float(), tensors[name].float()), name
        assert tensor.dtype == tensors[name].dtype
    file, index = open_tensors(path)
    assert index == '{"é": 1}'
    assert set(file.keys()) == set(tensors)
    with pytest.raises(FileExistsError):
        write_tensors(path, tensors, "")


@pytest.mark.parametrize("where", [0, 9, -1])
def test_a_turned_byte_is_seen_wherever_it_is(tmp_path, where):
    path = tmp_path / "a.safetensors"
    expected = write_tensors(path, {"a": torch.arange(100.0)}, "{}")
    check_sum(path, expected)
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadCheckpoint, match=r"a\.safetensors is damaged: its checksum is [0-9a-f]{8}, and was"):
        check_sum(path, expected)
    path.write_bytes(data[:-1])
    with pytest.raises(BadCheckpoint, match=r"a\.safetensors has 5\d\d bytes, "):
        check_sum(path, expected)


def test_a_tree_keeps_kinds_and_keys(tmp_path):
    tree = {"a": {0: [torch.ones(2), (1, 2.5, None)], "b/c": "text"}, "d": True, "e": float("inf"), "f": {}}
    write_part(tmp_path, 0, snapshot_of(tree))
    found = SavedState.of(tmp_path, 0).subtree("a")
    assert torch.equal(found[0][0], torch.ones(2))
    assert found[0][1] == (1, 2.5, None)
    assert found["b/c"] == "text"
    assert SavedState.of(tmp_path, 0).own("e") == float("inf")
    with pytest.raises(KeyError, match="nothing/here"):
        SavedState.of(tmp_path, 0).subtree("nothing", "here")
    with pytest.raises(TypeError, match=r"a checkpoint cannot hold a/b, a PosixPath"):
        snapshot_of({"a": {"b": Path()}})


def wholes() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {str(number): torch.rand(size, generator=generator) for number, size in enumerate(SIZES)}


def sharded(tensors: dict[str, Tensor]) -> dict[str, DTensor]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in tensors.items()}


def write_shards(folder: Path) -> None:
    write_part(folder, dist.get_rank(), snapshot_of({"x": sharded(wholes()), "y": torch.tensor(dist.get_rank())}))
    dist.barrier()


def read_shards(folder: Path) -> tuple[bool, int]:
    target = sharded({name: torch.zeros_like(tensor) for name, tensor in wholes().items()})
    plain = torch.tensor(-1)
    SavedState.of(folder, dist.get_rank()).fill("", {"x": target, "y": plain})
    found = {name: tensor.full_tensor() for name, tensor in target.items()}
    return all(torch.equal(found[name], whole) for name, whole in wholes().items()), int(plain)


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (4, 1), (1, 4), (4, 2), (2, 4)])
def test_any_number_of_ranks_reads_what_any_wrote(pool: Pools, tmp_path: Path, before: int, after: int) -> None:
    pool(before).run(write_shards, tmp_path)
    found = pool(after).run(read_shards, tmp_path)
    # What is not sharded is a rank's own, or else that of the first.
    assert found == [(True, rank if rank < before else 0) for rank in range(after)]


def test_what_does_not_fit_is_named(pool: Pools, tmp_path: Path) -> None:
    pool(2).run(write_shards, tmp_path)
    with pytest.raises(BadCheckpoint, match=r"x/0 has \[7, 3\], the run needs \[7, 4\]"):
        pool(2).run(misread, tmp_path, {"0": torch.zeros(7, 4)})
    with pytest.raises(BadCheckpoint, match=r"does not hold all of x/z"):
        pool(2).run(misread, tmp_path, {"z": torch.zeros(7, 4)})
    (tmp_path / part_name(1)).unlink()
    with pytest.raises(BadCheckpoint, match=r"does not hold all of x/0"):
        pool(1).run(misread, tmp_path, {"0": torch.zeros(7, 3)})


def misread(folder: Path, wanted: dict[str, Tensor]) -> None:
    SavedState.of(folder, dist.get_rank()).fill("", {"x": sharded(wanted)})


def eight_bits(start: int, rows: int, width: int) -> Any:
    """Rows of a tensor of 8 bits, the same whatever else is made."""
    from torchao.optim.subclass_8bit import OptimState8bit

    made = OptimState8bit.zeros((rows, width), True, 256)
    made.copy_(torch.stack([torch.sin(torch.arange(width) * 0.01 * (row + 1)) for row in range(start, start + rows)]))
    return made


def eight_bits_on_ranks(folder: Path, width: int, rows: int, write: bool) -> tuple[float, bool]:
    """Writes, or reads and compares: the largest difference to what was written, and whether codes are the same."""
    rank, count = dist.get_rank(), dist.get_world_size()
    mesh, each = init_device_mesh("cpu", (count,)), rows // count
    mine = eight_bits(rank * each, each, width)
    if write:
        local = mine
    else:
        from torchao.optim.subclass_8bit import OptimState8bit

        local = OptimState8bit.zeros((each, width), True, 256)
    whole = DTensor.from_local(local, mesh, [Shard(0)], shape=torch.Size([rows, width]), stride=(width, 1))
    if write:
        write_part(folder, rank, snapshot_of({"x": whole}))
        dist.barrier()
        return 0.0, True
    SavedState.of(folder, rank).fill("", {"x": whole})
    assert is_blocked(local)
    return float((local.dequantize() - mine.dequantize()).abs().max()), torch.equal(local.codes, mine.codes)


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 2), (4, 2)])
@pytest.mark.parametrize("width", [256, 64])
def test_moments_of_8_bits_stay_what_they_are(pool: Pools, tmp_path: Path, before: int, after: int, width: int) -> None:
    """Blocks of 256 numbers: one row, or four, of which a rank has whole ones here."""
    pytest.importorskip("torchao")
    pool(before).run(eight_bits_on_ranks, tmp_path, width, 16, True)
    assert pool(after).run(eight_bits_on_ranks, tmp_path, width, 16, False) == [(0.0, True)] * after


def of_other_bits(folder: Path, write: bool, eight: bool) -> float:
    """24 rows of 64 numbers, in 8 bits or float32: written, or read and compared."""
    rank, count = dist.get_rank(), dist.get_world_size()
    each = 24 // count
    wide = torch.cat([eight_bits(start, 4, 64).dequantize() for start in range(0, 24, 4)])[rank * each :][:each]
    if eight:
        from torchao.optim.subclass_8bit import OptimState8bit

        local: Any = OptimState8bit.zeros((each, 64), True, 256)
    else:
        local = torch.zeros(each, 64)
    if write:
        local.copy_(wide)
    mesh = init_device_mesh("cpu", (count,))
    whole = DTensor.from_local(local, mesh, [Shard(0)], shape=torch.Size([24, 64]), stride=(64, 1))
    if write:
        write_part(folder, rank, snapshot_of({"x": whole}))
        dist.barrier()
    else:
        SavedState.of(folder, rank).fill("", {"x": whole})
    return float(((local.dequantize() if eight else local) - wide).abs().max())


@pytest.mark.parametrize(("before", "after", "eight"), [(2, 4, True), (4, 2, False), (2, 2, True), (2, 2, False)])
def test_moments_change_their_bits_with_the_number_of_ranks(
    pool: Pools, tmp_path: Path, before: int, after: int, eight: bool
) -> None:
    """torchao keeps a shard in float32 whose blocks would not be whole: 6 rows of 64 numbers are a block and a half."""
    pytest.importorskip("torchao")
    pool(before).run(of_other_bits, tmp_path, True, eight)
    assert max(pool(after).run(of_other_bits, tmp_path, False, not eight)) < 1e-6


class Bomb:
    """Makes a folder where it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def test_a_pickle_in_the_place_of_a_part_is_not_run(tmp_path):
    """Even where somebody has put its size and checksum into the marker."""
    part, ran = tmp_path / part_name(0), tmp_path / "ran"
    for content in (pickle.dumps(Bomb(ran)), _torch_file(tmp_path, ran)):
        part.write_bytes(content)
        check_sum(part, FileSum(len(content), sum_of(part).crc32))
        with pytest.raises(BadCheckpoint, match=r"rank-00000\.safetensors is no file of a checkpoint"):
            SavedState.of(tmp_path, 0).own("random")
        assert not ran.exists()
    pickle.loads(pickle.dumps(Bomb(ran)))
    assert ran.exists(), "the bomb is none"


def _torch_file(folder: Path, ran: Path) -> bytes:
    path = folder / "bomb"
    torch.save(Bomb(ran), path)
    return path.read_bytes()

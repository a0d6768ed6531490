"""One device on its own: does its memory hold what is written, and are its products right, always and in time."""

import hashlib
import platform
import time
from typing import Any

import torch
from torch import Tensor

CHUNK = 1 << 28  # bytes that are written and compared at a time
PATTERNS = (0x5555555555555555, -0x5555555555555556, 0)  # 0101..., 1010..., and the address alone
SHARE = 0.9  # of the free memory of a GPU
CPU_BYTES = 1 << 26
SIDES = {"cuda": 8192, "cpu": 384}  # of the square factors
PRODUCTS = 12


def name_of(device: torch.device) -> str:
    """Devices of one name must compute the same bits."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _processor() or platform.machine()


def check_memory(device: torch.device) -> dict[str, Any]:
    """Writes patterns into most of the memory that is free, then reads all of it.

    Returns the bytes tested and the number of words that came back wrong.
    """
    size = int(SHARE * torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else CPU_BYTES
    words = min(CHUNK, size // 4) // 8
    count = size // (words * 8) - 2  # room for what is compared with
    chunks = [torch.empty(words, dtype=torch.int64, device=device) for _ in range(count)]
    wrong = 0
    for pattern in PATTERNS:
        for number, chunk in enumerate(chunks):
            _addresses(chunk, number, pattern)
        expected = torch.empty_like(chunks[0])
        for number, chunk in enumerate(chunks):
            _addresses(expected, number, pattern)
            if not torch.equal(chunk, expected):
                wrong += int((chunk != expected).sum())
        del expected
    return {"bytes": count * words * 8, "wrong": wrong}


def _addresses(chunk: Tensor, number: int, pattern: int) -> None:
    """Every word gets its own number, so that a word written elsewhere is seen too, with a pattern's bits turned."""
    torch.arange(number * chunk.numel(), (number + 1) * chunk.numel(), out=chunk)
    chunk.bitwise_xor_(pattern)


def check_product(device: torch.device) -> dict[str, Any]:
    """The same product of two matrices many times.

    Returns a digest of its bits, whether all were equal, and the seconds of the fastest after the first.
    """
    side = SIDES[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)  # on the host: the same factors for every device
    left, right = (torch.randn(side, side, generator=generator).to(device, dtype) for _ in range(2))
    first, same, times = left @ right, True, []
    for _ in range(PRODUCTS):
        _wait(device)
        begin = time.perf_counter()
        again = left @ right
        _wait(device)
        times.append(time.perf_counter() - begin)
        same = same and torch.equal(first, again)
    bits = first.view(torch.int16 if dtype == torch.bfloat16 else torch.int32).cpu().numpy().tobytes()
    flops = 2.0 * side**3
    return {"digest": hashlib.sha256(bits).hexdigest()[:16], "same": same, "seconds": min(times), "flops": flops}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _processor() -> str:
    """The CPU's name as Linux tells it."""
    try:
        with open("/proc/cpuinfo") as file:
            return next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "")
    except OSError:
        return ""

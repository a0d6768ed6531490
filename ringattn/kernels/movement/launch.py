"""Launching a Triton kernel that was compiled before, without the host time of finding it again.

Triton binds and specialises every argument at every launch: 20 to 40 µs of host time, more than a short kernel takes.
Here all that decides the variant is one tuple, and the variant is launched by itself. Imported only where triton is.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

_LARGEST = 2**31  # sizes from here on are another type to Triton

_compiled: dict[Hashable, Any] = {}


def launch(
    kernel: Any,
    grid: tuple[int, int],
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
    numbers: tuple[float, ...],
    constants: tuple[Any, ...],
) -> None:
    """Launch `kernel`, whose parameters are in this order: tensors, sizes, numbers, constants.

    Arguments:
        grid: programs.
        tensors: on one device; their dtypes and whether they begin at multiples of 16 bytes choose a variant.
        sizes: differ from call to call, and choose none: `do_not_specialize` in the kernel.
        numbers: each value that occurs is looked up, so they should be few, such as strides.
        constants: those of the kernel that are `tl.constexpr`.
    """
    index = tensors[0].get_device()
    arguments = *tensors, *sizes, *numbers, *constants
    # Triton's interpreter; and on AMD variants depend on more, such as the size of what a pointer belongs to.
    if index < 0 or torch.version.hip is not None:
        kernel[grid](*arguments)
        return
    key = (
        id(kernel),
        index,
        numbers,
        constants,
        *[x.dtype if x.data_ptr() % 16 == 0 else (x.dtype,) for x in tensors],
        *[size >= _LARGEST for size in sizes],
    )
    if index == torch.cuda.current_device():
        _launch(kernel, key, grid, arguments)
        return
    with torch.cuda.device(index):
        _launch(kernel, key, grid, arguments)


def _launch(kernel: Any, key: Hashable, grid: tuple[int, int], arguments: tuple[Any, ...]) -> None:
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = kernel[grid](*arguments)
    else:
        compiled[(*grid, 1)](*arguments)


def power_of_two(number: int) -> int:
    """The smallest one that is at least `number`; Triton's own function is slow on the host."""
    return 1 << (number - 1).bit_length()

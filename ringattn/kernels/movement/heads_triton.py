"""The packing and unpacking of `heads.py` as Triton kernels. Imported only where triton is."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ringattn.kernels.movement.launch import launch, power_of_two
from ringattn.kernels.movement.slots import MOST

TILE = 4096  # elements of one program


def pack_heads(tensors: Sequence[Tensor], message: Tensor, slots: Tensor, aligned: bool) -> None:
    """Heads of tensors (t, H, D) to the flat `message`.

    Arguments:
        slots: (n, 4) int64: tensor, head, start and stride of each.
        aligned: starts and strides are multiples of 8.
    """
    given, numbers, constants = _described(tensors, aligned)
    rows = tensors[0].shape[0]
    launch(_pack, (-(-rows // constants[1]), slots.shape[0]), (message, slots, *given), (rows,), numbers, constants)


def unpack_heads(message: Tensor, tensors: Sequence[Tensor], slots: Tensor, heads: Tensor, aligned: bool) -> None:
    """The way back; heads: (m, 4) int64: tensor, head, first and last of the slots that are added up."""
    given, numbers, constants = _described(tensors, aligned)
    rows = tensors[0].shape[0]
    grid = -(-rows // constants[1]), heads.shape[0]
    launch(_unpack, grid, (message, slots, heads, *given), (rows,), numbers, constants)


def _described(tensors: Sequence[Tensor], aligned: bool) -> tuple[list[Tensor], tuple[int, ...], tuple[int, int, int]]:
    """As many tensors as the kernels take; dim and strides of each; columns and rows of a program, and what all
    addresses are multiples of, in elements."""
    given = [*tensors, *[tensors[0]] * (MOST - len(tensors))]
    numbers = tuple(number for x in given for number in (x.shape[2], x.stride(0), x.stride(1)))
    width = power_of_two(max(numbers[::3]))
    vectors = aligned and not any(number % 8 for number in numbers[1::3] + numbers[2::3])
    vectors = vectors and not any(x.data_ptr() % 16 for x in tensors)
    return given, numbers, (width, max(1, TILE // width), 8 if vectors else 1)


@triton.jit
def _chosen(
    which, head,
    a, b, c, a_dim, a_row, a_head, b_dim, b_row, b_head, c_dim, c_row, c_head, ALIGN: tl.constexpr,
):  # fmt: skip
    """Pointer to a head, the stride of its rows, and its dim. What a branch decides, the compiler knows nothing about:
    that addresses are multiples has to be said again."""
    none = tl.full((), 0, tl.int64)  # numbers that are 1 come as constants
    base = a + head * a_head
    row = none + a_row
    dim = none + a_dim
    if which == 1:
        base = b + head * b_head
        row = none + b_row
        dim = none + b_dim
    elif which == 2:
        base = c + head * c_head
        row = none + c_row
        dim = none + c_dim
    if ALIGN > 1:
        base = tl.multiple_of(base, 16)
        row = tl.multiple_of(row, ALIGN)
    return base, row, dim


@triton.jit(do_not_specialize=["rows"])
def _pack(
    message, slots, a, b, c,
    rows,
    a_dim, a_row, a_head, b_dim, b_row, b_head, c_dim, c_row, c_head,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    slot = slots + tl.program_id(1) * 4
    base, stride, dim = _chosen(
        tl.load(slot), tl.load(slot + 1), a, b, c, a_dim, a_row, a_head, b_dim, b_row, b_head, c_dim, c_row, c_head,
        ALIGN,
    )  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    col = tl.arange(0, WIDTH)[None, :]
    inside = (row < rows) & (col < dim)
    part = tl.load(base + row * stride + col, mask=inside)
    start, step = tl.multiple_of(tl.load(slot + 2), ALIGN), tl.multiple_of(tl.load(slot + 3), ALIGN)
    tl.store(message + start + row * step + col, part.to(message.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _unpack(
    message, slots, heads, a, b, c,
    rows,
    a_dim, a_row, a_head, b_dim, b_row, b_head, c_dim, c_row, c_head,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    group = heads + tl.program_id(1) * 4
    base, stride, dim = _chosen(
        tl.load(group), tl.load(group + 1), a, b, c, a_dim, a_row, a_head, b_dim, b_row, b_head, c_dim, c_row, c_head,
        ALIGN,
    )  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    col = tl.arange(0, WIDTH)[None, :]
    inside = (row < rows) & (col < dim)
    total = tl.zeros([ROWS, WIDTH], dtype=tl.float32)
    for number in range(tl.load(group + 2), tl.load(group + 3)):
        slot = slots + number * 4
        start, step = tl.multiple_of(tl.load(slot + 2), ALIGN), tl.multiple_of(tl.load(slot + 3), ALIGN)
        total += tl.load(message + start + row * step + col, mask=inside, other=0.0).to(tl.float32)
    tl.store(base + row * stride + col, total.to(base.dtype.element_ty), mask=inside)

"""Functions of other packages: found when a kernel is first asked for, and refused with the reason."""

import importlib
from collections.abc import Callable, Iterable
from functools import lru_cache
from importlib.util import find_spec
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ringattn.kernels.probing import require
from ringattn.kernels.spec import to_device


def load(distribution: str, path: str, needed: Iterable[str]) -> Callable[..., Any]:
    """A function by its dotted path. Raises ImportError saying what is missing, as the rest of the sentence "it ...".

    Arguments:
        needed: names that it must take by keyword.
    """
    module, _, name = path.rpartition(".")
    if find_spec(module.partition(".")[0]) is None:
        raise ImportError(f"is not installed: pip install {distribution}")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except Exception as error:  # compilers and drivers raise what they like when they are imported
        raise ImportError(f"is installed but cannot be imported: {type(error).__name__}: {str(error)[:200]}") from error
    return require(found, name, needed)


# Layouts of which what a kernel is told is kept: a step's layers have few, and a run as many as it has steps.
LAYOUTS = 64


@lru_cache(maxsize=LAYOUTS)  # the same object for the same lengths: what packages compute of it, they keep by identity
def cumulative(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """(n + 1,): where each piece begins and the last one ends."""
    return to_device(torch.tensor([0, *accumulate(lengths)], device="cpu"), device)


@lru_cache(maxsize=LAYOUTS)
def numbers(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """(1, t) int32: which piece each row is of."""
    pieces = torch.arange(len(lengths), dtype=torch.int32, device="cpu")
    return to_device(pieces.repeat_interleave(torch.tensor(lengths, device="cpu"))[None], device)


def foreign_dtypes(dtypes: Iterable[torch.dtype | None]) -> str | None:
    """Why rows of these dtypes cannot go into one kernel that multiplies them in bfloat16, float16 or float32."""
    found = {dtype for dtype in dtypes if dtype is not None}
    if len(found) == 1 and found <= {torch.bfloat16, torch.float16, torch.float32}:
        return None
    names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
    return f"takes q, k and v of one dtype, bfloat16, float16 or float32, got {names}"

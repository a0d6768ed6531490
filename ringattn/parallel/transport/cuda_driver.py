"""What torch does not offer of CUDA, or only for many times the host's time: asked of the driver itself."""

import ctypes
import itertools
from collections.abc import Callable
from functools import cache
from typing import Any

import torch


def raw_stream() -> int:
    """The current stream's handle; making a `torch.cuda.Stream` of it takes the host 5 to 8 µs more."""
    stream: int = torch._C._cuda_getCurrentRawStream(torch.cuda.current_device())
    return stream


@cache
def memcpy() -> Callable[[int, int, int, int], None]:
    """The asynchronous copy of bytes: target, source, size, stream. An exchange has one for every peer, and needs no
    views of tensors for it, as `Tensor.copy_` does."""
    function = _function("cuMemcpyAsync", ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p)

    def copy(target: int, source: int, size: int, stream: int) -> None:
        error = function(target, source, size, stream)
        if error:
            raise RuntimeError(f"cuMemcpyAsync of {size} bytes failed with CUDA error {error}")

    return copy


def capture_number(stream: int) -> int:
    """The number of the capture that the current stream, whose handle is given, is in; 0 if it is in none, as the
    default stream always is.

    The driver counts captures. Should it not tell, each answer is another one.
    """
    if stream == 0 or not torch.cuda.is_current_stream_capturing():
        return 0
    status, number = ctypes.c_int(), ctypes.c_uint64()
    ask = _function("cuStreamGetCaptureInfo_v2", *[ctypes.c_void_p] * 6)
    failed = ask is None or ask(stream, ctypes.byref(status), ctypes.byref(number), None, None, None)
    return next(_uncounted) if failed else number.value + 1


_uncounted = itertools.count(1 << 62)


@cache
def _function(name: str, *arguments: Any) -> Any:
    """A function of the driver, which returns 0 for success; None if it has none of that name."""
    function = getattr(ctypes.CDLL("libcuda.so.1"), name, None)
    if function is not None:
        function.argtypes, function.restype = arguments, ctypes.c_int
    return function

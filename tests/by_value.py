"""Pickles in which tensors are their numbers."""

import io
import pickle
from typing import Any

import torch


class _ByValue(pickle.Pickler):
    """Writes tensors as their numbers: torch's own way between processes is shared memory, which outlives a killed
    worker and runs out of file descriptors. A view takes its own elements along, not its whole storage."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is not torch.Tensor:
            return NotImplemented
        plain = value.detach().to("cpu", copy=True).contiguous()
        return _tensor, (
            plain.view(-1).view(torch.uint8).numpy().tobytes(),
            plain.dtype,
            plain.shape,
            value.requires_grad,
        )


def _tensor(content: bytes, dtype: torch.dtype, shape: torch.Size, requires_grad: bool) -> torch.Tensor:
    flat = torch.frombuffer(bytearray(content), dtype=dtype) if content else torch.empty(0, dtype=dtype)
    return flat.view(shape).requires_grad_(requires_grad)


def dumps(value: Any) -> bytes:
    buffer = io.BytesIO()
    _ByValue(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()


def loads(content: bytes) -> Any:
    return pickle.loads(content)

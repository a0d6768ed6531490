"""Safetensors files written tensor by tensor, so that memory holds no more than one of them.

The format (huggingface.co/docs/safetensors) begins with the places of all tensors, which are known from shapes alone.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ringattn.training.checkpoint.tensors import NAMES

STEM, INDEX = "model", "model.safetensors.index.json"


@dataclass(frozen=True)
class Source:
    """One tensor, and what is written of it.

    Arguments:
        name: it is asked for by this.
        written: meta tensors by the names in the file: itself, or the parts that it is saved in.
    """

    name: str
    written: Mapping[str, Tensor]

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return sum(tensor.nbytes for tensor in self.written.values())


def in_files(sources: Sequence[Source], most: int) -> list[list[Source]]:
    """Sources by file: at most so many bytes in each, but at least one. Wide numbers come first, so that every tensor
    begins at a multiple of its numbers' size."""
    files: list[list[Source]] = [[]]
    size = 0
    for one in sorted(sources, key=lambda one: -max(t.element_size() for t in one.written.values())):
        if files[-1] and size + one.size > most:
            files.append([])
            size = 0
        files[-1].append(one)
        size += one.size
    return files


def write_weights(
    folder: Path, sources: Sequence[Source], parts: Callable[[str], Mapping[str, Tensor]], most: int, stem: str = STEM
) -> None:
    """Writes sources as safetensors: in one file, or in several and an index.

    Arguments:
        parts: gives what is written of a source by its name, with the dtypes and shapes of its `written`.
        most: bytes of a file.
    """
    files = in_files(sources, most)
    if len(files) == 1:
        _write(folder / f"{stem}.safetensors", files[0], parts)
        return
    places, total = dict[str, str](), 0
    for number, some in enumerate(files, 1):
        name = f"{stem}-{number:05d}-of-{len(files):05d}.safetensors"
        _write(folder / name, some, parts)
        places |= {written: name for one in some for written in one.written}
        total += sum(one.size for one in some)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write(path: Path, sources: Sequence[Source], parts: Callable[[str], Mapping[str, Tensor]]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for one in sources:
        for name, tensor in one.written.items():
            begin, end = end, end + tensor.nbytes
            header[name] = {"dtype": NAMES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for one in sources:
            _append(file, one, parts(one.name))


def _append(file: BinaryIO, source: Source, found: Mapping[str, Tensor]) -> None:
    for name, expected in source.written.items():
        tensor = found[name].detach().contiguous()
        same = (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape)
        assert same, f"{name}: {tensor.dtype} {tensor.shape} instead of {expected.dtype} {expected.shape}"
        file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)

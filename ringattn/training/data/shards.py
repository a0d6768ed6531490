"""The parts that a source is read in: files, saved data sets, or a data set that `datasets` finds by name."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ringattn.training.data.files import matching_files
from ringattn.training.data.records import Record, is_saved_dataset, is_saved_parts, records_of, rows_of
from ringattn.training.data.sources import Source

_END = 1 << 16  # bytes from the beginning and the end of a file that tell it from others where it is not read through


@dataclass(frozen=True)
class Shard:
    """One part of a source, whose records have an order.

    Arguments:
        path: a file, or the folder of a saved data set; None for a data set by its name.
        hub, config, split: of a data set by its name.
        streaming: rows of it are fetched as they are read.
    """

    path: Path | None = None
    hub: str = ""
    config: str | None = None
    split: str = "train"
    streaming: bool = False

    def records(self, field: str, start: int = 0) -> Iterator[Record]:
        """Its records from number `start` on; a text that is a whole file gets the key `field`."""
        if self.path is not None:
            yield from records_of(self.path, field, start)
        else:
            yield from rows_of(self._rows(), self.hub, start)

    def files(self) -> list[Path]:
        """The files that hold it: their content is its own."""
        if self.path is None:
            return sorted(Path(one["filename"]) for one in self._rows().cache_files)
        return sorted(self.path.glob("*.arrow")) if self.path.is_dir() else [self.path]

    def likeness(self) -> str:
        """What tells it from others without reading it through: sizes, and the first and last bytes of its files."""
        if self.path is None:
            return f"{self.hub} {self.config} {self.split}"
        digest = hashlib.sha256()
        for path in self.files():
            size = path.stat().st_size
            with open(path, "rb") as file:
                digest.update(size.to_bytes(8, "little") + file.read(_END))
                file.seek(max(0, size - _END))
                digest.update(file.read(_END))
        return digest.hexdigest()

    def _rows(self) -> Any:
        from datasets import load_dataset

        try:
            return load_dataset(self.hub, self.config, split=self.split, streaming=self.streaming)
        except Exception as error:  # of datasets, huggingface_hub, a network: of any type
            reason = str(error).strip().partition("\n")[0][:300]
            raise ValueError(f"the data set {self.hub!r} cannot be loaded: {type(error).__name__}: {reason}") from None


def shards_of(source: Source, where: str, own: Sequence[Path] = (), streaming: bool = False) -> list[Shard]:
    """The parts of a source, in the same order everywhere.

    Arguments:
        where: the source's key, for errors.
        own: folders that the run writes, which are not its data.

    Raises ValueError for a path that leads to nothing, and for a split that is not there.
    """
    if source.hub is not None:
        return [Shard(None, source.hub, source.config, source.split or "train", streaming)]
    assert source.path is not None
    folder = Path(source.path).expanduser()
    if is_saved_parts(folder):
        parts = sorted(path.name for path in folder.iterdir() if is_saved_dataset(path))
        split = source.split or "train"
        if split not in parts:
            raise ValueError(f"{where}: {source.path!r} has no split {split!r}; it has {', '.join(parts)}")
        return [Shard(folder / split)]
    if is_saved_dataset(folder):
        return [Shard(folder)]
    if source.split is not None:
        raise ValueError(f"{where}.split is of a data set, and {source.path!r} is none that `datasets` has saved")
    try:
        return [Shard(path) for path in matching_files([source.path], own)]
    except ValueError as error:
        raise ValueError(str(error).replace("data.files", f"{where}.path", 1)) from None

"""The safetensors files of a saved model, read row by row: by whom, and how much at a time, is for others to say."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ringattn.training.model.architecture import reason_of

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
# What PEFT puts between a layer and its weights.
_BASE_LAYER = ".base_layer"


class WeightFiles:
    """Tensors by name. Files are mapped into memory as they are needed; nothing but what is asked for is read."""

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        from safetensors import safe_open

        self._files: dict[str, Any] = {}
        for name in names:
            file = safe_open(str(folder / name), "pt")
            self._files |= dict.fromkeys(file.keys(), file)

    @classmethod
    def of(cls, path: str) -> "WeightFiles | None":
        """Those in the folder of a saved model; None where its weights are no safetensors."""
        folder = Path(path).expanduser()
        if (folder / WHOLE).is_file():
            return cls(folder, [WHOLE])
        if not (folder / INDEX).is_file():
            return None
        return cls(folder, sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values())))

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def names(self) -> set[str]:
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def rows(self, name: str, low: int = 0, high: int | None = None) -> Tensor:
        """Rows `[low, high)` of a tensor, in the dtype of the file; the whole of it by itself.

        Raises ValueError for a file that cannot be read any more.
        """
        from safetensors import SafetensorError

        try:
            if low == 0 and high is None:
                whole: Tensor = self._files[name].get_tensor(name)
                return whole
            some: Tensor = self._files[name].get_slice(name)[low:high]
            return some
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{name} cannot be read: {reason_of(error)}") from None


def places_in(files: WeightFiles, model: nn.Module, made: Iterable[str] = ()) -> dict[str, str] | None:
    """Where in files each tensor of a model's state stands, by its name in the model; tied ones once.

    Arguments:
        model: with LoRA's factors, if there are some; the meta device is enough.
        made: names that are in no file.

    None if that is not one tensor for one: a name or shape is another, or a file holds what the model has not. Then
    transformers has to load the whole, since it knows how such weights were converted.
    """
    names: dict[int, list[str]] = {}
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor
    absent, places, known = set(made), dict[str, str](), set[str]()
    for key, aliases in names.items():
        if absent & set(aliases):
            continue
        plain = [name.replace(_BASE_LAYER, "") for name in aliases]
        known |= set(plain)
        found = next((name for name in plain if name in files), None)
        if found is None or files.shape(found) != tuple(tensors[key].shape):
            return None
        places |= dict.fromkeys(aliases, found)
    return places if files.names() <= known else None

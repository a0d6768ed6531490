"""What DeepSpeed would write into files, held as nested values instead, and given back the same way.

Its files are pickles, which run code when they are read. Whatever it saves and loads goes through a pluggable engine
(`deepspeed.runtime.checkpoint_engine`); this one keeps what it is given.
"""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ringattn.training.checkpoint.saved_state import SavedState
from ringattn.training.engines.buffers import buffers_copied

TAG = "zero"
# Objects that are made anew from the configuration, or that only DeepSpeed's own tools read.
_LEFT_OUT = ("loss_scaler", "param_slice_mappings", "ds_config", "param_shapes")
_OPTIMIZER, _MODULE = "optimizer_state_dict", "module"


def taken(engine: Any) -> dict[str, Any]:
    """What a DeepSpeed engine saves on this rank, by the names of its files. Collective; buffers alone are copied."""
    held: dict[str, Any] = {}
    engine.checkpoint_engine = _holder(held, None, engine)
    engine._copy_recovery_script = lambda path: None  # a script that reads pickles
    engine.save_checkpoint("held", tag=TAG, save_latest=False, exclude_frozen_parameters=True)
    return held


def give_back(engine: Any, saved: SavedState, place: str, strict: bool) -> bool:
    """Loads what `taken` returned, which was saved below `place`. Collective. False if it is not what is needed."""
    engine.checkpoint_engine = _holder({}, _Reader(saved, place), engine)
    with TemporaryDirectory() as folder:
        # DeepSpeed looks for the file of the model's states before it loads it.
        path = Path(engine._get_ckpt_name(folder, TAG))
        path.parent.mkdir(exist_ok=True)
        path.touch()
        loaded, _ = engine.load_checkpoint(folder, tag=TAG, load_module_strict=strict)
    return loaded is not None


class _Reader:
    def __init__(self, saved: SavedState, place: str) -> None:
        self._saved, self._place = saved, place

    def __call__(self, name: str) -> Any:
        return self._saved.subtree(self._place, name)


def _holder(held: dict[str, Any], read: _Reader | None, engine: Any) -> Any:
    """A checkpoint engine that keeps what is saved in `held`, and loads what `read` gives."""
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

    class Holder(CheckpointEngine):
        def create(self, info: Any) -> None:
            """Nothing is made."""

        def makedirs(self, path: str, exist_ok: bool = False) -> None:
            """No folder either."""

        def save(self, state_dict: Mapping[str, Any], path: str) -> None:
            held[Path(path).name] = kept = _plain(state_dict)
            if _MODULE in kept:
                kept[_MODULE] = buffers_copied(kept[_MODULE], engine.module)

        def load(self, path: str, map_location: Any = None) -> Any:
            assert read is not None
            states = read(Path(path).name)
            if _OPTIMIZER in states:
                states[_OPTIMIZER]["loss_scaler"] = engine.optimizer.loss_scaler
            return states

        def commit(self, info: Any) -> bool:
            return True

        def preserves_storage_sharing(self) -> bool:
            return False

    return Holder()


def _plain(states: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is left out, on the two levels where it stands."""
    kept = {key: value for key, value in states.items() if key not in _LEFT_OUT}
    inner = kept.get(_OPTIMIZER)
    if isinstance(inner, Mapping):
        kept[_OPTIMIZER] = {key: value for key, value in inner.items() if key not in _LEFT_OUT}
    return kept

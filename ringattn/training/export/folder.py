"""Writes the folder: aside, then renamed, so that it is complete or absent."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ringattn.training.export.beside import (
    check_adapter,
    tokenizer_of,
    write_adapter_config,
    write_config,
    write_generation,
    write_tokenizer,
)
from ringattn.training.export.card import model_card
from ringattn.training.export.run_folder import open_run
from ringattn.training.export.trained import TrainedWeights
from ringattn.training.export.writing import Source, write_weights

PARTIAL = ".partial"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GB = 10**9
_BESIDE = 64 << 20  # bytes beside the weights: tokenizers


@dataclass(frozen=True)
class ExportOptions:
    """What is exported, and how.

    Arguments:
        step: of the checkpoint; None for the newest good one.
        best: that with the least validation loss instead.
        adapter: LoRA's factors alone, as PEFT loads them; otherwise they are merged.
        dtype: of the weights: a key of `DTYPES`, or "auto" for what the run computed in.
        tokenizer: its folder; None for the run's.
        shard_bytes: most bytes of a file of weights.
    """

    step: int | None = None
    best: bool = False
    adapter: bool = False
    dtype: str = "auto"
    tokenizer: str | None = None
    shard_bytes: int = 5 * GB


@dataclass(frozen=True)
class Exported:
    """What was written: of which step, so many tensors and bytes of weights, and what was passed over."""

    step: int
    tensors: int
    size: int
    dtype: str
    warnings: tuple[str, ...]


def export(run_path: Path, out: Path, options: ExportOptions | None = None) -> Exported:
    """Writes the model that a run trained as a folder that `AutoModelForCausalLM.from_pretrained` loads.

    Memory holds one tensor at a time. A process that is killed leaves at most `OUT.partial`.

    Arguments:
        run_path: the run's folder.
        out: must not exist, or be empty.

    Raises ValueError, naming what is wrong, before anything is written; OSError for a disk that cannot take it.
    """
    options, out = options or ExportOptions(), out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty; nothing was written: choose another folder, or remove it")
    run = open_run(run_path, options.step, options.best)
    if options.adapter:
        check_adapter(run)
    tokenizer = tokenizer_of(run, options.tokenizer)
    weights = TrainedWeights(run)
    dtype = DTYPES[run.cfg["run"]["dtype"] if options.dtype == "auto" else options.dtype]
    sources, parts = (_factors if options.adapter else _merged)(weights, dtype)
    size = sum(one.size for one in sources)
    partial = _begin(out, size)
    try:
        if options.adapter:
            write_adapter_config(run, weights, partial)
            write_weights(partial, sources, parts, size, "adapter_model")
        else:
            write_config(run, weights, dtype, partial)
            write_generation(run, tokenizer, partial)
            write_weights(partial, sources, parts, options.shard_bytes)
        if tokenizer is not None:
            write_tokenizer(tokenizer, run, partial)
        card = model_card(run, out.name, options.adapter, tokenizer is not None)
        (partial / "README.md").write_text(card)
        if out.exists():
            out.rmdir()  # it is empty
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    count = sum(len(one.written) for one in sources)
    return Exported(run.state.step, count, size, str(dtype).removeprefix("torch."), run.warnings)


def _begin(out: Path, size: int) -> Path:
    """The empty folder that is renamed in the end. Raises OSError where the disk has no room."""
    partial = out.with_name(out.name + PARTIAL)
    if partial.exists():
        shutil.rmtree(partial)
    partial.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(partial.parent).free
    if free < size + _BESIDE:
        raise OSError(None, f"{(size + _BESIDE) / GB:.2f} GB are needed, {free / GB:.2f} GB are free", str(out.parent))
    partial.mkdir()
    return partial


Parts = Callable[[str], dict[str, Tensor]]


def _merged(weights: TrainedWeights, dtype: torch.dtype) -> tuple[list[Source], Parts]:
    """Every tensor of the plain model as transformers saves it."""
    from transformers.core_model_loading import revert_weight_conversion

    weights.check_merge()
    state = weights.plain.state_dict()

    def saved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = revert_weight_conversion(weights.plain, tensors)  # type: ignore[arg-type]
        return found

    sources = [Source(name, saved({name: _cast(state[name], dtype)})) for name in weights.names()]
    apart = {name: tensor.shape for one in sources for name, tensor in one.written.items()}
    together = {name: tensor.shape for name, tensor in saved({name: state[name] for name in weights.names()}).items()}
    if apart != together:
        name = next(iter(apart.items() ^ together.items()))[0]
        raise ValueError(f"transformers saves {name} from several weights of the model: such models cannot be exported")
    return sources, lambda name: saved({name: _cast(weights.merged(name), dtype)})


def _factors(weights: TrainedWeights, dtype: torch.dtype) -> tuple[list[Source], Parts]:
    """LoRA's factors by the names that PEFT gives them in a file."""
    state = weights.model.state_dict()

    def written(name: str) -> str:
        return f"base_model.model.{name.replace('.default', '')}"

    sources = [Source(name, {written(name): _cast(state[name], dtype)}) for name in weights.factors()]
    return sources, lambda name: {written(name): _cast(weights.of(name), dtype)}


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers in `dtype`, integers as they are. Raises ValueError for what gets infinite by it."""
    if not tensor.is_floating_point():
        return tensor
    cast = tensor.to(dtype)
    if dtype == torch.float16 and not cast.is_meta and not bool(torch.isfinite(cast).all()):
        raise ValueError("some weights are too large for float16; use bfloat16 or float32")
    return cast

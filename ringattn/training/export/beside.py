"""What stands beside the weights: the configuration that was trained, tokenizer, generation settings, an adapter's."""

from pathlib import Path
from typing import Any

import torch

from ringattn.training.data.chat import OF_TRL, template_of
from ringattn.training.data.tokenizer import BYTES
from ringattn.training.export.run_folder import RunFolder
from ringattn.training.export.trained import TrainedWeights
from ringattn.training.model.architecture import reason_of, saved_config
from ringattn.training.start.output import model_values

# Of a configuration, what changes no number that a model computes.
_OF_LENGTH = {"max_position_embeddings", "use_cache"}


def write_config(run: RunFolder, weights: TrainedWeights, dtype: torch.dtype, folder: Path) -> None:
    """The transformers configuration as it was trained, with its rotary positions, and `dtype` for the weights."""
    config = run.model_config
    config.architectures = [type(weights.plain).__name__]
    config.dtype = str(dtype).removeprefix("torch.")
    config.use_cache = True  # training has none
    config.save_pretrained(folder)


def tokenizer_of(run: RunFolder, given: str | None) -> Any | None:
    """The tokenizer that the run read its text with, or the one in a folder; None for bytes.

    Raises ValueError naming the folder if it is not there any more.
    """
    from transformers import AutoTokenizer

    source = given or run.cfg["data"].get("tokenizer") or BYTES
    if source == BYTES:
        return None
    folder = Path(source).expanduser()
    said = "--tokenizer" if given else "data.tokenizer of the run"
    if not folder.is_dir():
        raise ValueError(f"{said}: {source} is not there; give the folder of its tokenizer as --tokenizer FOLDER")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of transformers, tokenizers (in Rust), sentencepiece: of any type
        raise ValueError(f"{said}: {source} cannot be read: {reason_of(error)}") from None
    template = run.cfg["data"].get("chat_template")
    if not given and template not in (None, OF_TRL):  # TRL's variant is for training: it marks what is learned
        tokenizer.chat_template = template_of(tokenizer, template)
    words, known = 1 + max(tokenizer.get_vocab().values(), default=-1), run.model_config.get_text_config().vocab_size
    if words > known:
        raise ValueError(f"{said}: {source} has {words} tokens, the model knows {known}")
    return tokenizer


def write_tokenizer(tokenizer: Any, run: RunFolder, folder: Path) -> None:
    """With its chat template, and the length that the model was trained for."""
    positions = getattr(run.model_config.get_text_config(), "max_position_embeddings", None)
    if positions is not None:
        tokenizer.model_max_length = positions
    tokenizer.save_pretrained(folder)


def write_generation(run: RunFolder, tokenizer: Any | None, folder: Path) -> None:
    """Those of the model that the run began with, or what its configuration says; text ends where its tokens do."""
    from transformers import GenerationConfig

    base = run.base
    if base is not None and (Path(base).expanduser() / "generation_config.json").is_file():
        config = GenerationConfig.from_pretrained(base, local_files_only=True)
    else:
        config = GenerationConfig.from_model_config(run.model_config)
    if config.eos_token_id is None and tokenizer is not None:
        config.eos_token_id = tokenizer.eos_token_id
    config.save_pretrained(folder)


def check_adapter(run: RunFolder) -> None:
    """Raises ValueError for a run whose factors are of no use without its folder: who loads them takes the model at
    `model.path`, with its own configuration."""
    if run.lora is None:
        raise ValueError(f"{run.path} has no factors of model.lora: export without --adapter")
    if run.base is None:
        raise ValueError("the factors stand beside random weights, which nobody else has: export without --adapter")
    if drawn := run.cfg["model"].get("allow_mismatch"):
        raise ValueError(
            f"the factors stand beside drawn weights (model.allow_mismatch={drawn}): export without --adapter"
        )
    before, after = model_values(saved_config(run.base)), model_values(run.model_config)
    both = sorted(before.keys() & after.keys() - _OF_LENGTH)
    if changed := [key for key in both if before[key] != after[key]]:
        shown = "; ".join(f"{key} was {before[key]} and is {after[key]}" for key in changed)
        raise ValueError(
            f"the factors were trained beside another configuration than that at {run.base}, which is taken where they "
            f"are loaded: {shown}; export without --adapter"
        )


def write_adapter_config(run: RunFolder, weights: TrainedWeights, folder: Path) -> None:
    """PEFT's, which names the model that the factors stand beside."""
    from peft import LoraConfig

    assert run.lora is not None
    config = LoraConfig(
        r=run.lora.rank,
        lora_alpha=run.lora.alpha,  # type: ignore[arg-type]
        target_modules=_targets(weights),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=run.base,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))


def _targets(weights: TrainedWeights) -> list[str]:
    """Layers that have factors: by the ends of their names, where all layers with these ends have them."""
    plain = [name for name, module in weights.plain.named_modules() if not [*module.children()]]
    layers = {name.partition(".lora_")[0] for name in weights.factors()}
    ends = {name.rpartition(".")[2] for name in layers}
    alike = {name for name in plain if name.rpartition(".")[2] in ends}
    return sorted(ends if alike == layers else layers)

"""`model.lora`: a frozen model with small trained factors beside its linear layers (LoRA, Hu et al., arXiv 2106.09685).

PEFT puts its layers into the model, which stays the transformers model that it was: whatever looks for its layers, its
head or its loss finds them as before, and an engine sees parameters of which most need no gradient. There is no
dropout: PEFT would draw its masks while the model trains, and nothing of a run's numbers may depend on a draw.
"""

import importlib.util
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import nn

from ringattn.training.model.architecture import reason_of

INSTALL = "pip install 'ringattn[hf]'"
ALL = "all-linear"
SHAPE = "null or {rank: 16, alpha: 32, targets: all-linear}"


@dataclass(frozen=True)
class Lora:
    """The factors of a model.

    Arguments:
        rank: of each product of two factors.
        alpha: the product is scaled with alpha / rank.
        targets: which layers have one, as PEFT's `target_modules`: "all-linear" for every linear layer but the head,
            another text for a regular expression of a layer's whole path, a tuple for the ends of paths.
    """

    rank: int
    alpha: float
    targets: str | tuple[str, ...] = ALL

    def __str__(self) -> str:
        targets = self.targets if isinstance(self.targets, str) else f"[{', '.join(self.targets)}]"
        return f"rank {self.rank}, alpha {self.alpha:g}, targets {targets}"


def lora_of(model: Mapping[str, Any] | DictConfig) -> Lora | None:
    """What the `model` group of a configuration says, or None. Left out, alpha is twice the rank, targets all-linear.

    Raises ValueError naming the key.
    """
    given = model.get("lora")
    given = OmegaConf.to_container(given) if OmegaConf.is_config(given) else given
    if given is None:
        return None
    if not isinstance(given, Mapping) or not {"rank"} <= given.keys() <= {"rank", "alpha", "targets"}:
        raise ValueError(f"model.lora must be {SHAPE}, got {given!r}")
    rank, alpha, targets = given["rank"], given.get("alpha"), given.get("targets")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"model.lora.rank must be an integer of at least 1, got {rank!r}")
    alpha = 2 * rank if alpha is None else alpha
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < math.inf:
        raise ValueError(f"model.lora.alpha must be a finite number above 0, got {alpha!r}")
    targets = ALL if targets is None else targets
    names = targets if isinstance(targets, list | tuple) else [targets]
    if not names or not all(isinstance(one, str) and one for one in names):
        raise ValueError(
            f"model.lora.targets must be {ALL}, a regular expression of whole paths, or a list of names such as "
            f"[q_proj, v_proj], got {targets!r}"
        )
    return Lora(rank, alpha, targets if isinstance(targets, str) else tuple(targets))


def check_lora(cfg: DictConfig) -> None:
    """Raises ValueError, naming the key, for a `model.lora` that cannot be, or without the package that it needs."""
    if lora_of(cfg.model) is not None and importlib.util.find_spec("peft") is None:
        raise ValueError(f"model.lora needs the package PEFT: {INSTALL}, or use model.lora=null")


def lora_values(lora: Lora | None) -> dict[str, Any] | None:
    """The key of a resolved configuration."""
    if lora is None:
        return None
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    return {"rank": lora.rank, "alpha": lora.alpha, "targets": targets}


def put_lora(model: nn.Module, lora: Lora) -> None:
    """Freezes a transformers model and puts factors into it, in place.

    They are drawn by PEFT, from torch's random state: the first of a pair is random, the second zero, so that the model
    computes what it did. On the meta device nothing is drawn.

    Raises ValueError naming targets that the model has not, or that are no layers for factors.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, lora_dropout=0.0)  # type: ignore[arg-type]
    meta = any(parameter.is_meta for parameter in model.parameters())
    try:
        inject_adapter_in_model(config, model, low_cpu_mem_usage=meta)
    except (ValueError, re.error) as error:
        raise ValueError(f"model.lora.targets={targets!r}: {reason_of(error)}") from None
    adapted = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    if isinstance(targets, list) and (unmet := [one for one in targets if not _ends_with(adapted, one)]):
        raise ValueError(f"model.lora.targets: {type(model).__name__} has no layer {', '.join(map(repr, unmet))}")


def _ends_with(names: Collection[str], end: str) -> bool:
    return any(f".{name}".endswith(f".{end}") for name in names)


def lora_notes(cfg: DictConfig, lora: Lora | None, rate: float | None, model: nn.Module) -> list[str]:
    """What a user should know about the factors of a resolved run, one line each.

    Arguments:
        rate: the learning rate that the user gave; None: the model's was taken.
        model: with its factors; the meta device is enough.
    """
    if lora is None:
        return []
    every = [p.numel() for p in model.parameters()]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    notes = [f"model.lora: {lora}; {trained:,} of {sum(every):,} parameters are trained"]
    if cfg.model.path is None:
        notes.append("warning: model.lora without model.path trains factors of a model that is random and stays so")
    if rate is None:
        notes.append(
            f"warning: the learning rate {cfg.optim.lr:g} is for training all weights; factors usually take about ten "
            f"times as much: optim.lr={10 * cfg.optim.lr:g}"
        )
    return notes


def check_same_base(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises ValueError if what a checkpoint holds would go on beside other frozen weights, which it does not hold.

    Arguments:
        saved, now: resolved configurations, of the run that wrote the checkpoint and of this one.
    """
    if not any(cfg["model"].get(key) for cfg in (saved, now) for key in ("lora", "freeze")):
        return
    before, after = _base(saved), _base(now)
    if differing := [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]:
        shown = "; ".join(f"{key} was {before.get(key)!r} and is now {after.get(key)!r}" for key in differing)
        raise ValueError(
            f"the checkpoint does not hold frozen weights (model.lora, model.freeze); it was made for another frozen "
            f"model, and cannot go on beside this one, not even with run.resume=force: {shown}"
        )


def _base(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Where frozen weights come from: files, and the seed where some are drawn; and which are frozen beside those of
    LoRA."""
    model = cfg["model"]
    drawn = model.get("path") is None or model.get("allow_mismatch")
    base = {"model.path": model.get("path"), "model.freeze": list(model.get("freeze") or ())}
    return base | ({"run.seed": cfg["run"]["seed"]} if drawn else {})

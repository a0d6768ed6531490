"""`model.freeze`: weights that stay as they are. They have no gradients and moments, and no checkpoint holds them."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from omegaconf import DictConfig
from torch import nn


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Freezes parameters whose names, as in `model.layers.0.mlp.up_proj.weight`, match a pattern with `*`, in place.

    A parameter with two names, such as a tied embedding, is frozen by either.

    Raises ValueError for patterns that match nothing, and if nothing is left to train.
    """
    names = dict(model.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            some = ", ".join(list(names)[:2])
            raise ValueError(
                f"model.freeze: no weight of {type(model).__name__} matches {pattern!r}; they are called {some}, …"
            )
        for name in matched:
            names[name].requires_grad_(False)
    if patterns and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"model.freeze={list(patterns)} leaves nothing to train")


def freeze_notes(cfg: DictConfig, model: nn.Module) -> list[str]:
    """What a user should know about frozen weights of a resolved run, one line each.

    Arguments:
        model: with them frozen; the meta device is enough.
    """
    if not cfg.model.freeze:
        return []
    every = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    notes = [f"model.freeze: {trained:,} of {every:,} parameters are trained"]
    if cfg.model.path is None and cfg.model.lora is None:
        notes.append("warning: model.freeze without model.path freezes weights that are random and stay so")
    return notes

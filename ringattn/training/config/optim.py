"""The recipe's `optim` group: keys of the optimizer that depend on each other, and the learning rate's schedule."""

import math
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ringattn.training.schedule import SHAPES, Schedule

CHOICES: dict[str, tuple[str, ...]] = {"optim.name": ("adamw", "muon"), "optim.schedule": SHAPES}
OF_MUON = ("optim.momentum",)
# What runs did before there were these keys.
BEFORE = {"optim.name": "adamw", "optim.schedule": "cosine", "optim.decay_ratio": 0.1}


def schedule_of(cfg: DictConfig) -> Schedule:
    """The learning rate of a resolved configuration."""
    optim, steps = cfg.optim, cfg.run.steps
    warmup, decay = round(optim.warmup_ratio * steps), round(optim.decay_ratio * steps)
    return Schedule(optim.lr, warmup, steps, optim.min_ratio, optim.schedule, decay)


def check_optim(cfg: DictConfig) -> None:
    """Raises ValueError, naming the key, for moments and optimizers that cannot be."""
    optim = cfg.optim
    betas = OmegaConf.to_container(optim.betas) if OmegaConf.is_list(optim.betas) else optim.betas
    if not (isinstance(betas, list) and len(betas) == 2 and all(_is_share(beta) for beta in betas)):
        raise ValueError(f"optim.betas must be two numbers in [0, 1), got {betas!r}")
    if optim.name != "muon":
        return
    if not _is_share(optim.momentum):
        raise ValueError(f"optim.momentum must be a number in [0, 1), got {optim.momentum!r}")
    if cfg.engine.name != "fsdp2":
        raise ValueError(
            f"optim=muon needs whole matrices, and engine={cfg.engine.name} hands an optimizer flat pieces of them; "
            "use engine=fsdp2"
        )
    for key in ("weights", "moments"):
        if cfg.memory[key] != "float32":
            raise ValueError(f"memory.{key}={cfg.memory[key]} is for optim=adamw alone; optim=muon has float32")


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and 0 <= value < 1

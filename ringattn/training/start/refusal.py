"""How a recipe refuses to run: one message, and exit code 2."""

import os
import sys
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any, NoReturn

import yaml
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from ringattn.shipped import CONFIGS
from ringattn.training.failures import FailedTogether, report
from ringattn.training.secrets import redacted
from ringattn.training.start.launched import is_first, speaks_for_machine

HINT = "To append to your config use "


def refuse(error: Exception, code: int = 2) -> NoReturn:
    """Says why, and exits with a code.

    Rank 0 says it, once, also for another rank, which tells it in the store that all meet in. Where nobody listens
    there it is left to torchrun's report at the end, or without torchrun to the first rank of each machine: a file may
    be missing on one machine only. Once all have met there is no store to speak in: rank 0, who may hold it, may have
    ended.
    """
    # Imported late: not every refusal comes when torch.distributed has been imported.
    from torch.distributed import is_initialized

    from ringattn.training.start.meeting import CannotStart, cannot

    message = redacted(message_of(error))
    reported = report(message)
    first = is_first(os.environ)
    if first:
        print(f"error: {message}", file=sys.stderr, flush=True)
    everywhere = isinstance(error, CannotStart | FailedTogether)
    heard = everywhere or (not is_initialized() and cannot(message))
    if not first and not heard and not reported and speaks_for_machine(os.environ):
        print(f"error on this machine: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


def of_a_list(error: ValueError) -> ValueError | None:
    """What to say of a ValueError that OmegaConf raised of an override such as `optim.betas.x=1`, which asks a list for
    a key; None of any other."""
    trace, key = error.__traceback__, None
    while trace is not None:
        module = str(trace.tb_frame.f_globals.get("__name__", ""))
        key = trace.tb_frame.f_locals.get("key") if module == "omegaconf.omegaconf" else None
        trace = trace.tb_next
    if not isinstance(key, str) or "." not in key:
        return None
    named = key.rpartition(".")[0]
    return ValueError(f"{key}: {named} is a list, and has no keys; give all of it, as in '{named}=[...]'")


def message_of(error: Exception) -> str:
    """What a person is told of an error of a configuration, with the key that may have been meant."""
    # Hydra's advice to add a key with "+" is right below model.config only; elsewhere it leads to the next refusal.
    lines = [
        line
        for line in str(error).splitlines()
        if not line.startswith(HINT) or line.startswith(f"{HINT}+model.config.")
    ]
    cause = error.__cause__
    advised = any(HINT in line for line in lines)
    if isinstance(error, HydraException) and isinstance(cause, OmegaConfBaseException) and not advised:
        unknown = str(error).partition("'")[2].partition("'")[0]
        if options := _options_with(unknown):
            group = unknown.partition(".")[0]
            lines.append(f"{cause.full_key} is a key of {' and '.join(options)}; here another {group}= is chosen")
            return "\n".join(lines)
        near = _nearest_keys(unknown, cause.parent_node)
        meant = f"did you mean {' or '.join(near)}? The" if near else "the"
        lines.append(f"There is no key {cause.full_key!r}; {meant} keys are in configs/, each with a comment")
    return "\n".join(lines)


def _options_with(unknown: str) -> list[str]:
    """Shipped options, as in `data=text`, of the group of a key that have it."""
    group, _, key = unknown.partition(".")
    found = sorted((CONFIGS / group).glob("*.yaml")) if group.isidentifier() else []
    return [f"{group}={path.stem}" for path in found if _has(yaml.safe_load(path.read_text(encoding="utf-8")), key)]


def _has(node: Any, key: str) -> bool:
    """Whether a key is in a file, with a value or null, and without looking up what its value refers to."""
    for word in key.split("."):
        if not isinstance(node, dict) or word not in node:
            return False
        node = node[word]
    return True


def _nearest_keys(unknown: str, node: Any) -> list[str]:
    """Keys of the configuration around `node` that may be meant: of the same group and written alike, or else of any
    group and with the same or nearly the same last word."""
    if node is None:
        return []
    words = {path: path.rpartition(".")[2] for path in _paths(node._get_root()) if not path.startswith("hydra.")}
    group, _, word = unknown.rpartition(".")
    beside = {path: own for path, own in words.items() if path.rpartition(".")[0] == group}
    for candidates, likeness in ((beside, 0.6), (words, 0.85)):
        near = get_close_matches(word, set(candidates.values()), 2, likeness)
        if near:
            return [path for own in near for path, found in candidates.items() if found == own]
    return []


def _paths(config: DictConfig, before: str = "") -> Iterator[str]:
    """The full name of every key that has a value."""
    for key in config:
        node = config._get_node(key)
        if isinstance(node, DictConfig) and not (node._is_none() or node._is_missing() or node._is_interpolation()):
            yield from _paths(node, f"{before}{key!s}.")
        else:
            yield f"{before}{key!s}"

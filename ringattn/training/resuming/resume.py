"""Whether a run may go on from a checkpoint, and where in its data."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import nn

from ringattn.training.checkpoint import TrainState
from ringattn.training.config.checks import flat
from ringattn.training.config.curve import BEFORE, curve_differences
from ringattn.training.model.fitness import check_same_shapes
from ringattn.training.model.lora import Lora, check_same_base, lora_of
from ringattn.training.model.models import empty_model
from ringattn.training.packs.ordering import AnyCorpus, Position
from ringattn.training.packs.packers import check_state, lengths_of
from ringattn.training.secrets import redacted
from ringattn.training.start.launched import Launch
from ringattn.training.start.output import config_of, model_values, read_config

SEED = "seed"
"""In the position of a checkpoint: of the order that it is a place in. The folder's configuration may be of a later
start, which was forced to go on with another seed and ended before it saved anything."""


def check_resume(
    cfg: DictConfig,
    output: Path,
    state: TrainState,
    launch: Launch,
    corpus: AnyCorpus,
    model_config: Any,
    model: nn.Module,
) -> tuple[TrainState, list[str]]:
    """The state to go on from, and what is to be said about it.

    With run.resume=force the documents may be others, or in another order: then a place in them means nothing any
    more, and the stream goes on at the beginning of a new epoch.

    Raises ValueError if the checkpoint in `output` cannot be read by this run, or is of another one.
    """
    _check_readable(cfg, output, state, launch)
    saved, saved_model = read_config(output)
    now: dict[str, Any] = redacted(OmegaConf.to_container(cfg))  # as it is saved
    if cfg.run.resume != "force":
        _check_same(cfg, output, state, corpus, saved or now, now, _model_differences(saved_model, model_config))
    else:
        _check_moments(saved or now, now, output)
        if saved_model is not None:
            _check_shapes(saved_model, lora_of((saved or now)["model"]), model)
    check_same_base(saved or now, now)
    # Checkpoints of earlier versions do not hold it.
    position = dict(state.position)
    if lengths_of(cfg.data) is not None:
        position.setdefault("step", state.step)  # of a run that had no curriculum yet: its lengths are those of now
    seed = position.get(SEED, (saved or now).get("run", {}).get("seed"))
    if state.corpus != corpus.fingerprint or seed != cfg.run.seed:
        epoch = int(position["epoch"]) + 1
        why = "documents" if state.corpus != corpus.fingerprint else "run.seed"
        note = f"other {why} than in the checkpoint: the data goes on at the beginning of epoch {epoch + 1}"
        drawn = {key: position[key] for key in ("step",) if key in position}  # lengths by step go on
        return replace(state, position=Position(epoch).state_dict() | drawn), [note]
    check_state(cfg.data, position)
    return replace(state, position=position), []


def _check_readable(cfg: DictConfig, output: Path, state: TrainState, launch: Launch) -> None:
    if state.engine != cfg.engine.name:
        raise ValueError(
            f"engine.name={cfg.engine.name}, but the checkpoint in {output} was written by {state.engine} and only it "
            f"can read it; choose another run.output. Its weights alone can go on: ringattn export {output} OUT, "
            "then model.path=OUT"
        )
    if state.engine == "deepspeed" and state.world_size != launch.world_size:
        raise ValueError(
            f"the DeepSpeed checkpoint in {output} was written by {state.world_size} ranks and {launch.world_size} "
            "were started; start as many, or choose another run.output"
        )


def _check_same(
    cfg: DictConfig,
    output: Path,
    state: TrainState,
    corpus: AnyCorpus,
    saved: dict[str, Any],
    now: dict[str, Any],
    of_model: list[tuple[str, Any, Any]],
) -> None:
    if state.corpus != corpus.fingerprint:
        raise ValueError(
            f"the documents of data.name={cfg.data.name}, or their tokens, changed since the checkpoint in {output}; "
            "choose another run.output, or go on all the same with run.resume=force"
        )
    differences = curve_differences(saved, now)
    known = {key for key, _, _ in differences}
    differences += [one for one in of_model if one[0] not in known]
    if differences:
        shown = "; ".join(f"{key} was {json.dumps(a)} and is now {json.dumps(b)}" for key, a, b in differences)
        raise ValueError(
            f"{output} holds a run with another configuration: {shown}. Choose another run.output, or go on from its "
            "checkpoint all the same with run.resume=force"
        )


def _model_differences(saved: dict[str, Any] | None, model_config: Any) -> list[tuple[str, Any, Any]]:
    """Keys of the model's configuration that have other values than when the run began: the file at model.path may
    have been written to. Keys of another version of transformers are in one of both only, and do not count."""
    if saved is None:
        return []
    now = redacted(model_values(model_config))
    both = sorted(saved.keys() & now.keys())
    return [(f"model.config.{key}", saved[key], now[key]) for key in both if saved[key] != now[key]]


def _check_moments(saved: dict[str, Any], now: dict[str, Any], output: Path) -> None:
    """Raises ValueError for another optimiser, or DeepSpeed's at another stage: what a checkpoint holds beside the
    weights is of its own."""
    old, new = (BEFORE | flat(cfg) for cfg in (saved, now))
    # At stage 3 DeepSpeed's files have other names than at 1 and 2, which have the same.
    stages = {old.get("engine.zero_stage"), new.get("engine.zero_stage")}
    key = "engine.zero_stage" if 3 in stages and len(stages) == 2 else "optim.name"
    if old.get(key) != new.get(key):
        raise ValueError(
            f"{key} was {json.dumps(old.get(key))} and is now {json.dumps(new.get(key))}: the moments in the "
            "checkpoint are of the other one, and it cannot go on as this one, not even with run.resume=force. Its "
            f"weights alone can: ringattn export {output} OUT, then model.path=OUT"
        )


def _check_shapes(saved: dict[str, Any], lora: Lora | None, model: nn.Module) -> None:
    try:
        before = empty_model(config_of(saved), lora)
    except Exception:  # by another version of transformers: the engine will say whether its files fit
        return
    check_same_shapes(before, model)

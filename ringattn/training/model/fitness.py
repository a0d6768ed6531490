"""Whether a model fits: the recipe's mesh, its attention, its checkpoint. On the meta device, before anything runs."""

import importlib.util
import os
import shutil
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig
from torch import nn

from ringattn import hf
from ringattn.hf.elementwise import Elementwise
from ringattn.hf.tree_checks import carrying_layer
from ringattn.parallel.mesh.shape import MeshShape
from ringattn.training.model.architecture import reason_of
from ringattn.training.model.freezing import freeze
from ringattn.training.model.lora import Lora, put_lora
from ringattn.training.model.models import empty_model

# Attention dropout by the names that configurations give it.
DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")


def check_attention(config: Any, lora: Lora | None = None, frozen: Sequence[str] = ()) -> nn.Module:
    """The model without weights. Raises ValueError if it cannot be built, or split over a sequence axis, or given the
    factors of `lora`, or frozen as `frozen` says."""
    text = config.get_text_config()
    queries, keys = text.num_attention_heads, getattr(text, "num_key_value_heads", None)
    if text.num_hidden_layers < 1:
        raise ValueError(f"model.config.num_hidden_layers must be at least 1, got {text.num_hidden_layers}")
    if keys is not None and (keys < 1 or queries % keys):
        raise ValueError(
            f"model.config.num_attention_heads={queries} must be a multiple of model.config.num_key_value_heads={keys}"
        )
    for key in DROPOUTS:
        if getattr(text, key, 0.0):
            raise ValueError(
                f"model.config.{key}={getattr(text, key)}: attention dropout has no seed that ranks share; set "
                f"model.config.{key}=0 (with + before it where it is not in the file)"
            )
    try:
        model = empty_model(config)
    except Exception as error:  # whatever wrong values lead to inside of transformers
        raise ValueError(f"model.config: {type(config).__name__} makes no model: {reason_of(error)}") from None
    try:
        hf.check_model(model)
    except NotImplementedError as error:
        raise ValueError(f"model: {error}") from None
    if lora is not None:
        put_lora(model, lora)
    freeze(model, frozen)
    return model


def check_sharing(cfg: DictConfig, config: Any, empty: nn.Module) -> None:
    """Raises ValueError for a model that cannot compute common prefixes of documents once."""
    if not cfg.data.share_prefixes:
        return
    told = carrying_layer(empty)
    if told is None and "chunked_attention" in (getattr(config.get_text_config(), "layer_types", None) or ()):
        told = "chunked attention, whose chunks are counted in the whole stream of a document"
    if told is not None:
        raise ValueError(
            f"data.share_prefixes=true: {type(empty).__name__} has {told}, which cannot be given trees of sequences; "
            "use data.share_prefixes=false"
        )


def check_head_chunks(cfg: DictConfig, shape: MeshShape, config: Any) -> None:
    """Raises ValueError for chunks into which the key heads of a rank do not part: fewer would be taken unnoticed."""
    chunks = cfg.parallel.head_chunks or 1
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    if chunks > 1 and (heads % shape.ulysses or (heads // shape.ulysses) % chunks):
        raise ValueError(
            f"parallel.head_chunks={chunks} must divide the {heads} key heads of the model over "
            f"{shape.ulysses} ulysses ranks, {heads / shape.ulysses:g} each"
        )


def check_same_shapes(saved: nn.Module, model: nn.Module) -> None:
    """Raises ValueError if the weights of a checkpoint do not fit a model."""
    before = {name: tuple(value.shape) for name, value in saved.named_parameters()}
    now = {name: tuple(value.shape) for name, value in model.named_parameters()}
    differing = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    if differing:
        shown = ", ".join(f"{name} {before.get(name)} → {now.get(name)}" for name in differing[:3])
        raise ValueError(
            f"the checkpoint is of another model and cannot go on as this one, not even with run.resume=force: "
            f"{len(differing)} weights differ: {shown}"
        )


def compile_mode(cfg: DictConfig, device_type: str, model: nn.Module) -> str:
    """What `engine.compile` comes to: "none" or "elementwise", which "auto" is on GPUs where it can be.

    Raises ValueError for "elementwise" without the compiler that it needs on `device_type`, or anything to do.
    """
    asked = str(cfg.engine.compile)
    if asked == "elementwise":
        _check_compile(cfg, device_type, model)
    if asked != "auto":
        return asked
    if device_type != "cuda":  # seconds of a compiler for steps that take milliseconds
        return "none"
    try:
        _check_compile(cfg, device_type, model)
    except ValueError:
        return "none"
    return "elementwise"


def _check_compile(cfg: DictConfig, device_type: str, model: nn.Module) -> None:
    if device_type == "cuda":
        there, needed = importlib.util.find_spec("triton") is not None, "the package triton"
    else:
        compilers = ("c++", "g++", "clang++")
        there, needed = "CXX" in os.environ or any(map(shutil.which, compilers)), f"one of {', '.join(compilers)}"
    if not there:
        raise ValueError(
            f"engine.compile={cfg.engine.compile} needs {needed}, and it is not there; use engine.compile=none"
        )
    try:
        Elementwise(model).undo()
    except NotImplementedError as error:
        raise ValueError(f"engine.compile={cfg.engine.compile}: {error}; use engine.compile=none") from None

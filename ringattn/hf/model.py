"""`parallelize`: a transformers model attends over the ranks of a mesh, until `Handle.undo`."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ringattn.compiled import compiled_calls, reset_compiled_calls
from ringattn.hf.adapters import check_adapters
from ringattn.hf.attention import attend
from ringattn.hf.cached import DecodeStep
from ringattn.hf.changes import check_changes, same_parameters
from ringattn.hf.empty import layout_of, put_in, take_out
from ringattn.hf.handle import NAME, OPTIONS, Handle, set_attention
from ringattn.hf.image_features import check_images_placed, expect_images, put_exchange
from ringattn.hf.images import embedding_needs
from ringattn.hf.keywords import check_keywords
from ringattn.hf.local_draws import LocalDraws, fork_before, join_after
from ringattn.hf.loss import GlobalLoss, check_is_share, check_is_usual
from ringattn.hf.masks import note_mask
from ringattn.hf.memory import ModelMemory, without_logits
from ringattn.hf.recurrent import put_in_place, recurrent_layers
from ringattn.hf.router_loss import check_router_loss, gives_router_loss, wanted
from ringattn.hf.same_batch import check_same_batch
from ringattn.hf.support import check_model, length_limits, text_model
from ringattn.hf.token_ids import Vocabulary, check_noted
from ringattn.hf.tree_checks import check_trees
from ringattn.memory.settings import MemorySettings
from ringattn.parallel.layout import Layout
from ringattn.parallel.mesh.mesh import SequenceMesh


def parallelize(model: Any, mesh: SequenceMesh, memory: MemorySettings | None = None, **options: Any) -> Handle:
    """Make a transformers model attend over the sequence ranks of `mesh`, in place.

    Its `loss` becomes the mean over all targets of the global batch, the same number on every rank. The
    gradient is scaled so that the *average* of the parameters' gradients over all ranks, which FSDP, DDP and DeepSpeed
    take, is the gradient of that mean. Of a multimodal model the text decoder alone is split. It takes text; images,
    each of which is computed on one rank (`ringattn.hf.vision`); and embeddings of the global batch with images in
    them (`inputs_embeds`) where these are all that it needs to know of an image; else they are refused, see
    `ringattn.hf.images`.

    Arguments:
        model: a decoder from transformers whose attention goes through its AttentionInterface; also inside of PEFT,
            DistributedDataParallel or torch.compile.
        memory: what is alive in a step, see `MemorySettings`; with a `loss_tile` the model gives a loss and no logits
            for batches with labels. Put it in before an engine shards the model. None changes nothing.
        options: keywords of `parallel_attention`: scheme, backend, stages, keep_keys, wide_reduce, memory_limit,
            head_chunks, deterministic.

    Returns: a `Handle`; after the first forward pass it has verified that every attention layer came here once.
    Raises NotImplementedError naming what the model has that is not supported, MemoryError where `memory` wants more of
    the host than there is.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    wrapped, model = model, unwrapped(model)
    before: Any = getattr(model, "_ringattn", None)
    if before is not None and before.mesh is None:  # the ranks of a process that pickled it
        before = before.undo()
    if before is not None:
        raise ValueError(f"model was parallelized already, on {before.mesh}; its handle's undo() reverts that")
    if not isinstance(mesh, SequenceMesh):
        raise ValueError(f"mesh must come from init_mesh, got {type(mesh).__name__}")
    if unknown := set(options) - OPTIONS:
        raise TypeError(f"parallelize got unknown options {sorted(unknown)}; it takes {sorted(OPTIONS)}")
    if memory is not None and not isinstance(memory, MemorySettings):
        raise ValueError(f"memory must be MemorySettings or None, got {type(memory).__name__}")
    layers = check_model(model)
    check_adapters(wrapped)
    limits, needs = length_limits(model.config.get_text_config()), embedding_needs(model)
    handle = Handle(model, mesh, options, layers, limits, needs, LocalDraws(mesh.device, dist.get_rank()))
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, note_mask)
    handle._implementation = model.config.get_text_config()._attn_implementation
    handle._loss = model.__dict__.get("_loss_function")
    for module in [model, *text_model(model).modules()]:
        module._ringattn = handle
    try:
        _put_in_place(handle, memory)
    except BaseException:
        handle.undo()
        raise
    return handle


def _put_in_place(handle: Handle, memory: MemorySettings | None) -> None:
    """Everything that a handle undoes: attention, memory settings, loss, and hooks in the order in which they run."""
    model, hooks = handle.model, handle._hooks
    set_attention(model, NAME)
    if model.config.get_text_config()._attn_implementation != NAME:
        raise NotImplementedError(f"{type(model).__name__} does not let its attention be replaced")
    _check_reached(model)
    handle.states = recurrent_layers(text_model(model))
    if memory is not None:
        handle.memory = ModelMemory(model, memory, handle.mesh.device)
    _take_loss(handle)
    hooks.append(model.register_forward_pre_hook(_before_forward, with_kwargs=True))
    hooks.append(model.register_forward_hook(_after_forward, with_kwargs=True))
    for inner in _decoders(model):
        hooks.append(inner.register_forward_pre_hook(fork_before))
        hooks.append(inner.register_forward_hook(join_after, always_call=True))
        hooks.append(inner.register_forward_pre_hook(put_in, with_kwargs=True))
        hooks.append(inner.register_forward_hook(take_out, with_kwargs=True))
    hooks.extend(put_in_place(model, text_model(model), handle.states))
    put_exchange(handle, handle.needs.towers)
    hooks.append(model.register_forward_pre_hook(_tell_head, with_kwargs=True))


def unwrapped(model: Any) -> Any:
    """The transformers model inside of PEFT, a data-parallel wrapper or torch.compile."""
    from transformers import PreTrainedModel

    outer = type(model).__name__
    while not isinstance(model, PreTrainedModel):
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(inner := getattr(model, "_orig_mod", getattr(model, "module", None)), nn.Module):
            model = inner
        else:
            raise ValueError(f"model must be a transformers PreTrainedModel, got {outer}")
    return model


def _check_reached(model: Any) -> None:
    """Layers that were copied (to make a model deeper) look at a configuration of their own."""
    for path, layer in text_model(model).named_modules():
        config = getattr(layer, "config", None)
        if "Attention" in type(layer).__name__ and getattr(config, "_attn_implementation", NAME) != NAME:
            raise NotImplementedError(
                f"{type(model).__name__} has {type(layer).__name__} at {path} with a configuration of its own, which "
                "does not let its attention be replaced: give it the model's (layer.config = model.config)"
            )


def _decoders(model: Any) -> list[nn.Module]:
    """The model and its parts down to the decoder of its text, which a caller may run by themselves."""
    text = text_model(model)
    return list(dict.fromkeys([model, model.base_model, text, text.base_model]))


def _take_loss(handle: Handle) -> None:
    """Make the model's loss function, also one that was set since, the mean over all ranks."""
    model = handle.model
    if isinstance(model.loss_function, GlobalLoss):
        return
    config = model.config.get_text_config()
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    if handle.memory is not None and handle.memory.head is not None:
        check_is_usual(model.loss_function)
    check_is_share(model.loss_function, config.vocab_size, device)
    handle._loss = model.__dict__.get("_loss_function")
    model.loss_function = GlobalLoss(model.loss_function, handle.mesh)


def _check_attention(handle: Handle) -> None:
    """Raises NotImplementedError if the model was given another attention since it was parallelized."""
    model = handle.model
    configs = [model.config.get_text_config(), *(layer.config for layer in handle._called if hasattr(layer, "config"))]
    found = next((config._attn_implementation for config in configs if config._attn_implementation != NAME), NAME)
    if found != NAME:
        raise NotImplementedError(
            f"{type(model).__name__} has attn_implementation={found!r} by now, which would attend to a rank's own "
            f"tokens: it was parallelized, and something set it since (set_attn_implementation, or a model that "
            "shares its configuration). handle.undo() gives the plain model back; parallelize makes it ringattn again"
        )


def _before_forward(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Check the keywords. The handle is the model's own, since hooks go along when a model is copied."""
    handle: Handle = model._ringattn
    if isinstance(kwargs.get("cu_seq_lens_q"), DecodeStep):  # made by the ranks themselves, after a checked batch
        handle.calls.clear()
        handle.state_calls.clear()
        return
    changed = check_changes(handle)
    _check_attention(handle)
    layout = check_keywords(handle, args, kwargs)
    check_trees(handle, layout, kwargs)
    if wanted(model, kwargs):
        check_router_loss(model, bool(handle.memory and handle.memory.mlps), layout.docs)
    expect_images(handle, layout, kwargs)
    if changed:
        same_parameters(model, handle.mesh)
        handle.draws.parts = [*model.modules()]
    _take_loss(handle)
    model.loss_function.expect()
    handle.calls.clear()
    handle.state_calls.clear()
    if not handle.verified:
        handle._called.clear()
        check_same_batch(layout, handle.mesh)
    # After the comparison: of the same batch all ranks say the same.
    check_noted(layout, Vocabulary.of(model, handle.needs), on_device=not handle.verified)
    reset_compiled_calls(layout)


def _tell_head(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Announce the targets to a tiled head, those of the row that an empty rank was given included."""
    handle: Handle = model._ringattn
    if handle.memory is not None:
        handle.memory.expect(kwargs, model.loss_function)


def _after_forward(model: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """Verify that every attention layer and every loss came from here."""
    handle: Handle = model._ringattn
    layout = layout_of(kwargs["cu_seq_lens_q"])
    check_images_placed(handle)
    handle.verify(0 if isinstance(layout, DecodeStep) else compiled_calls(layout))
    if isinstance(layout, Layout) and gives_router_loss(model, kwargs, output):
        handle.routers.replace(model, handle.mesh, kwargs, output)
    elif kwargs.get("labels") is not None and not model.loss_function.is_whole(_loss_of(output)):
        raise NotImplementedError(
            f"{type(model).__name__} computes its loss itself, or adds something to it, on a rank's tokens alone: "
            "leave labels out of its keywords and compute the loss from logits and shift_labels"
        )
    return without_logits(output)


def _loss_of(output: Any) -> Any:
    """The loss of a ModelOutput, or of the tuple that stands for one: a scalar in front."""
    first = output[0] if isinstance(output, tuple) else getattr(output, "loss", None)
    return first if isinstance(first, torch.Tensor) and first.dim() == 0 else None

"""Hugging Face models on a sequence mesh: `parallelize(model, mesh)`, then `model(**shard_batch(batch, docs, mesh))`.

The layout of a batch travels to every attention layer as the keyword `cu_seq_lens_q`, the one that transformers passes
on in all families and under both kinds of gradient checkpointing. It is the `Layout` itself: host integers that no
wrapper moves to a device, and the only truth about documents. Nothing is inferred from local positions or masks.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ringattn.attention import parallel_attention
from ringattn.documents import Documents
from ringattn.mask import Mask
from ringattn.parallel.layout import Layout
from ringattn.parallel.mesh import SequenceMesh

NAME = "ringattn"
IGNORE_INDEX = -100

# Keywords that reach an attention function without changing the mathematics of a training forward pass. Any other one
# is refused: an unknown keyword may be a feature.
INERT = frozenset(
    {
        "cache_position",
        "cu_seq_lens_k",
        "labels",
        "layer_idx",
        "logits_to_keep",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "shift_labels",
        "use_cache",
    }
)
LAYER_TYPES = frozenset({"full_attention", "sliding_attention", "chunked_attention"})


@dataclass
class Handle:
    """What `parallelize` did to a model; `layers_seen` are the attention layers that came through ringattn."""

    mesh: SequenceMesh
    options: dict[str, Any]
    layers: int
    layers_seen: set[int] = field(default_factory=set)


def parallelize(model: nn.Module, mesh: SequenceMesh, **options: Any) -> Handle:
    """Make a transformers model attend over the sequence ranks of `mesh`, in place.

    Its `loss` becomes the mean over all targets of the global batch, the same number on every rank. The
    gradient is scaled so that the *average* of the parameters' gradients over all ranks, which FSDP, DDP and DeepSpeed
    take, is the gradient of that mean.

    Arguments:
        model: a decoder from transformers whose attention goes through its AttentionInterface.
        options: keywords of `parallel_attention`: scheme, backend, stages, keep_keys, wide_reduce, memory_limit,
            deterministic.

    Raises NotImplementedError naming what the model has that is not supported.
    """
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
    allowed = {"scheme", "backend", "stages", "keep_keys", "wide_reduce", "memory_limit", "deterministic"}
    before: Any = getattr(model, "_ringattn", None)
    if before is not None:
        raise ValueError(f"model was parallelized already, on {before.mesh}")
    if unknown := set(options) - allowed:
        raise TypeError(f"parallelize got unknown options {sorted(unknown)}; it takes {sorted(allowed)}")
    layers = check_model(model)
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    model.set_attn_implementation(NAME)
    if model.config.get_text_config()._attn_implementation != NAME:
        raise NotImplementedError(f"{type(model).__name__} does not let its attention be replaced")
    handle = Handle(mesh, options, layers)
    for module in model.modules():
        module._ringattn = handle  # type: ignore[assignment]
    model.loss_function = _GlobalLoss(model.loss_function, mesh)
    _verify_first_forward(model, handle)
    return handle


def shard_batch(
    batch: Mapping[str, Tensor],
    docs: Documents,
    mesh: SequenceMesh,
    policy: str = "auto",
    mask: Mask | Sequence[tuple[Mask, float]] | None = None,
) -> dict[str, Any]:
    """This rank's part of a packed batch, as keywords of the model. No communication.

    Arguments:
        batch: `input_ids` and optionally `labels`, (1, T) or (T,), labels *not* shifted, -100 where there is no target.
        docs: the documents of the T tokens.
        policy, mask: see `Layout`; for a model with several masks pairs (mask, number of layers).

    Returns: input_ids and position_ids (1, t); with labels also labels, shift_labels (1, t) and the number of targets
    in the T tokens; and the layout.
    Raises ValueError for other keys or shapes.
    """
    if unknown := set(batch) - {"input_ids", "labels"}:
        raise ValueError(f"batch may hold input_ids and labels, got also {sorted(unknown)}")
    for name, x in batch.items():
        if x.shape not in ((docs.total,), (1, docs.total)):
            raise ValueError(f"{name} must have shape ({docs.total},) or (1, {docs.total}), got {tuple(x.shape)}")
    layout = Layout(docs, mesh, policy, mask=mask)
    flat = {name: x.reshape(-1) for name, x in batch.items()}
    device = flat["input_ids"].device
    local: dict[str, Any] = {"input_ids": layout.shard(flat["input_ids"])[None]}
    local["position_ids"] = layout.position_ids(device)[None]
    if "labels" in flat:
        targets = shifted_labels(flat["labels"], docs)
        local["labels"] = layout.shard(flat["labels"])[None]
        local["shift_labels"] = layout.shard(targets)[None]
        local["num_items_in_batch"] = (targets != IGNORE_INDEX).sum()
    return local | attention_kwargs(layout) | {"use_cache": False}


def shifted_labels(labels: Tensor, docs: Documents) -> Tensor:
    """Each token's target: the label of the next token of its document, -100 at ends and in padding. (T,) -> (T,)"""
    targets = torch.full_like(labels, IGNORE_INDEX)
    if docs.total:
        targets[:-1] = labels[1:]
    ends = [start + size - 1 for start, size in zip(docs.starts, docs.lengths, strict=True) if size]
    if ends:
        targets[torch.tensor(ends, device=labels.device)] = IGNORE_INDEX
    for start, stop in docs.padding:
        targets[start:stop] = IGNORE_INDEX
    return targets


def attention_kwargs(layout: Layout) -> dict[str, Any]:
    """Keywords of a model's forward that tell its attention layers the layout of the batch."""
    return {"cu_seq_lens_q": layout}


def check_model(model: Any) -> int:
    """The number of attention layers of a transformers model, which may be on the meta device.

    Raises NotImplementedError naming what is not supported.
    """
    name = type(model).__name__
    config = model.config.get_text_config()
    if model.config.is_encoder_decoder:
        raise NotImplementedError(f"{name} is an encoder-decoder; only decoders are supported")
    layer_types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    if other := sorted(set(layer_types) - LAYER_TYPES):
        raise NotImplementedError(
            f"{name} has layers of type {', '.join(other)}, which cannot be split over a sequence"
        )
    if not model._supports_attention_backend:
        raise NotImplementedError(f"{name} computes its attention itself, outside transformers' AttentionInterface")
    return len(layer_types)


def _verify_first_forward(model: nn.Module, handle: Handle) -> None:
    """After the first forward, make sure that attention really came here: some models accept the name and ignore it."""

    def check(*_: Any) -> None:
        hook.remove()
        if len(handle.layers_seen) != handle.layers:
            raise NotImplementedError(
                f"{type(model).__name__} ran {len(handle.layers_seen)} of its {handle.layers} attention layers through "
                "ringattn: its attention cannot be replaced"
            )

    hook = model.register_forward_hook(check)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The AttentionInterface function: (1, H, t, D), (1, K, t, D), (1, K, t, V) -> (1, t, H, V)."""
    handle: Handle | None = getattr(module, "_ringattn", None)
    layout = kwargs.pop("cu_seq_lens_q", None)
    if handle is None or not isinstance(layout, Layout):
        raise ValueError(
            "ringattn's attention needs parallelize(model, mesh) and a batch from shard_batch (or the keywords of "
            f"attention_kwargs(layout)); got cu_seq_lens_q={type(layout).__name__}"
        )
    if attention_mask is not None:
        raise ValueError("attention_mask must be None: documents say who attends to whom")
    if query.shape[0] != 1:
        raise ValueError(f"a packed batch has batch size 1, got {query.shape[0]}: lay the rows end to end as documents")
    options = _options(module, kwargs)
    handle.layers_seen.add(getattr(module, "layer_idx", len(handle.layers_seen)))
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return parallel_attention(q, k, v, layout, **options, **handle.options)[None], None


def _options(module: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """transformers' keywords as those of `parallel_attention`; raises TypeError for one that is not known."""
    if kwargs.pop("output_attentions", False):
        raise NotImplementedError("output_attentions: flash attention never forms the attention matrix")
    causal = kwargs.pop("is_causal", None)
    causal = getattr(module, "is_causal", True) if causal is None else causal
    window, chunk = (-1, -1), None
    if (size := kwargs.pop("sliding_window", None)) is not None:
        window = (size - 1, 0 if causal else size - 1)  # transformers counts the query itself
    config: Any = getattr(module, "config", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types and layer_types[module.layer_idx] == "chunked_attention":
        chunk = config.attention_chunk_size
    if kwargs.get("dropout"):
        raise NotImplementedError("attention_dropout must be 0 in the model's configuration: it has no seed to share")
    kwargs.pop("dropout", None)
    options = {
        "mask": Mask(bool(causal), window, chunk),
        "softmax_scale": kwargs.pop("scaling", None),
        "softcap": kwargs.pop("softcap", None),
        "sinks": kwargs.pop("s_aux", None),
    }
    if unknown := {name for name, value in kwargs.items() if value is not None} - INERT:
        raise TypeError(f"attention got keywords that ringattn does not know: {sorted(unknown)}")
    return options


def _mask(*args: Any, attention_mask: Tensor | None = None, use_vmap: bool = False, **kwargs: Any) -> None:
    """The AttentionMaskInterface function: no mask is needed, and one that would be lost is refused."""
    if use_vmap:
        raise NotImplementedError("the model asks for a custom mask (prefix or image tokens), which is not supported")
    if attention_mask is not None:
        raise ValueError("attention_mask must be None: give padding and packing as Documents")


class _GlobalLoss:
    """A model's loss function, as the mean over the targets of all ranks: of every part and every replica."""

    def __init__(self, local: Callable[..., Tensor], mesh: SequenceMesh) -> None:
        self.local, self.mesh = local, mesh

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("num_items_in_batch") is None or kwargs.get("shift_labels") is None:
            raise ValueError("the loss of a sharded batch needs shift_labels and num_items_in_batch from shard_batch")
        targets = torch.as_tensor(kwargs["num_items_in_batch"], device=kwargs["shift_labels"].device).clone()
        if self.mesh.data > 1:
            dist.all_reduce(targets, group=self.mesh.device_mesh.get_group("data"))
        kwargs["num_items_in_batch"] = targets.clamp_min(1)
        return _SumOverRanks.apply(self.local(*args, **kwargs))


class _SumOverRanks(torch.autograd.Function):
    """The sum of all ranks' values; the gradient is scaled for engines that average gradients over all ranks."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        total = local.detach().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * dist.get_world_size()

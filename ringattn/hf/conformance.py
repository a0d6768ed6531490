"""Is a parallelized model the model? Every document run alone is the truth, not transformers' own packing.

T tokens of the global batch, of which N are in documents; V entries of the vocabulary.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ringattn.documents import Documents
from ringattn.hf.attention import layer_type
from ringattn.hf.batch import shard_batch
from ringattn.hf.features import FEATURES
from ringattn.hf.handle import Handle
from ringattn.hf.loss import IGNORE_INDEX, shifted_labels
from ringattn.hf.recurrent import KNOWN
from ringattn.hf.shape import weighed_layers
from ringattn.parallel.mesh.mesh import SequenceMesh


@dataclass(frozen=True)
class Form:
    """A form in which batches come.

    Arguments:
        rows: the lengths of the documents of every row.
        size: tokens of a row; what documents leave is padding.
        side: where the padding is.
        metadata: how the batch tells its documents: "", "attention_mask", "segment_ids", "cu_seq_lens" or
            "position_ids".
    """

    name: str
    rows: tuple[tuple[int, ...], ...]
    size: int
    metadata: str = ""
    side: str = "right"

    @property
    def docs(self) -> Documents:
        starts, lengths = [], []
        for index, row in enumerate(self.rows):
            at = index * self.size + (self.size - sum(row) if self.side == "left" else 0)
            for length in row:
                starts.append(at)
                lengths.append(length)
                at += length
        return Documents(lengths, starts, len(self.rows) * self.size)

    def batch(self, vocabulary: int, device: torch.device | str = "cpu") -> dict[str, Any]:
        """Random ids and labels (some without a target), and the metadata."""
        docs, shape = self.docs, (len(self.rows), self.size)
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(3, vocabulary, shape, generator=generator)
        labels = ids.masked_fill(torch.rand(shape, generator=generator) < 0.2, IGNORE_INDEX)
        segments, positions = torch.full((docs.total,), -1), torch.zeros(docs.total, dtype=torch.int64)
        for index, (start, length) in enumerate(zip(docs.starts, docs.lengths, strict=True)):
            segments[start : start + length] = index
            positions[start : start + length] = torch.arange(length)
        tokens = (segments >= 0).view(shape)
        batch: dict[str, Any] = {"input_ids": ids.where(tokens, 0), "labels": labels.where(tokens, IGNORE_INDEX)}
        if self.metadata == "attention_mask":
            batch["attention_mask"] = tokens.long()
        elif self.metadata == "segment_ids":
            batch["segment_ids"] = segments.view(shape)
        elif self.metadata == "position_ids":
            batch["position_ids"] = positions.view(shape)
        elif self.metadata == "cu_seq_lens":
            cumulative = torch.tensor(docs.cu_seqlens, dtype=torch.int32)
            batch |= {"cu_seq_lens_q": cumulative, "cu_seq_lens_k": cumulative}
            batch |= {"max_length_q": max(docs.lengths), "max_length_k": max(docs.lengths)}
        return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in batch.items()}


def forms(longest: int = 7) -> tuple[Form, ...]:
    """One batch of every form; the longest of several packed documents has at least `longest` tokens."""
    s = -(-longest // 7)
    return (
        Form("plain", ((16 * s,),), 16 * s),
        Form("left padded", ((11 * s,), (16 * s,)), 16 * s, "attention_mask", "left"),
        Form("right padded", ((16 * s,), (9 * s,)), 16 * s, "attention_mask"),
        Form("packed", ((5 * s, 4 * s, 7 * s),), 16 * s, "cu_seq_lens"),
        Form("packed, padded tail", ((5 * s, 4 * s, 4 * s),), 16 * s, "segment_ids"),
        Form("two packed rows", ((5 * s, 4 * s, 7 * s), (9 * s, 7 * s)), 16 * s, "position_ids"),
    )


FORMS = forms()


@dataclass(frozen=True)
class Outcome:
    """What a batch gives: logits (N, V) of the tokens of documents in stream order, mean loss, gradients by name."""

    logits: Tensor
    loss: Tensor
    gradients: dict[str, Tensor] = field(repr=False)


@dataclass(frozen=True)
class Errors:
    """Largest difference of a logit relative to max(1, largest logit), of the loss, and of a parameter's gradient.

    The last is ‖difference‖ / ‖gradient‖ of one parameter; a gradient below 1e-4 of the whole (one that is zero but
    for rounding, such as that of a key bias) counts as that.
    """

    logits: float
    loss: float
    gradients: float
    worst: str

    def within(self, tolerance: float) -> bool:
        return max(self.logits, self.loss, self.gradients) <= tolerance  # False for NaN


def alone(model: Any, form: Form) -> Outcome:
    """The truth: every document by itself through the model as it is, without padding."""
    model.zero_grad()
    batch = form.batch(vocabulary_of(model), model.device)
    docs = form.docs
    ids, targets = batch["input_ids"].flatten(), shifted_labels(batch["labels"].flatten(), docs)
    logits, total = [], torch.zeros((), device=model.device)
    for start, length in zip(docs.starts, docs.lengths, strict=True):
        part = slice(start, start + length)
        out = model(input_ids=ids[None, part], use_cache=False).logits[0]
        total = total + nn.functional.cross_entropy(wide(out), targets[part], reduction="sum")
        logits.append(out.detach())
    loss = total / (targets != IGNORE_INDEX).sum()
    loss.backward()
    return Outcome(torch.cat(logits), loss.detach(), gradients_of(model))


def together(model: Any, mesh: SequenceMesh, form: Form, policy: str = "auto") -> Outcome:
    """The whole batch at once through a parallelized model, gathered from all ranks. Collective."""
    model.zero_grad()
    local = _sharded(model, mesh, form.batch(vocabulary_of(model), model.device), policy)
    output = model(**local)
    output.loss.backward()
    gradients = averaged_gradients(model)
    logits = local["cu_seq_lens_q"].unshard(output.logits[0].detach())
    return Outcome(logits[_tokens(form.docs)], output.loss.detach(), gradients)


def _sharded(model: Any, mesh: SequenceMesh, batch: dict[str, Any], policy: str) -> dict[str, Any]:
    """A batch on the layout that the Trainer gives it."""
    layers = weighed_layers(model) if policy == "auto" else None
    return shard_batch(batch, None, mesh, policy, layers=layers)


def differences(found: Outcome, truth: Outcome) -> Errors:
    """How far an outcome is from the truth; both have the same parameters and tokens."""
    scale = max(1.0, float(truth.logits.abs().max()))
    whole = torch.stack([x.double().norm() for x in truth.gradients.values()]).norm()
    errors = {
        name: float((found.gradients[name] - x).double().norm() / torch.maximum(x.double().norm(), 1e-4 * whole))
        for name, x in truth.gradients.items()
    }
    worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
    return Errors(
        logits=float((found.logits - truth.logits).abs().max()) / scale,
        loss=float((found.loss - truth.loss).abs() / truth.loss.abs()),
        gradients=errors[worst],
        worst=worst,
    )


@dataclass(frozen=True)
class Leak:
    """The gradient that the logits of one document have in the embeddings, a token's being its largest element.

    Arguments:
        outside: the largest of all tokens of other documents; 0 if nothing leaks.
        inside: the smallest of the document's own tokens; above 0 if all of them are seen.
    """

    outside: float
    inside: float


def leak(model: Any, mesh: SequenceMesh, form: Form, document: int, policy: str = "auto") -> Leak:
    """How much one document sees of the others. Collective; the model is parallelized."""
    batch = form.batch(vocabulary_of(model), model.device)
    local = _sharded(model, mesh, {name: x for name, x in batch.items() if name != "labels"}, policy)
    layout, docs = local["cu_seq_lens_q"], form.docs
    leaves: list[Tensor] = []

    def as_leaf(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    hook = model.get_input_embeddings().register_forward_hook(as_leaf)
    try:
        logits = model(**local).logits[0].float()
    finally:
        hook.remove()
    chosen = torch.zeros(docs.total, 1, device=logits.device)
    start, length = docs.starts[document], docs.lengths[document]
    chosen[start : start + length] = 1
    weights = torch.randn(docs.total, logits.shape[-1], generator=torch.Generator().manual_seed(2)).to(logits.device)
    (logits * layout.shard(chosen * weights)).sum().backward()
    grad = leaves[0].grad
    assert grad is not None
    gradient = layout.unshard(grad[0, : layout.tokens()]).float().abs().amax(-1)
    inside = gradient[start : start + length]
    return Leak(float((gradient * (1 - chosen[:, 0])).max()), float(inside.min()))


def feature_changes(model: Any, mesh: SequenceMesh, handle: Handle, form: Form) -> dict[tuple[int, str], float]:
    """For each layer and feature that it asks for: how far the logits move when it is left out. Collective."""
    batch = form.batch(vocabulary_of(model), model.device)
    local = shard_batch({name: x for name, x in batch.items() if name != "labels"}, None, mesh)
    changes = {}
    with torch.no_grad():
        whole = model(**local).logits
        for layer, asked in sorted(handle.asked.items()):
            for feature in sorted(asked):
                handle.without[layer] = (feature,)
                moved = (model(**local).logits - whole).abs().float()
                del handle.without[layer]
                largest = moved.max() if moved.numel() else moved.new_zeros(())
                dist.all_reduce(largest, dist.ReduceOp.MAX)
                changes[layer, feature] = float(largest)
    return changes


def expected_features(model: Any) -> dict[int, frozenset[str]]:
    """What configuration and weights say that each attention layer needs; the layers' calls must say the same."""
    config = model.config.get_text_config()
    sinks = {}
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        name = type(module).__name__
        if isinstance(index, int) and "Attention" in name and name not in KNOWN and "Layer" not in name:
            sinks[index] = getattr(module, "sinks", None) is not None, module
    everywhere = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    expected = {}
    for index, (has_sinks, module) in sinks.items():
        kind = layer_type(module)
        needs = {
            "window": kind == "sliding_attention" or (kind is None and bool(everywhere)),
            "chunk": kind == "chunked_attention",
            "softcap": bool(getattr(config, "attn_logit_softcapping", None)),
            "sinks": has_sinks,
        }
        expected[index] = frozenset(name for name in FEATURES if needs[name])
    return expected


def wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def vocabulary_of(model: Any) -> int:
    return model.config.get_text_config().vocab_size


def averaged_gradients(model: nn.Module) -> dict[str, Tensor]:
    """The mean of all ranks' gradients by name. Collective."""
    gradients = gradients_of(model)
    for gradient in gradients.values():
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    return gradients


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """The gradient of every parameter by name; zero where there is none (an expert without tokens)."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def _tokens(docs: Documents) -> Tensor:
    """Global indices of the tokens of documents."""
    parts = [torch.arange(start, start + size) for start, size in zip(docs.starts, docs.lengths, strict=True)]
    return torch.cat(parts)

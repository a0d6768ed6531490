"""Trees of sequences in a transformers model: this rank's part of them, their loss, and log-probabilities.

t tokens of this rank.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ringattn.hf.batch import LABELS, attention_kwargs
from ringattn.hf.handle import Handle
from ringattn.hf.memory import note_targets, noted_triples
from ringattn.hf.model import unwrapped
from ringattn.hf.same_batch import note_batch
from ringattn.hf.token_ids import Noted, note_ids
from ringattn.hf.tree_checks import TOKENS, needs_tiles
from ringattn.kept import keep
from ringattn.mask import Mask
from ringattn.parallel.layout import Layout
from ringattn.parallel.mesh.mesh import SequenceMesh
from ringattn.trees import Trees


def shard_trees(
    trees: Trees,
    mesh: SequenceMesh,
    policy: str = "auto",
    mask: Mask | Sequence[tuple[Mask, float]] | None = None,
    items: float | None = None,
) -> dict[str, Any]:
    """This rank's part of trees, as keywords of a model with a tiled loss: `model(**shard_trees(trees, mesh)).loss`.

    The loss is the sum over the original sequences of weight × loss, divided by `items`. No communication; the trees
    are the same on every rank of a sequence. `labels` and `shift_labels` only ask for the loss: its targets are the
    triples that go with the layout.

    Arguments:
        policy, mask: those of `Layout`; for a model with several masks pairs (mask, number of layers).
        items: what the loss is divided by, greater than 0, such as the number of sequences, or the items of all the
            trees whose gradients are added up. Replicas' numbers are added. Default: the sum of all weights, which must
            be greater than 0 then, unless all are 0.

    Returns: input_ids, position_ids, labels, shift_labels (1, t) on the mesh's device, num_items_in_batch, and the
    layout as `cu_seq_lens_q`.
    Raises ValueError for trees without a token, and for weights whose sum nothing can be divided by.
    """
    if not isinstance(trees, Trees):
        raise ValueError(f"trees must be Trees, got {type(trees).__name__}; build them with Trees(sequences)")
    if not len(trees.tokens):
        raise ValueError(f"trees must hold a token, got {trees}")
    items = _items(trees, items)
    layout = Layout(trees.docs, mesh, policy, mask=mask)
    note_batch(layout, trees.tokens)
    note_ids(layout, Noted(trees.tokens, "the sequences of trees", lambda row: _place(trees, row)))
    keep(layout, TOKENS, trees.tokens)
    local = trees.targets.shard(layout)
    note_targets(layout, local)
    labels = local.labels_by_row[None].to(mesh.device)
    return {
        "use_cache": False,
        "input_ids": layout.shard(trees.tokens)[None].to(mesh.device),
        "position_ids": layout.position_ids(mesh.device)[None],
        "labels": labels,
        "shift_labels": labels,
        "num_items_in_batch": torch.full((), items, dtype=torch.float64, device=mesh.device),
    } | attention_kwargs(layout)


def sequence_logprobs(model: Any, batch: Mapping[str, Any], trees: Trees) -> tuple[Tensor, ...]:
    """The log-probability of each token of each original sequence, given those before it: (n - 1,) from its second on.

    Every rank gets all of them. They are differentiable, for objectives that are no weighted sum; every rank computes
    the same objective from them, whose backward pass gives each rank the gradients of its own tokens. Where an engine
    averages these, as DDP, FSDP and DeepSpeed do, scale the objective by `mesh.sequence_size`. Collective over the
    sequence ranks.

    Arguments:
        model: parallelized with a tiled loss; also inside of a wrapper.
        batch: from `shard_trees`.

    Raises NotImplementedError for a model without a tiled loss.
    """
    inner = unwrapped(model)
    handle, layout = getattr(inner, "_ringattn", None), batch.get("cu_seq_lens_q")
    if not isinstance(layout, Layout) or noted_triples(layout) is None:
        raise ValueError("batch must come from shard_trees, and have its layout as cu_seq_lens_q")
    if not isinstance(handle, Handle) or handle.memory is None or handle.memory.head is None:
        raise needs_tiles(inner)
    asked = {name: value for name, value in batch.items() if name not in (*LABELS, "num_items_in_batch")}
    handle.memory.wants_logprobs = True
    try:
        output = model(**asked)
    finally:
        handle.memory.wants_logprobs = False
    local = next(one for one in output if isinstance(one, Tensor)) if isinstance(output, tuple) else output.logits
    return trees.by_sequence(local, layout)


def _place(trees: Trees, row: int) -> str:
    """A sequence that goes through a row of the stream, and its token there."""
    for number in range(len(trees)):
        if len(at := (trees.rows(number) == row).nonzero()):
            return f"sequences[{number}][{int(at[0])}]"
    return f"token {row} of the stream"


def _items(trees: Trees, items: float | None) -> float:
    if items is not None:
        if isinstance(items, bool) or not isinstance(items, int | float) or not 0 < items < float("inf"):
            raise ValueError(f"items must be a number greater than 0, got {items!r}")
        return float(items)
    weights = trees.targets.weights
    if trees.targets.items > 0 or not bool(weights.any()):
        return trees.targets.items
    raise ValueError(
        f"the weights of the targets must have a sum greater than 0, which the loss is divided by, got "
        f"{trees.targets.items:g}: say what to divide by with items, such as the number of sequences"
    )

"""The load-balancing loss of routers, over all tokens of a stream instead of a rank's own.

Mixtures of experts in transformers add it to their loss where `output_router_logits` is set. With E experts, of which
each token goes to k, and N rows of router logits (tokens times layers), it is

    aux = E · Σ_e (c_e / N) · (p_e / N)

where c_e rows go to expert e, and p_e is the sum of the rows' probabilities for it (Switch Transformer, arXiv
2101.03961, equations 4 to 6). As a product of means it is more than the mean of what ranks find of their own tokens. So
after a forward pass c, p and N are added up over the ranks of a sequence, and the term in the model's loss is replaced.
That the model has this term, with which k and which coefficient, is found out in the first forward pass.

In the loss streams count by their share of the targets, those of replicas and those of an accumulated step.

Legend: n rows of one layer's logits on this rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ringattn.documents import Documents
from ringattn.hf.configuration import IN_TILES, asks_router_loss
from ringattn.hf.empty import Placeholder, layout_of
from ringattn.hf.loss import IGNORE_INDEX, GlobalLoss
from ringattn.kept import kept
from ringattn.kernels.call import to_device
from ringattn.parallel.layout import Layout
from ringattn.parallel.mesh.mesh import SequenceMesh

_FLAG = "output_router_logits"
_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")


def wanted(model: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a forward pass is asked for the loss of its routers, by a keyword or by the configuration."""
    told = kwargs.get(_FLAG)
    return asks_router_loss(model) if told is None else bool(told)


def check_router_loss(model: Any, tiled: bool, docs: Documents) -> None:
    """Raises NotImplementedError where the loss of routers cannot be had; no communication.

    Arguments:
        tiled: MLPs, and routers with them, run in tiles of tokens.
    """
    name = f"{type(model).__name__} has {_FLAG}=True"
    if tiled:
        raise NotImplementedError(f"mlp_tile: {name}, {IN_TILES}")
    if docs.segments:
        raise NotImplementedError(
            f"{name}, and sequences of the batch share what they begin with: a shared token would count once for all "
            "of them. Set the key to False, or give the sequences apart"
        )


def gives_router_loss(model: Any, kwargs: dict[str, Any], output: Any) -> bool:
    """Whether a model's output has the loss of its routers. Raises NotImplementedError for one without names."""
    if not wanted(model, kwargs):
        return False
    if isinstance(output, tuple):
        raise NotImplementedError(
            f"{type(model).__name__} has {_FLAG}=True and gives a tuple (return_dict=False), in which the loss of its "
            "routers cannot be told from the rest: leave return_dict out"
        )
    return getattr(output, "aux_loss", None) is not None


@dataclass
class RouterLoss:
    """The term of one model, and what was found out about it.

    Arguments:
        taken: experts that a token goes to; 0 while it is not known.
        coefficient: that the model's term was seen with; NaN while none was.
    """

    taken: int = 0
    coefficient: float = float("nan")

    @torch.compiler.disable
    def replace(self, model: Any, mesh: SequenceMesh, kwargs: dict[str, Any], output: Any) -> None:
        """Put the term of the whole stream into a model's output: `aux_loss`, the mean over replicas, and into `loss`
        if there is one. Collective.

        Raises NotImplementedError on all ranks of a sequence if on any of them the model's term is not the one known.
        """
        logits = [layer.flatten(0, -2) for layer in output.router_logits]
        _check_gradients(model, logits)
        if not self.taken:
            found = experts_taken(logits, output.aux_loss)
            _demand(found > 0, mesh, f"{type(model).__name__} has another loss of its routers than the one known")
            self.taken = found
        sums = _Sums.apply(self.taken, _counting(kwargs["cu_seq_lens_q"], logits[0]), *logits)
        aux = balance(*_SumOf.apply(sums, mesh.sequence_group).unflatten(0, (3, -1)))
        own, output["aux_loss"] = output.aux_loss, _SumOverReplicas.apply(aux / mesh.data, mesh)
        if kwargs.get("labels") is None:
            return
        loss: GlobalLoss = model.loss_function
        coefficient = coefficient_of(model)
        if coefficient != self.coefficient:
            _demand(
                loss.result is not None and _close(output.loss, loss.result + coefficient * own),
                mesh,
                f"the loss of {type(model).__name__} is not the sum of what its loss function gave and "
                f"{coefficient} times the loss of its routers",
            )
            self.coefficient = coefficient
        part = _SumOverReplicas.apply(aux * _share(kwargs, mesh, loss), mesh)
        output["loss"] = loss.result + coefficient * part
        loss.expect()


def _check_gradients(model: Any, logits: Sequence[Tensor]) -> None:
    """Raises NotImplementedError if the loss of routers would have no gradient though the model is trained."""
    if not torch.is_grad_enabled() or any(layer.requires_grad for layer in logits):
        return
    if model.training and any(parameter.requires_grad for parameter in model.parameters()):
        raise NotImplementedError(
            f"{type(model).__name__} has {_FLAG}=True, and no gradient reaches its routers' logits, as under reentrant "
            'checkpointing: set {"use_reentrant": False} in gradient_checkpointing_enable (the default there), or the '
            "key to False if all that comes before the routers is frozen"
        )


def balance(counts: Tensor, probabilities: Tensor, rows: Tensor) -> Tensor:
    """The loss of E experts from sums over rows: counts (..., E), probabilities (E,), and the number of rows, which is
    a number or (E,)."""
    rows = rows.clamp(min=1)
    return probabilities.shape[-1] * (counts / rows * (probabilities / rows)).sum(-1)


def experts_taken(logits: Sequence[Tensor], aux: Tensor) -> int:
    """The number of experts a token with which the formula gives what a model's own function gave; 0 if there is none.

    The loss grows with it, so that no other number fits. Logits are (n, E) a layer. Waits for the device.
    """
    experts, device = logits[0].shape[-1], logits[0].device
    counts = torch.zeros(experts**2, dtype=torch.int64, device=device)
    probabilities = torch.zeros(experts, dtype=torch.float32, device=device)
    for layer in logits:
        each = layer.detach().float().softmax(-1)
        ranked = each.argsort(-1, descending=True)
        counts += (ranked + experts * torch.arange(experts, device=device)).flatten().bincount(minlength=experts**2)
        probabilities += each.sum(0)
    rows = torch.tensor(float(sum(map(len, logits))))
    by_number = balance(counts.cpu().view(experts, experts).cumsum(0), probabilities.cpu(), rows)
    apart = (by_number / aux.detach().float().cpu() - 1).abs()
    best = int(apart.argmin())
    return best + 1 if apart[best] <= (1e-4 if logits[0].dtype.itemsize >= 4 else 2e-2) else 0


def coefficient_of(model: Any) -> float:
    """What a model multiplies the loss of its routers with. Raises NotImplementedError if it does not say."""
    for holder in (model, model.config.get_text_config(), model.config):
        for name in _COEFFICIENTS:
            if isinstance(value := getattr(holder, name, None), int | float):
                return float(value)
    raise NotImplementedError(f"{type(model).__name__} has {_FLAG}=True and none of {', '.join(_COEFFICIENTS)}")


def _counting(told: Layout | Placeholder, logits: Tensor) -> Tensor | None:
    """1 for rows of documents and 0 for others, (n,) in the precision of sums; None: all rows are of documents."""
    layout, wide = layout_of(told), torch.promote_types(logits.dtype, torch.float32)
    if isinstance(told, Placeholder):
        return logits.new_zeros(1, dtype=wide)
    if not layout.docs.padding:
        return None

    def make() -> Tensor:
        whole = torch.ones(layout.docs.total, dtype=wide)
        for start, stop in layout.docs.padding:
            whole[start:stop] = 0
        return to_device(layout.shard(whole), logits.device)

    return kept(layout, ("rows of documents", wide, logits.device), make)


def _share(kwargs: dict[str, Any], mesh: SequenceMesh, loss: GlobalLoss) -> Tensor:
    """This stream's targets as a part of those of the whole step."""
    targets = (kwargs["shift_labels"] != IGNORE_INDEX).sum()
    dist.all_reduce(targets, group=mesh.sequence_group)
    return targets / loss.count(kwargs)


def _demand(right: bool, mesh: SequenceMesh, words: str) -> None:
    """Raises NotImplementedError on all ranks of a sequence unless it is right on each. Collective over them."""
    wrong = torch.tensor(float(not right), device=mesh.device)
    dist.all_reduce(wrong, dist.ReduceOp.MAX, group=mesh.sequence_group)
    if wrong:
        raise NotImplementedError(
            f"{words} (see ringattn.hf.router_loss): set {_FLAG} to False, or leave labels out of the keywords and add "
            "it to a loss of your own"
        )


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a.detach().float(), b.detach().float(), rtol=4 * torch.finfo(a.dtype).eps, atol=0)


class _Sums(torch.autograd.Function):
    """Counts, probabilities and rows of all layers' logits, (3 E,); logits alone are kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, taken: int, counted: Tensor | None, *logits: Tensor) -> Tensor:
        ctx.save_for_backward(*logits, *([] if counted is None else [counted]))
        ctx.layers = len(logits)
        wide = torch.promote_types(logits[0].dtype, torch.float32)
        sums = torch.zeros(3, logits[0].shape[-1], dtype=wide, device=logits[0].device)
        for layer in logits:
            probabilities = layer.softmax(-1, dtype=wide)
            ones = torch.ones_like(probabilities[:, 0]) if counted is None else counted
            chosen = probabilities.topk(taken, -1).indices
            sums[0].index_add_(0, chosen.flatten(), ones.repeat_interleave(taken))
            sums[1] += ones @ probabilities
            sums[2] += ones.sum()
        return sums.flatten()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        logits, counted = saved[: ctx.layers], saved[ctx.layers :]
        grad = grads[0].unflatten(0, (3, -1))[1]
        found = []
        for layer in logits:
            probabilities = layer.softmax(-1, dtype=grad.dtype)
            of_rows = probabilities * (grad - (probabilities @ grad)[:, None])
            found.append((of_rows * counted[0][:, None] if counted else of_rows).to(layer.dtype))
        return None, None, *found


class _SumOf(torch.autograd.Function):
    """The sum over a group, each rank of which computes the same from it: so each takes the gradient as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _SumOverReplicas(torch.autograd.Function):
    """The sum over replicas; the gradient is scaled for engines that average gradients over all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: SequenceMesh) -> Tensor:
        total = x.clone()
        if mesh.data > 1:
            dist.all_reduce(total, group=mesh.device_mesh.get_group("data"))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * dist.get_world_size(), None

"""The front door: exact attention over the ranks of a sequence mesh, as a module and as a function.

Shapes: t tokens of this rank, H query heads, K key/value heads, D head dim, V value head dim.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ringattn.mask import Mask
from ringattn.names import accept_aliases
from ringattn.parallel.layout import Layout
from ringattn.parallel.mesh.mesh import SequenceMesh
from ringattn.parallel.mesh.shape import MeshShape
from ringattn.preparation import compute
from ringattn.settings import AttentionOptions

_CAUSAL = Mask()


@accept_aliases
def parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    *,
    mask: Mask | None = None,
    softmax_scale: float | None = None,
    softcap: float | None = 0.0,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    sinks: Tensor | None = None,
    deterministic: bool = False,
    backend: str = "auto",
    scheme: str = "auto",
    stages: int | None = None,
    keep_keys: bool | None = None,
    wide_reduce: bool = True,
    memory_limit: int | None = None,
    head_groups: int | None = None,
    head_chunks: int | None = None,
    return_lse: bool = False,
) -> Any:
    """What one device would compute on the whole packed stream, for this rank's tokens. Collective, differentiable.

    Other libraries' names of these arguments are taken too (`ringattn.names`); an unknown one is a TypeError.

    Every query attends to the keys of its own document that `mask` allows, wherever they are. Padding has output 0 and
    gradient 0.

    Arguments:
        q, k, v: (t, H, D), (t, K, D), (t, K, V): this rank's tokens in the order of `layout`; H a multiple of K.
        layout: who holds which tokens; built from the same documents on every rank.
        mask: default causal.
        softmax_scale: default D ** -0.5. Like all settings a number, no tensor: a learned one belongs into q, which has
            a gradient.
        softcap: scores become `softcap * tanh(score / softcap)`; 0 or None is off.
        dropout_p: probability of dropping an attention probability, the same ones however the sequence is split.
            Backends that cannot promise that refuse it.
        dropout_seed: needed with dropout, the same on every rank and another one for every layer and step.
        sinks: (H,) one logit per query head, added to every softmax's denominator.
        deterministic: ask the kernel for bitwise equal gradients from run to run; transfers are always in fixed order.
            RINGATTN_DETERMINISTIC=on asks for it everywhere.
        backend: "auto" or a name of `ringattn.kernels.registry.backends()`.
        scheme: "auto", "gather", "joint", "ring", "ulysses" or "hybrid"; the degrees are those of the layout's mesh.
            "gather" computes what needs only local keys while the others arrive, "joint" everything together once they
            are there (one call, unless the window reaches to the right): for short packs, whose calls take the device
            less time than the host. "auto" takes what is predicted to be fastest on the mesh's machine, forward and
            backward apart; the plan's `reason` says why.
        stages: stages of the ring scheme, the local one included; default: up to 4.
        keep_keys: keep cast keys for the backward pass (more memory, one transfer less), or cast them again; default:
            keep them where that is predicted to be faster and they fit, in `memory_limit` or else in half of the
            q, k, v and out that are kept anyway (beside several `head_chunks` only in `memory_limit`). Under
            torch.compile they are always cast again.
        wide_reduce: return key gradients to their owners in float32; False: in the dtype of the keys, half the bytes.
        memory_limit: bytes that the buffers of one attention may take on a rank, beside its inputs and results, with
            the message buffers of copy engines, which are kept and all attentions of the mesh share; default: keys of
            up to 9 times a rank's own are held at once.
        head_groups: groups of heads that the ulysses exchange moves one after another, each while another is computed
            (with ring = 1; fewer where heads do not part equally). Default: what is predicted to be fastest, and 1
            beside several `head_chunks`.
        head_chunks: chunks of heads that are computed one after another, each with transfers of its own, so that
            buffers, sums and what the kernel holds are those of one chunk; not the exchange of heads, which is of all
            (fewer where key heads do not part equally, and 1 where copied ones are summed). Default: 1, or with a
            `memory_limit` what is predicted to be fastest of those that keep it.
        return_lse: also return the log-sum-exp (H, t), float32, sinks included; of padding it is -inf, or the sink. It
            has no gradient.

    Returns: out (t, H, V), or (out, lse).
    Raises ValueError for a wrong argument, NotImplementedError for what no backend can do exactly; both before any
    communication.
    """
    options = AttentionOptions(
        mask=_CAUSAL if mask is None else mask,
        softmax_scale=softmax_scale,
        softcap=softcap,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        deterministic=deterministic,
        backend=backend,
        scheme=scheme,
        stages=stages,
        keep_keys=keep_keys,
        wide_reduce=wide_reduce,
        memory_limit=memory_limit,
        head_groups=head_groups,
        head_chunks=head_chunks,
        return_lse=return_lse,
    )
    return _attention(q, k, v, sinks, layout, options)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, layout: Layout, options: AttentionOptions, *meshes: str
) -> Any:
    """`parallel_attention`, inside of a compiled graph and outside.

    Arguments:
        meshes: in words, those on which a compiled call takes layouts; none: any.
    """
    q, k, v = (_autocast(x) for x in (q, k, v))
    if torch.compiler.is_compiling():
        from ringattn.compiled import attend

        out, lse = attend(q, k, v, sinks, layout, options, *meshes)
    else:
        out, lse = compute(q, k, v, sinks, layout, options)
    return (out, lse) if options.return_lse else out


class ParallelAttention(nn.Module):
    """`parallel_attention` with its configuration kept; `sinks` may be a parameter.

    The arguments are those of `parallel_attention`; `mesh` is checked against the layout's at every call.
    """

    @accept_aliases
    def __init__(
        self,
        mesh: SequenceMesh,
        mask: Mask | None = None,
        softmax_scale: float | None = None,
        softcap: float | None = 0.0,
        dropout_p: float = 0.0,
        sinks: Tensor | None = None,
        deterministic: bool = False,
        backend: str = "auto",
        scheme: str = "auto",
        stages: int | None = None,
        keep_keys: bool | None = None,
        wide_reduce: bool = True,
        memory_limit: int | None = None,
        head_groups: int | None = None,
        head_chunks: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(mesh, MeshShape):
            raise ValueError(f"mesh must come from init_mesh, got {type(mesh).__name__}")
        self.mesh = mesh
        self._meshes = tuple(map(str, (mesh, *mesh.alternatives)))
        self.sinks: Tensor | None
        if isinstance(sinks, nn.Parameter):
            self.sinks = sinks
        else:
            self.register_buffer("sinks", sinks)
        self.options = AttentionOptions(
            mask=_CAUSAL if mask is None else mask,
            softmax_scale=softmax_scale,
            softcap=softcap,
            dropout_p=dropout_p,
            deterministic=deterministic,
            backend=backend,
            scheme=scheme,
            stages=stages,
            keep_keys=keep_keys,
            wide_reduce=wide_reduce,
            memory_limit=memory_limit,
            head_groups=head_groups,
            head_chunks=head_chunks,
        )

    @property
    def dropout_p(self) -> float:
        """In training; in evaluation nothing is dropped."""
        return self.options.dropout_p

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: Layout,
        return_lse: bool = False,
        dropout_seed: int | None = None,
    ) -> Any:
        """q (t, H, D), k (t, K, D), v (t, K, V) of this rank -> out (t, H, V), with `return_lse` also lse (H, t)."""
        if not torch.compiler.is_compiling() and not layout.is_on(self.mesh):
            raise ValueError(f"layout was made for {layout.mesh}, this attention for {self.mesh}")
        options = self.options
        if return_lse or dropout_seed is not None or not self.training:
            dropout_p = options.dropout_p if self.training else 0.0
            options = options._replace(dropout_p=dropout_p, dropout_seed=dropout_seed, return_lse=return_lse)
        return _attention(q, k, v, self.sinks, layout, options, *self._meshes)

    def extra_repr(self) -> str:
        """The mask, and what differs from the defaults."""
        defaults = AttentionOptions()._asdict()
        given = self.options._asdict()
        shown = {"mask": given.pop("mask")} | {name: value for name, value in given.items() if value != defaults[name]}
        return ", ".join(f"{name}={value}" for name, value in shown.items())


def _autocast(x: Tensor) -> Tensor:
    """Under autocast, x in the dtype that a matrix product would get, so that transfers carry the narrow dtype too."""
    if not isinstance(x, Tensor) or x.dtype != torch.float32 or not torch.amp.is_autocast_available(x.device.type):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else x

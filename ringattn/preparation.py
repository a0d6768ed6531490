"""From the arguments of a call to what the executor runs: checked, then plans, backend and transports settled.

All of it happens before any communication, and is kept with the layout for calls of the same kind.
"""

from collections.abc import Hashable
from dataclasses import replace

from torch import Tensor

from ringattn.environment import AUTOTUNE, DETERMINISTIC, of_a_call, warn_of_unknown
from ringattn.kept import kept, kept_already
from ringattn.kernels.registry import choose
from ringattn.kernels.selftest import adds
from ringattn.kernels.spec import Backend, CallSpec, Options
from ringattn.parallel.execution.executor import run
from ringattn.parallel.execution.job import Job
from ringattn.parallel.layout import Layout
from ringattn.parallel.mesh.mesh import SequenceMesh
from ringattn.parallel.mesh.shape import MeshShape
from ringattn.parallel.plan.shape import Shape
from ringattn.parallel.planning.agreement import check_plan
from ringattn.parallel.planning.planner import plan_parts
from ringattn.parallel.transport.process_groups import CLOSED
from ringattn.parallel.transport.protocol import Transport
from ringattn.settings import AttentionOptions
from ringattn.tracing import untraced


def prepare(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, layout: Layout, options: AttentionOptions
) -> tuple[Job, ...]:
    """Check the arguments of `parallel_attention` and settle plans, backend and transports. No communication.

    The answer, a job for each part of the layout, is kept with it: every layer of a step asks with tensors of the same
    kind. It was checked for that kind, so only what is not part of it is checked again.
    """
    warn_of_unknown()
    if isinstance(layout, Layout) and layout.mesh.closed:
        raise ValueError(CLOSED)
    try:
        key = _kind(q, k, v, sinks, options)
        jobs = kept_already(layout, key)
    except (AttributeError, TypeError):  # something is not what it should be: the check tells
        key = jobs = None
    if jobs is None:
        jobs = _settle(q, k, v, sinks, layout, options)
        if key is not None:
            kept(layout, key, lambda: jobs)
    if not options.dropout_p:
        return jobs
    dropout = options.dropout()
    return tuple(replace(job, dropout=dropout) for job in jobs)


@untraced
def compute(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, layout: Layout, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    """out (t, H, V) and lse (H, t), outside of compiled graphs."""
    return run(prepare(q, k, v, sinks, layout, options), q, k, v, sinks)


def _kind(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, options: AttentionOptions) -> Hashable:
    """All that `_check` and `_settle` depend on beside the layout; equal for the calls that one answer suits."""
    if options.dropout_seed is not None:  # another one at every call
        options = options._replace(dropout_seed=None)
    return (
        (q.shape, q.dtype, q.device),
        (k.shape, k.dtype, k.device),
        (v.shape, v.dtype, v.device),
        None if sinks is None else (sinks.shape, sinks.device),
        options,
        of_a_call(),
    )


def _settle(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, layout: Layout, options: AttentionOptions
) -> tuple[Job, ...]:
    """What `prepare` keeps; its dropout has no seed yet."""
    spec = _check(q, k, v, sinks, layout, options)
    chosen = _backend(spec, layout, options.backend)
    shape = Shape(spec.query_heads, spec.key_heads, spec.head_dim, spec.value_dim, spec.dtype.itemsize)
    plans = plan_parts(layout, shape, options)
    check_plan(plans, layout)
    scale = spec.head_dim**-0.5 if options.softmax_scale is None else float(options.softmax_scale)
    jobs = []
    for part, (rows, plan) in zip(layout.parts, plans.parts, strict=True):
        ring, ulysses = _transports(part.mesh)
        jobs.append(
            Job(
                plan=plan,
                rows=rows,
                options=Options(scale, spec.softcap, spec.deterministic),
                dropout=(spec.dropout_p, 0) if spec.dropout_p else None,
                backend=chosen,
                adds=plan.for_pass(backward=True).adds_grads and adds(chosen, spec),
                ring=ring,
                ulysses=ulysses,
                device=q.device,
                query_heads=spec.query_heads,
                key_heads=spec.key_heads,
                return_lse=options.return_lse,
            )
        )
    return tuple(jobs)


def _backend(spec: CallSpec, layout: Layout, name: str) -> Backend:
    """The backend of a call, kept with the layout; with RINGATTN_AUTOTUNE=on the fastest by measurement."""
    if AUTOTUNE.read() != "on":
        return choose(spec, name)

    def measured() -> Backend:
        from ringattn.kernels.tuning.tuned_backend import tuned_backend

        mesh = layout.mesh
        group = mesh.sequence_group if isinstance(mesh, SequenceMesh) and mesh.sequence_size > 1 else None
        return tuned_backend(spec, layout.docs.lengths, name, group)

    return kept(layout, ("backend", spec, name), measured)


def _check(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, layout: Layout, options: AttentionOptions
) -> CallSpec:
    """What the kernel is asked for. Raises ValueError for whatever is wrong with the arguments."""
    check_kinds(layout, options)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.dim() != 3:
            came = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} must be a tensor of shape (tokens, heads, head dim), got {came}")
        if x.dtype != q.dtype or not x.is_floating_point():
            raise ValueError(f"q, k and v must share one floating dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
        if x.device != q.device:
            raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}")
        if x.shape[0] != layout.tokens():
            raise ValueError(
                f"{name} must hold the {layout.tokens()} tokens of sequence rank {layout.mesh.sequence_rank} in this "
                f"layout ({layout.docs}), got {x.shape[0]}: shard it with layout.shard"
            )
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"k must have the head dim of q, {q.shape[2]}, got {k.shape[2]}")
    if v.shape[1] != k.shape[1]:
        raise ValueError(f"v must have as many heads as k, {k.shape[1]}, got {v.shape[1]}")
    if 0 in q.shape[1:] or 0 in v.shape[1:] or q.shape[1] % k.shape[1]:
        raise ValueError(f"the query heads must be a multiple of the key heads, got {q.shape[1]} and {k.shape[1]}")
    options.check()
    options.dropout()
    if sinks is not None and not isinstance(sinks, Tensor):
        raise ValueError(f"sinks must be a tensor of one logit per query head, got {type(sinks).__name__}")
    if sinks is not None and (sinks.shape != (q.shape[1],) or sinks.device != q.device):
        raise ValueError(
            f"sinks must be one logit per query head, ({q.shape[1]},) on {q.device}, got {tuple(sinks.shape)} on "
            f"{sinks.device}"
        )
    _check_mesh(layout, q)
    return CallSpec(
        device=q.device.type,
        dtype=q.dtype,
        head_dim=q.shape[2],
        value_dim=v.shape[2],
        query_heads=q.shape[1],
        key_heads=k.shape[1],
        window=options.mask.window != (-1, -1) or _has_blocks(layout, options),
        softcap=options.softcap or 0.0,
        dropout_p=options.dropout_p,
        deterministic=options.deterministic or DETERMINISTIC.read() == "on",
    )


def _has_blocks(layout: Layout, options: AttentionOptions) -> bool:
    """Whether some call is of a block's upper triangle, which is a window too."""
    return bool(layout.docs.blocks) and options.mask.blocks != "ignored"


def check_kinds(layout: Layout, options: AttentionOptions) -> None:
    """What must be looked at before anything is asked of it, or handed to an operator."""
    if not isinstance(layout, Layout):
        raise ValueError(f"layout must be a Layout, got {type(layout).__name__}")
    options.check_kinds()


def _check_mesh(layout: Layout, q: Tensor) -> None:
    mesh = layout.mesh
    if mesh.sequence_size == 1:
        return
    if not isinstance(mesh, SequenceMesh):
        raise ValueError("layout was made on a MeshShape, for planning only; attention needs init_mesh's SequenceMesh")
    if q.device.type != mesh.device_type:
        raise ValueError(f"q must be on the device type of the mesh, {mesh.device_type}, got {q.device}")


def _transports(mesh: MeshShape) -> tuple[Transport | None, Transport | None]:
    if not isinstance(mesh, SequenceMesh):
        return None, None
    ring = mesh.ring_transport if mesh.ring > 1 else None
    return ring, mesh.ulysses_transport if mesh.ulysses > 1 else None

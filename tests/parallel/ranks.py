"""What worker processes run: one attention on a mesh, results gathered to the global stream."""

from functools import cache

import torch
import torch.distributed as dist

from ringattn import Layout, SequenceMesh, init_mesh, parallel_attention
from tests.dense import Case


@cache
def mesh_of(ring: int, ulysses: int, device_type: str = "cpu", transport: str = "auto") -> SequenceMesh:
    return init_mesh(ring=ring, ulysses=ulysses, device_type=device_type, transport=transport)


@cache
def free_mesh(sequence: int, device_type: str = "cpu", transport: str = "auto") -> SequenceMesh:
    """One that leaves the degrees to its layouts."""
    return init_mesh(data=1, sequence=sequence, device_type=device_type, transport=transport)


def attend(
    case: Case, ring: int, ulysses: int, policy: str, scheme: str, device_type: str = "cpu", transport: str = "auto"
) -> dict[str, torch.Tensor]:
    """`attend_on` a layout of these degrees."""
    mesh = mesh_of(ring, ulysses, device_type, transport)
    return attend_on(Layout(case.docs, mesh, policy, mask=case.mask), case, scheme)


def attend_on(layout: Layout, case: Case, scheme: str) -> dict[str, torch.Tensor]:
    """out, lse (if the case's options do not leave it out), dq, dk, dv (and dsinks) of the whole stream, as every rank
    sees them after gathering."""
    mesh, options = layout.mesh, {"return_lse": True} | case.options
    assert isinstance(mesh, SequenceMesh)
    x = {name: tensor.to(mesh.device) for name, tensor in case.tensors().items()}
    local = {name: layout.shard(x[name]).clone().requires_grad_() for name in ("q", "k", "v")}
    sinks = x["sinks"].clone().requires_grad_() if case.sinks else None
    result = parallel_attention(
        local["q"],
        local["k"],
        local["v"],
        layout,
        mask=case.mask,
        scheme=scheme,
        sinks=sinks,
        softcap=case.softcap,
        dropout_p=case.dropout[0] if case.dropout else 0.0,
        dropout_seed=case.dropout[1] if case.dropout else None,
        **options,
    )
    out, lse = result if options["return_lse"] else (result, None)
    out.backward(layout.shard(x["dout"]))
    whole = {"out": layout.unshard(out.detach())}
    if lse is not None:
        whole["lse"] = layout.unshard(lse, dim=1)
    whole |= {f"d{name}": layout.unshard(tensor.grad) for name, tensor in local.items()}
    if sinks is not None:
        dist.all_reduce(sinks.grad, group=mesh.sequence_group)
        whole["dsinks"] = sinks.grad
    return {name: tensor.cpu() for name, tensor in whole.items()}

"""What transformers' experts and routers keep in bfloat16, found by running theirs on the meta device, without weights.

Families write gates and routers of their own: clamped factors, sums in float32, weights of experts in either dtype.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ringattn.memory.planning.parts import PLAIN, PLAIN_GATE

WIDTH = 64  # elements of a row that a gate is given


def kept_by_gate(experts: Any) -> int:
    """Tensors of all inner rows that autograd keeps of the experts' gate, with its input and what it gives; without a
    gate of transformers' kind those of a plain one."""
    if not getattr(experts, "has_gate", False):
        return PLAIN_GATE
    product = torch.empty(1, 2 * WIDTH, dtype=torch.bfloat16, device="meta", requires_grad=True) * 1
    with _keeping() as kept:
        out = experts._apply_gate(product)
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in (product, *kept, out)}
    return -(-sum(storages.values()) // (WIDTH * product.itemsize))


def kept_by_activation(activation: nn.Module | None) -> int:
    """Tensors of all inner rows that autograd keeps of an MLP without a gate, with what goes into its last product."""
    if activation is None:
        return PLAIN
    product = torch.empty(1, WIDTH, dtype=torch.bfloat16, device="meta", requires_grad=True) * 1
    with _keeping() as kept:
        out = activation(product)
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in (*kept, out)}
    return -(-sum(storages.values()) // (WIDTH * product.itemsize))


def router_dtypes(mlp: nn.Module, experts: nn.Module) -> tuple[bool, bool]:
    """Whether the router keeps its input in float32, and whether the weights of experts that it gives are float32.
    Where it does not run on the meta device, both are taken to be."""
    given: list[Tensor] = []
    state = {name: _narrow(x) for name, x in (*mlp.named_parameters(), *mlp.named_buffers())}
    width = next(p.shape[-1] for p in mlp.parameters() if p.dim() == 2)
    tokens = torch.empty(1, 2, width, dtype=torch.bfloat16, device="meta")

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.extend(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        raise _CalledError

    hook = experts.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with _keeping() as kept:
            functional_call(mlp, state, tokens)
    except _CalledError:
        copies = any(x.dtype == torch.float32 and x.numel() == tokens.numel() for x in kept)
        return copies, any(x.dtype == torch.float32 for x in given)
    except Exception:  # whatever a family's own code raises there
        return True, True
    finally:
        hook.remove()
    return True, True


class _CalledError(Exception):
    """The experts are called: the router is over."""


@contextmanager
def _keeping() -> Iterator[list[Tensor]]:
    """The tensors that autograd keeps inside of it."""
    kept: list[Tensor] = []

    def note(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        yield kept


def _narrow(x: Tensor) -> Tensor:
    """One like it in bfloat16, without memory."""
    if not x.is_floating_point():
        return torch.empty_like(x, device="meta")
    return torch.empty_like(x, device="meta", dtype=torch.bfloat16, requires_grad=True)

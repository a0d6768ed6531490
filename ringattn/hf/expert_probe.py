"""What transformers' experts and routers keep in bfloat16, found by running theirs on the meta device, without weights.

Families write gates and routers of their own: clamped factors, sums in float32, weights of experts in either dtype.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ringattn.hf.held_storages import HeldStorages, kept_tensors, state_in
from ringattn.memory.planning.parts import PLAIN, PLAIN_GATE

WIDTH = 64  # elements of a row that a gate is given


def kept_by_gate(experts: Any) -> int:
    """Tensors of all inner rows that autograd keeps of the experts' gate, with its input and what it gives; without a
    gate of transformers' kind those of a plain one."""
    if not getattr(experts, "has_gate", False):
        return PLAIN_GATE
    product = torch.empty(1, 2 * WIDTH, dtype=torch.bfloat16, device="meta", requires_grad=True) * 1
    with kept_tensors() as kept:
        out = experts._apply_gate(product)
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in (product, *kept, out)}
    return -(-sum(storages.values()) // (WIDTH * product.itemsize))


def kept_by_activation(activation: nn.Module | None) -> int:
    """Tensors of all inner rows that autograd keeps of an MLP without a gate, with what goes into its last product."""
    if activation is None:
        return PLAIN
    product = torch.empty(1, WIDTH, dtype=torch.bfloat16, device="meta", requires_grad=True) * 1
    with kept_tensors() as kept:
        out = activation(product)
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in (*kept, out)}
    return -(-sum(storages.values()) // (WIDTH * product.itemsize))


def held_by_gradients(activation: nn.Module | None) -> int:
    """The most tensors of all inner rows, kept ones among them, while an MLP without a gate goes backward: that of
    the last product is one, that of the activation comes of its operators."""
    if activation is None:
        return PLAIN + 1
    leaf = torch.empty(1, WIDTH, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with HeldStorages() as held:
        given = (activation(leaf * 1) * 1).sum()
        held.begin_most()
        torch.autograd.grad(given, leaf)
    return max(kept_by_activation(activation) + 1, held.most // (WIDTH * leaf.itemsize))


def router_dtypes(mlp: nn.Module, experts: nn.Module) -> tuple[bool, bool]:
    """Whether the router keeps its input in float32, and whether the weights of experts that it gives are float32.
    Where it does not run on the meta device, both are taken to be."""
    given: list[Tensor] = []
    state = state_in(mlp, torch.bfloat16)
    width = next(p.shape[-1] for p in mlp.parameters() if p.dim() == 2)
    tokens = torch.empty(1, 2, width, dtype=torch.bfloat16, device="meta")

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.extend(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        raise _CalledError

    hook = experts.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with kept_tensors() as kept:
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

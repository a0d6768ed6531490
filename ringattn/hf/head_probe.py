"""What stands between the input of an attention layer and its kernel, found by running it on the meta device.

Families make queries, keys and values in ways of their own: of one product that stays as long as a view of it does,
with norms of several kinds, turned by their positions in whole or in part, in either dtype. Nobody's name is asked.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ringattn.hf.held_storages import HeldStorages, state_in
from ringattn.memory.planning.parts import HeadBytes

NAME = "ringattn_probe"
TOKENS = 64  # enough that what is there once, whatever the number of tokens, is little
DTYPES = (torch.float32, torch.bfloat16)


def head_bytes(model: nn.Module, attentions: Iterable[nn.Module]) -> tuple[HeadBytes, HeadBytes] | None:
    """In float32 and in bfloat16, the most of all that a model's attentions hold; None where one does not run on the
    meta device."""
    distinct = list({_kind(one): one for one in reversed(list(attentions))}.values())
    try:
        given = _given(model, distinct)
        found = [[_probe(one, *given[one], dtype) for dtype in DTYPES] for one in distinct]
    except Exception:  # whatever a family's own code raises there
        return None
    wide, narrow = (HeadBytes.most(one) for one in zip(*found, strict=True))
    return wide, narrow


def _kind(attention: nn.Module) -> Hashable:
    """The same of layers that differ in their place alone: shapes, and features such as windows and rotations."""
    simple = {key: value for key, value in vars(attention).items() if isinstance(value, int | float | str | None)}
    simple.pop("layer_idx", None)
    shapes = tuple((name, p.shape) for name, p in attention.named_parameters())
    return type(attention), shapes, tuple(sorted(simple.items(), key=lambda pair: pair[0]))


class _CalledError(Exception):
    """What was looked for is called."""

    def __init__(self, *given: Any) -> None:
        super().__init__()
        self.given = given


def _pass(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """In the place of a kernel: something of the shape that it gives."""
    return v.new_empty(1, q.shape[2], q.shape[1], v.shape[3]), None


def _stop(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Any:
    """The same for what ends there. Kernels take the heads of a row one after another."""
    raise _CalledError(*(x.squeeze(0).transpose(0, 1).contiguous() for x in (q, k, v)))


def _given(model: nn.Module, attentions: list[nn.Module]) -> dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]]:
    """What a model calls some of its attentions with."""
    found: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def look(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found[attention] = args, kwargs
        if len(found) == len(attentions):
            raise _CalledError

    hooks = [one.register_forward_pre_hook(look, with_kwargs=True) for one in attentions]
    ids = torch.zeros(1, TOKENS, dtype=torch.long, device="meta")
    positions = torch.arange(TOKENS, device="meta")[None]
    given = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    try:
        with _kernel(attentions[0], _pass), torch.no_grad():
            functional_call(model, state_in(model, torch.bfloat16), (), given)
    except _CalledError:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _probe(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype) -> HeadBytes:
    state = state_in(attention, dtype)

    def cast(x: Tensor) -> Tensor:
        return x.detach().to(dtype) if x.is_floating_point() else x

    args, kwargs = tree_map_only(Tensor, cast, (args, kwargs))
    without = _without_gradients(attention, state, args, kwargs)
    return without._replace(**_with_gradients(attention, state, args, kwargs))


def _without_gradients(attention: nn.Module, state: Any, args: Any, kwargs: Any) -> HeadBytes:
    with HeldStorages() as held, torch.no_grad(), _kernel(attention, _stop):
        try:
            functional_call(attention, state, args, kwargs)
        except _CalledError as called:
            # The frames of its calls are there as long as the error is.
            beside = held.now - sum(x.numel() * x.element_size() for x in called.given)
            forward, called.given = held.most, ()
            return HeadBytes(forward / TOKENS, beside / TOKENS, held.now / TOKENS)
    raise ValueError("no kernel is called")


def _with_gradients(attention: nn.Module, state: Any, args: Any, kwargs: Any) -> dict[str, float]:
    stream = args[0] if args else kwargs["hidden_states"]
    stream.requires_grad_()
    with HeldStorages() as held, _kernel(attention, _stop):
        heads = _heads(attention, state, args, kwargs)
        own = held.size_of(heads)
        kept = held.now - own
        products = held.products_without(heads)
        grads = [torch.empty_like(x) for x in heads]
        held.begin_most()
        torch.autograd.grad(heads, [stream], grads)
        return {"kept": kept / TOKENS, "products": products / TOKENS, "backward": (held.most - own) / TOKENS}


def _heads(attention: nn.Module, state: Any, args: Any, kwargs: Any) -> tuple[Tensor, ...]:
    try:
        functional_call(attention, state, args, kwargs)
    except _CalledError as called:
        return called.given
    raise ValueError("no kernel is called")


@contextmanager
def _kernel(attention: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Attention calls a function in the place of its kernel."""
    config: Any = attention.config
    before = config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[NAME] = function
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        del ALL_ATTENTION_FUNCTIONS[NAME]

"""FlashAttention 2's Python surface over any kernel of this package, so that other systems run the kernel of the run.

Other systems import `_flash_attn_forward`, `_flash_attn_backward` and their variable-length forms from
`flash_attn.flash_attn_interface`. `offered` puts modules of those names where they find them, for as long as they are
imported: they keep the functions, and everybody else finds the real `flash_attn` (also the home of FlashAttention 4)
as it was.

Shapes: B sequences of S tokens, T tokens in all, H query heads, K key heads, D head dim, V value head dim.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ringattn.kernels.spec import Backend, Block, Call, CallTensors, Grads, Options, SavedCall

PACKAGE = "flash_attn"
INTERFACE = "flash_attn.flash_attn_interface"
VERSION = "2.8.3"  # whose signatures these are


class PackedCall(Call):
    """A call whose lengths lie in tensors of the device, as this surface is given them.

    Kernels that read them there get them as they came: to read them on the host would stop the stream at every call,
    which the real surface does not. A kernel that walks `blocks` waits for them.
    """

    def __init__(self, cu_q: Tensor, cu_k: Tensor, longest: tuple[int, int], band: tuple[int, int]) -> None:
        # The dataclass is frozen, and what it computes from blocks is known here without them.
        self.__dict__.update(cumulative=(cu_q, cu_k), left=band[0], right=band[1])
        self.__dict__.update(max_q=longest[0], max_k=longest[1], dense_keys=True)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        queries, keys = (list(pairwise(lengths.tolist())) for lengths in self.__dict__["cumulative"])
        return tuple(Block(q, k, self.left, self.right) for q, k in zip(queries, keys, strict=True))

    def tensors(self, device: torch.device) -> CallTensors:
        cu_q, cu_k = self.__dict__["cumulative"]
        return CallTensors(cu_q, cu_k, cu_k, torch.empty(0))  # lengths of keys are asked only where they are not dense


@cache
def batch_call(batch: int, queries: int, keys: int, left: int, right: int) -> Call:
    """`batch` sequences of equal lengths, laid end to end."""
    spans = range(batch)
    blocks = (Block((i * queries, (i + 1) * queries), (i * keys, (i + 1) * keys), left, right) for i in spans)
    return Call(tuple(blocks), left, right)


class Surface:
    """The functions, over `backend`, which may be another one for every problem."""

    def __init__(self) -> None:
        self.backend: Backend | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call, options: Options) -> tuple[Tensor, Tensor]:
        """(T, H, D), (S, K, D), (S, K, V) -> out (T, H, V), lse (H, T)."""
        out = q.new_empty(*q.shape[:2], v.shape[2])
        return out, self._chosen.forward(q, k, v, call, options, out)

    def backward(self, dout: Tensor, saved: SavedCall, grads: Grads) -> None:
        """As `Backend.backward`."""
        self._chosen.backward(dout, saved, grads)

    @property
    def _chosen(self) -> Backend:
        assert self.backend is not None, "a problem sets the backend before anything is computed"
        return self.backend

    @cached_property
    def modules(self) -> dict[str, ModuleType]:
        """The package and its interface module."""
        package, interface = ModuleType(PACKAGE), ModuleType(INTERFACE)
        vars(interface).update(_batch_functions(self) | _packed_functions(self))
        # Submodules are looked for in no folder: the interface is found because it is there already.
        vars(package).update(
            __path__=[], __version__=VERSION, flash_attn_interface=interface, flash_attn_func=_not_offered
        )
        return {PACKAGE: package, INTERFACE: interface}


@cache
def surface() -> Surface:
    """The one of this process: what was imported with it keeps its functions."""
    return Surface()


@contextmanager
def offered(modules: dict[str, ModuleType]) -> Iterator[None]:
    """Inside, imports find these modules; afterwards what was there before."""
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def _not_offered(*_: Any, **__: Any) -> None:
    raise NotImplementedError("this surface has FlashAttention's forward and backward functions only")


# Peers read the names and defaults of these arguments and pass all of them, so they are FlashAttention 2.8's.


def _batch_functions(kernel: Surface) -> dict[str, Callable[..., Any]]:
    """Of q (B, S, H, D), k (B, S', K, D), v (B, S', K, V), out as q, lse (B, H, S)."""

    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left=-1, window_size_right=-1, softcap=0.0,
        alibi_slopes=None, return_softmax=False,
    ):  # fmt: skip
        options = _options(softmax_scale, dropout_p, softcap, alibi_slopes)
        band = _band(causal, window_size_left, window_size_right)
        call = batch_call(q.shape[0], q.shape[1], k.shape[1], *band)
        out, lse = kernel.forward(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), call, options)
        return out.unflatten(0, q.shape[:2]), lse.unflatten(1, q.shape[:2]).transpose(0, 1), None, None

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left=-1,
        window_size_right=-1, softcap=0.0, alibi_slopes=None, deterministic=False, rng_state=None,
    ):  # fmt: skip
        options = _options(softmax_scale, dropout_p, softcap, alibi_slopes, deterministic)
        band = _band(causal, window_size_left, window_size_right)
        call = batch_call(q.shape[0], q.shape[1], k.shape[1], *band)
        targets = [x.flatten(0, 1) for x in (dq, dk, dv)]  # views, but for slices of more than one sequence
        dout, q, k, v, out = (x.flatten(0, 1) for x in (dout, q, k, v, out))
        saved = SavedCall(q, k, v, out, softmax_lse.transpose(0, 1).flatten(1), call, options)
        kernel.backward(dout, saved, Grads(*targets))
        for target, given in zip(targets, (dq, dk, dv), strict=True):
            if target.data_ptr() != given.data_ptr():
                given.copy_(target.view_as(given))

    return {"_flash_attn_forward": _flash_attn_forward, "_flash_attn_backward": _flash_attn_backward}


def _packed_functions(kernel: Surface) -> dict[str, Callable[..., Any]]:
    """Of q (T, H, D), k (S, K, D), v (S, K, V), out as q, lse (H, T); cumulative lengths are int32."""

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # fmt: skip
        if any(x is not None for x in (block_table, leftpad_k, seqused_k)):
            raise NotImplementedError("block_table, leftpad_k and seqused_k are not offered by this surface")
        options = _options(softmax_scale, dropout_p, softcap, alibi_slopes)
        longest, band = (max_seqlen_q, max_seqlen_k), _band(causal, window_size_left, window_size_right)
        out, lse = kernel.forward(q, k, v, PackedCall(cu_seqlens_q, cu_seqlens_k, longest, band), options)
        return out, lse, None, None

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
        deterministic=False, rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        options = _options(softmax_scale, dropout_p, softcap, alibi_slopes, deterministic)
        longest, band = (max_seqlen_q, max_seqlen_k), _band(causal, window_size_left, window_size_right)
        call = PackedCall(cu_seqlens_q, cu_seqlens_k, longest, band)
        kernel.backward(dout, SavedCall(q, k, v, out, softmax_lse, call, options), Grads(dq, dk, dv))

    return {
        "_flash_attn_varlen_forward": _flash_attn_varlen_forward,
        "_flash_attn_varlen_backward": _flash_attn_varlen_backward,
    }


def _options(scale: float, dropout_p: float, softcap: float | None, alibi: Any, deterministic: bool = False) -> Options:
    if dropout_p or alibi is not None:
        raise NotImplementedError(f"dropout and ALiBi are not offered by this surface, got dropout_p={dropout_p}")
    return Options(scale, softcap or 0.0, deterministic)


def _band(causal: bool, left: int, right: int) -> tuple[int, int]:
    return left, (0 if causal else right)

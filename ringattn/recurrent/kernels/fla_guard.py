"""What flash-linear-attention itself refuses on this machine, asked before anything is compiled.

Its gated backward pass, `chunk_bwd_dqkwg`, begins with a guard: on Hopper GPUs some versions of Triton compute it
wrongly, and it raises RuntimeError unless another of its backends (tilelang) takes the call. That guard stands behind
the forward pass, which compiles and tunes for a minute and a half. So the function is called with shapes and dtypes
that have no tensors: its own choice of a backend and its own guard answer, whatever another version of fla makes of
them, and whatever comes after them fails on what is no tensor and says nothing.
"""

import importlib
import inspect
import sys
from collections.abc import Callable
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch

from ringattn.recurrent.kernels.contract import Signature

GUARDED = "chunk_bwd_dqkwg"


def refused(function: Callable[..., Any], signature: Signature) -> str | None:
    """fla's reason why `function`, one of its own, has no backward pass here, as the rest of the sentence "it ...".

    None where it has one, where its module does not call the guarded function (that of Kimi's rule and of gated linear
    attention do not), and where another of fla's backends takes the whole rule.
    """
    module = inspect.unwrap(function).__module__
    guarded = getattr(sys.modules.get(module), GUARDED, None)
    if guarded is None or _taken_whole(module):
        return None
    H, D, V = signature.heads, signature.key_dim, signature.value_dim
    rows, values = (SimpleNamespace(shape=(1, 1, H, dim), dtype=signature.dtypes[0]) for dim in (D, V))
    # Without the delta rule its states are float32, which tilelang does not take beside other rows.
    states = SimpleNamespace(shape=(1, 1, H, D, V), dtype=signature.dtypes[0] if signature.delta else torch.float32)
    decay = SimpleNamespace(shape=(1, 1, H), dtype=torch.float32)
    try:
        guarded(q=rows, k=rows, v=values, do=values, h=states, dh=states, g=decay)
    except RuntimeError as error:
        unused = "; tilelang is installed, but fla does not use it for this call" if find_spec("tilelang") else ""
        return f"refuses its own backward pass here: {error}{unused}"
    except Exception:  # it has come to where tensors are needed
        return None
    return None


def _taken_whole(module: str) -> bool:
    """Whether one of the backends beside a rule's module is installed and switched on, such as FlashQLA."""
    try:
        beside = importlib.import_module(f"{module.rpartition('.')[0]}.backends")
    except ImportError:
        return False
    return any(one.can_use() for one in vars(beside).values() if hasattr(one, "can_use"))

"""What may have changed in a model since its last forward pass, looked at before every one.

Adapters are added, options set and weights replaced after `parallelize`, by whoever holds the model. What is cheap to
read is read each time; the rest when the adapters are other ones than last time, and before the first forward pass.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ringattn.hf.adapters import check_adapters, loaded_adapters
from ringattn.hf.configuration import check_configuration
from ringattn.hf.handle import Handle
from ringattn.hf.local_draws import check_draws
from ringattn.parallel.mesh.mesh import SequenceMesh

_CHUNK = 2**24
# Integers as wide as an element, by its number of bytes: sums of them do not depend on their order.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.compiler.disable
def check_changes(handle: Handle) -> bool:
    """Raises NotImplementedError or ValueError for what a model has become; no communication.

    Returns: whether its adapters are others than at the last forward pass, so that the ranks are to compare parameters.
    """
    model = handle.model
    if handle.mesh is None:
        raise ValueError(
            "the model was pickled (torch.save) while it was parallelized, and its ranks are gone: parallelize(model, "
            "mesh) attends over new ones; its handle's undo() gives the plain model back"
        )
    check_configuration(model)
    check_draws(model)
    adapters = loaded_adapters(model)
    if handle.verified and adapters == handle.adapters:
        return False
    check_adapters(model)
    check_preparation(model)
    handle.adapters = adapters
    return True


def check_preparation(model: nn.Module) -> None:
    """Raises NotImplementedError while PEFT collects what it initialises adapters from: it sees a rank's tokens."""
    for path, module in model.named_modules():
        for hook in (*module._forward_hooks.values(), *module._backward_hooks.values()):
            room = getattr(hook, "__module__", None) or ""
            if room in ("peft.tuners.lora.eva", "peft.tuners.lora.corda", "peft.tuners.lora.loraga"):
                raise NotImplementedError(
                    f"{room} collects activations or gradients at {path} to initialise an adapter from, and would see "
                    "a rank's tokens alone: do that before parallelize, or after the handle's undo(), with the same "
                    "batches on every rank"
                )


@torch.compiler.disable
def same_parameters(model: nn.Module, mesh: SequenceMesh) -> None:
    """Raises ValueError on every rank of a sequence if they hold different numbers. Collective.

    New weights, such as an adapter's factors, are drawn from a generator that a script may seed by the rank. A model
    that an engine has split over ranks is left out.
    """
    tensors = list(_whole_tensors(model))
    mine = torch.zeros(2, dtype=torch.int64, device=mesh.device)
    mine[0] = len(tensors)
    for tensor in tensors:
        mine[1] = mine[1] * 31 + _checksum(tensor).to(mine.device)
    bounds = torch.cat([mine, ~mine])  # ~x = -x - 1 keeps the order of even the smallest number
    dist.all_reduce(bounds, dist.ReduceOp.MAX, group=mesh.sequence_group)
    if not torch.equal(bounds[:2], ~bounds[2:]):
        raise ValueError(
            "the ranks of a sequence hold different parameters: make the model and its adapters from the same seed on "
            "every rank (torch.manual_seed before get_peft_model), or broadcast them from one"
        )


def _checksum(tensor: Tensor) -> Tensor:
    """The sum of a tensor's bits as integers, in parts, since their 64-bit copies take memory."""
    whole = tensor.detach().contiguous()
    bits = torch.view_as_real(whole) if whole.is_complex() else whole
    parts = bits.view(_INTEGERS[bits.element_size()]).flatten().split(_CHUNK)
    return torch.stack([part.sum(dtype=torch.int64) for part in parts]).sum()


def _whole_tensors(model: nn.Module) -> Iterator[Tensor]:
    """What every rank must hold alike: parameters, and what adapters keep besides; nothing if ranks hold parts."""
    modules: list[Any] = list(model.modules())
    parameters = list(model.parameters())
    split = (isinstance(p, DTensor) or hasattr(p, "ds_id") or type(p).__name__ == "FlatParameter" for p in parameters)
    if any(split) or any(type(module).__name__ == "FullyShardedDataParallel" for module in modules):
        return
    kept = [value for module in modules if type(module).__module__.startswith("peft.") for value in _values(module)]
    for tensor in [*parameters, *kept]:
        if type(tensor) in (nn.Parameter, Tensor) and tensor.device.type != "meta":
            yield tensor


def _values(module: nn.Module) -> Iterator[Any]:
    """Buffers of an adapter's layer, and the projections and indices that it keeps in dictionaries by adapter."""
    for value in vars(module).values():
        if isinstance(value, dict):
            yield from value.values()

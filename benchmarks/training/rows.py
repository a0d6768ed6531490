"""Who trains: each row makes its model, and does forward, backward and update as its users would.

Legend: T tokens of the stream, t of one rank.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from benchmarks.training.case import Case, Place, check_host_room, new_model
from benchmarks.training.kernel import MeasuredKernel
from benchmarks.training.peer_attention import NAME, PeerAttention
from benchmarks.training.states import clear_gradients, make_moments, new_optimizer, shard_model, sharded
from ringattn.hf import parallelize, shard_batch
from ringattn.hf.elementwise import Elementwise
from ringattn.training.engines.groups import shard_groups


@dataclass
class Tools:
    """What the rows of a process share.

    Arguments:
        attention: the measured kernel as transformers calls it.
        parallel_state: DeepSpeed's groups, once it has put its Ulysses in the attention's place.
    """

    kernel: MeasuredKernel
    attention: PeerAttention
    parallel_state: Any = None


class Row(Protocol):
    """A model in training. Every method is collective."""

    model: nn.Module
    streams: int
    """How many streams of T tokens a step trains on: 1, or one for each rank."""
    features: str
    """What of the case's memory settings it has, for the table."""

    def prepare(self) -> None:
        """The next batch, outside of what is timed."""

    def forward(self) -> Tensor:
        """The loss to go backward from."""

    def mean_of(self, loss: Tensor) -> float:
        """The mean over all targets of all ranks, of what `forward` returned."""

    def backward(self, loss: Tensor) -> None: ...

    def update(self) -> None:
        """The optimizer's step."""

    waited: float
    """Seconds that the device waited for copies from and to the host since this was last asked for."""

    @property
    def pinned(self) -> int:
        """Bytes of host memory that it locked itself, beside torch's allocator."""

    def close(self) -> None:
        """Lets everything go."""


class Waits:
    """How long kernels wait for copies to and from the host, by events before and after each wait."""

    def __init__(self) -> None:
        self._pairs: list[tuple[Any, Any]] = []

    def of(self, offload: Any) -> None:
        """Measures an `Offload` from now on."""
        plain = offload.wait

        def timed(copied: Any) -> None:
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            pair[0].record()
            plain(copied)
            pair[1].record()
            self._pairs.append(pair)

        offload.wait = timed

    def taken(self) -> float:
        """Seconds since it was last asked for. Waits for the device."""
        if self._pairs:
            torch.cuda.synchronize()
        seconds = sum(before.elapsed_time(after) for before, after in self._pairs) / 1e3
        self._pairs.clear()
        return seconds


class Ours:
    """ringattn: one stream over all ranks."""

    streams = 1

    def __init__(self, case: Case, place: Place, tools: Tools) -> None:
        self._case, self._place, memory = case, place, case.memory
        if memory.host_layers:
            check_host_room(case, memory.host_bytes)
        self.model: Any = new_model(case, place.device)
        if case.fused == "compile":
            Elementwise(self.model)
        elif case.fused == "liger":
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            apply_liger_kernel_to_llama(
                model=self.model, rope=True, rms_norm=True, swiglu=True, cross_entropy=False,
                fused_linear_cross_entropy=False,
            )  # fmt: skip
        self._handle = parallelize(
            self.model, place.mesh, memory, backend=tools.kernel.name, head_chunks=case.head_chunks
        )
        self._waits = Waits()
        if memory.host_layers and place.device.type == "cuda":
            self._waits.of(self._handle.memory.offload)
        try:
            shard_groups(self.model, case.states, **sharded(case, place))
            self._optimizer = new_optimizer(self.model, case)
            make_moments(self._optimizer)
        except BaseException:  # the host's memory is locked already
            self.close()
            raise
        host = f", {memory.host_layers} layers on the host" if memory.host_layers else ""
        every = f" of every {memory.every}" if memory.every > 1 else ""
        chunks = f", heads in {case.head_chunks} chunks" if case.head_chunks > 1 else ""
        self.features = f"{_tiles(case)}, keep {memory.keep}{every}{host}{chunks}" + (
            f", {case.fused}" if case.fused != "none" else ""
        )

    def prepare(self) -> None:
        case = self._case
        ids = case.ids(self._place.device)[None]
        self._batch = shard_batch({"input_ids": ids, "labels": ids}, case.docs, self._place.mesh)

    def forward(self) -> Tensor:
        return self.model(**self._batch).loss

    def mean_of(self, loss: Tensor) -> float:
        return float(loss)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def update(self) -> None:
        apply_update(self.model, self._optimizer)

    @property
    def waited(self) -> float:
        return self._waits.taken()

    @property
    def pinned(self) -> int:
        offload = self._handle.memory.offload if self._handle.memory is not None else None
        return offload.stack.size if offload is not None and self._place.device.type == "cuda" else 0

    def close(self) -> None:
        self._handle.undo()


class Plain:
    """The plain Hugging Face loop: every rank has a stream of its own, whole, and all logits at once."""

    def __init__(self, case: Case, place: Place, tools: Tools) -> None:
        self._case, self._place, self.streams = case, place, place.ranks
        model: Any = new_model(case, place.device, NAME)
        tools.attention.of(case.docs)
        if case.memory.keep != "all":
            enable_checkpoints(model, use_reentrant=False)
        self.model = model
        shard_model(model, case, place)
        self._optimizer = new_optimizer(model, case)
        make_moments(self._optimizer)
        self.features = "all logits" + (", keep layer" if case.memory.keep != "all" else ", keep all")
        self.pinned, self.waited = 0, 0.0

    def prepare(self) -> None:
        self._batch = whole_batch(self._case, self._place.device)

    def forward(self) -> Tensor:
        return self.model(**self._batch, use_cache=False).loss

    def mean_of(self, loss: Tensor) -> float:
        return self._place.total(loss) / self._place.ranks

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def update(self) -> None:
        apply_update(self.model, self._optimizer)

    def close(self) -> None: ...


def whole_batch(case: Case, device: torch.device) -> dict[str, Tensor]:
    """The stream as keywords of a transformers model, (1, T) each; every label is its token's own target."""
    ids = case.ids(device)
    positions = torch.cat([torch.arange(length) for length in case.docs.lengths]).to(device)
    targets = case.targets(ids)
    return {
        "input_ids": ids[None],
        "position_ids": positions[None],
        "labels": ids[None],
        "shift_labels": targets[None],
        "num_items_in_batch": torch.tensor(case.num_targets, device=device),
    }


def enable_checkpoints(
    model: Any, use_reentrant: bool, around: Callable[[], AbstractContextManager[Any]] | None = None
) -> None:
    """transformers' checkpointing of every layer.

    Arguments:
        around: a context for the calls of the checkpoint.
    """
    # Renamed in transformers 5.24.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
    if around is None:
        return
    for module in model.modules():
        plain = module.__dict__.get("_gradient_checkpointing_func")
        if plain is not None:
            module._gradient_checkpointing_func = _inside(around, plain)


def _inside(around: Callable[[], AbstractContextManager[Any]], function: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> Any:
        with around():
            return function(*args, **kwargs)

    return called


def apply_update(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """The optimizer's step; gradients go in any case."""
    if optimizer is not None:
        optimizer.step()
    clear_gradients(model)


def _tiles(case: Case) -> str:
    loss, mlp = case.memory.loss_tile, case.memory.mlp_tile
    return f"loss {'whole' if loss is None else f'in {loss}'}, MLP {'whole' if mlp is None else f'in {mlp}'}"

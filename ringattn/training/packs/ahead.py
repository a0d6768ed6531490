"""Batches ahead of their steps: read, planned and on the device before the loop asks for them."""

from contextlib import ExitStack
from dataclasses import replace

import torch

from ringattn.kernels.spec import to_device
from ringattn.parallel.mesh.mesh import SequenceMesh
from ringattn.recurrent.ahead import make_tables, mixers_of
from ringattn.training.packs.batches import Batch, Prefetcher
from ringattn.training.packs.making_process import MakingProcess
from ringattn.training.packs.placing import BatchMaker, LocalPack
from ringattn.trees import Targets

PLACES = ("auto", "process", "thread")


class BatchesAhead:
    """The batches of `maker` on a device, `depth` of them ahead. Use it as a context manager, and `next` for a batch.

    A batch is to be kept until the device has done its step: it owns memory that was filled on a stream of its own.

    Arguments:
        maker: of this rank, on `mesh`.
        place: "process": batches are made in a process of their own, with the plans of their layers, but for the
            first ones: how the model's layers mix tokens is known from the steps that were done. "thread": in a thread
            of this process, without plans; a thread that plans takes the interpreter's lock from the step, which then
            takes longer than if it planned by itself (by 1 ms, two cores, packs of 128 tokens). "auto": a process where
            there is a GPU; on the CPU it would take a core from the step, and seconds to start.
    """

    def __init__(self, maker: BatchMaker, mesh: SequenceMesh, device: torch.device, depth: int, place: str) -> None:
        self._maker, self._mesh, self._device, self._depth = maker, mesh, device, depth
        self._process = place == "process" or (place == "auto" and device.type == "cuda")
        self._last: Batch[LocalPack] | None = None

    def __enter__(self) -> "BatchesAhead":
        with ExitStack() as stack:
            process = MakingProcess(self._maker, self._mesh) if self._process else None
            source = self._maker.batches() if process is None else process.batches()
            self._stream = stack.enter_context(Prefetcher(map(_Carrier(self._device), source), self._depth))
            if process is not None:
                stack.callback(process.close)  # first: it lets go of a thread that waits for it
            self._open = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def __next__(self) -> Batch[LocalPack]:
        if self._process and self._last is not None:
            found = (one for local in self._last.micro for one in mixers_of(local.layout))
            self._maker.mixers = tuple(dict.fromkeys((*self._maker.mixers, *found)))
        batch = next(self._stream)
        for local in batch.micro:
            local.arrive()
        self._last = batch
        return batch


class _Carrier:
    """Brings batches to a device, on a stream of its own so that no copy waits for the step that runs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Batch[LocalPack]) -> Batch[LocalPack]:
        if self._stream is None:
            return batch
        with torch.cuda.stream(self._stream):
            return replace(batch, micro=tuple(self._carried(local, self._stream) for local in batch.micro))

    def _carried(self, local: LocalPack, stream: torch.cuda.Stream) -> LocalPack:
        ids, positions = (to_device(x, self._device) for x in (local.ids, local.positions))
        targets = local.targets if isinstance(local.targets, Targets) else to_device(local.targets, self._device)
        make_tables(local.plans, self._device)
        return replace(local, ids=ids, targets=targets, positions=positions, there=stream.record_event())

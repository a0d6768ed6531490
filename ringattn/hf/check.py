"""The check of one model on one mesh, as `ringattn check` runs it in every process."""

import copy
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ringattn.hf.conformance import (
    Errors,
    Form,
    Outcome,
    alone,
    differences,
    expected_features,
    feature_changes,
    forms,
    leak,
    together,
)
from ringattn.hf.handle import Handle
from ringattn.hf.model import parallelize
from ringattn.hf.support import check_decoder
from ringattn.hf.tiny import read_config, tiny_config, tiny_model, with_parameters_in
from ringattn.hf.tree_conformance import sequences_alone, sequences_for, sequences_together
from ringattn.memory.settings import MemorySettings
from ringattn.parallel.mesh.mesh import SequenceMesh, init_mesh

TOLERANCE = 1e-5  # of a tiny model in float32
PREFIXES = "common prefixes = sequences alone"
COUNTS = 1e-3  # a feature is in use if leaving it out moves a logit by more


@dataclass(frozen=True)
class Request:
    """What to check.

    Arguments:
        model: a folder with config.json, such a file, or a model type of transformers.
        real: take sizes and weights of the folder; else a tiny random model of the same structure.
        tolerance: of relative errors in float32; None: 1e-5 for a tiny model, 1e-4 for a real one. In other dtypes
            the limit is twice the error that documents alone have in that dtype, against float32.
    """

    model: str
    ring: int
    ulysses: int
    real: bool = False
    device: str = "cpu"
    dtype: str = "float32"
    policy: str = "auto"
    scheme: str = "auto"
    backend: str = "auto"
    tolerance: float | None = None

    @property
    def ranks(self) -> int:
        return self.ring * self.ulysses


@dataclass(frozen=True)
class Finding:
    """A line of the table: what was looked at, whether it is right, and the numbers or the reason."""

    name: str
    ok: bool
    detail: str


def work(rank: int, request: Request, port: int, answer: str) -> None:
    """The life of one process: join the others, check, and let rank 0 write the findings to `answer` as JSON."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=300))
    options: dict[str, Any] = {"store": store, "rank": rank, "world_size": request.ranks}
    if request.device == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device, **options)
    else:
        dist.init_process_group("gloo", **options)
    try:
        mesh = init_mesh(ring=request.ring, ulysses=request.ulysses, device_type=request.device)
        findings = list(examine(request, mesh))
        if rank == 0:
            Path(answer).write_text(json.dumps([asdict(finding) for finding in findings]))
    finally:
        dist.destroy_process_group()


def examine(request: Request, mesh: SequenceMesh) -> Iterator[Finding]:
    """What was found, until something makes further checks impossible. Collective."""
    try:
        model = built(request).to(mesh.device)
        handle = parallelize(model, mesh, scheme=request.scheme, backend=request.backend)
    except NotImplementedError as refusal:
        yield Finding("supported", False, str(refusal))
        return
    handle.undo()
    yield Finding("supported", True, f"{type(model).__name__}, {handle.layers} attention layers")
    batches = forms(_longest(model.config.get_text_config()))
    limits = [(alone(model, form), form) for form in batches]
    try:
        handle = parallelize(model, mesh, scheme=request.scheme, backend=request.backend)
        together(model, mesh, batches[0], request.policy)  # the first forward pass counts the calls
    except NotImplementedError as refusal:
        yield Finding("attention once per layer", False, str(refusal))
        return
    yield Finding("attention once per layer", True, f"{handle.layers_seen} of {handle.layers}")
    yield from _features(model, mesh, handle, batches[0])
    for truth, form in limits:
        found, judge = together(model, mesh, form, request.policy), truth
        if model.dtype != torch.float32:
            handle.undo()
            judge = alone(copy.deepcopy(model).float(), form)
            handle = parallelize(model, mesh, scheme=request.scheme, backend=request.backend)
        limit = _limit(request, model, truth, judge)
        yield _compared(f"{form.name} = documents alone", differences(found, judge), limit)
    yield _prefixes(request, model, mesh, handle)
    handle = parallelize(model, mesh, scheme=request.scheme, backend=request.backend)
    for document in (0, 1, 2):
        seen = leak(model, mesh, batches[3], document, request.policy)
        ok = seen.outside == 0.0 and seen.inside > 0.0
        detail = f"gradient {seen.outside:g} in others, at least {seen.inside:.1e} in its own tokens"
        yield Finding(f"no leak from document {document}", ok, detail)
    handle.undo()


def built(request: Request) -> Any:
    """The model of a request, on the CPU."""
    config = read_config(request.model)
    check_decoder(config, whole=request.real)
    if hasattr(config.get_text_config(), "output_router_logits"):
        config.get_text_config().output_router_logits = False  # of documents alone its loss is another one
    dtype = getattr(torch, request.dtype)
    if not request.real:
        return with_parameters_in(tiny_model(tiny_config(config)), dtype)
    from transformers import AutoModelForCausalLM

    folder = Path(request.model).expanduser()
    return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype, local_files_only=True).eval()


def _longest(config: Any) -> int:
    """Documents must be longer than what windows and chunks reach, or these do not show."""
    sizes = [getattr(config, key, None) for key in ("sliding_window", "attention_chunk_size")]
    return max([7, *(size + 2 for size in sizes if isinstance(size, int))])


def _features(model: Any, mesh: SequenceMesh, handle: Handle, form: Form) -> Iterator[Finding]:
    """Layers ask for what the configuration says, and what they ask for moves the logits."""
    expected = expected_features(model)
    wrong = [
        f"layer {layer} asks for {_words(handle.asked.get(layer, frozenset()))}, its configuration for {_words(needs)}"
        for layer, needs in expected.items()
        if handle.asked.get(layer) != needs
    ]
    summary = f"{len(expected)} layers"
    yield Finding("features of every layer", not wrong, "; ".join(wrong) or summary)
    changes = feature_changes(model, mesh, handle, form)
    for feature in sorted({feature for _, feature in changes}):
        moved = {layer: change for (layer, name), change in changes.items() if name == feature}
        dead = [layer for layer, change in moved.items() if not change > COUNTS]
        told = f"layers {', '.join(map(str, moved))}: logits move by {min(moved.values()):.0e} or more without it"
        yield Finding(
            f"{feature} in use", not dead, told if not dead else f"leaving it out of layers {dead} changes nothing"
        )


def _prefixes(request: Request, model: Any, mesh: SequenceMesh, handle: Handle) -> Finding:
    """Sequences with common prefixes, each prefix computed once. Collective; undoes the handle."""
    handle.undo()
    sequences = sequences_for(model, _longest(model.config.get_text_config()))
    truth = sequences_alone(model, sequences)
    judge = truth if model.dtype == torch.float32 else sequences_alone(copy.deepcopy(model).float(), sequences)
    memory = MemorySettings(loss_tile=16)
    try:
        handle = parallelize(model, mesh, memory, scheme=request.scheme, backend=request.backend)
    except NotImplementedError as refusal:
        return Finding(PREFIXES, True, f"refused: {refusal}")
    try:
        found = sequences_together(model, mesh, sequences, request.policy)
    except NotImplementedError as refusal:
        return Finding(PREFIXES, True, f"refused: {refusal}")
    finally:
        handle.undo()
    return _compared(PREFIXES, differences(found, judge), _limit(request, model, truth, judge), "log-probabilities")


def _limit(request: Request, model: Any, truth: Outcome, judge: Outcome) -> float:
    """Of errors: where nothing else says, what rounding makes of documents alone, in the model's dtype and float32."""
    if request.tolerance is not None:
        return request.tolerance
    if model.dtype == torch.float32:
        return 10 * TOLERANCE if request.real else TOLERANCE
    rounding = differences(truth, judge)
    return 2 * max(rounding.logits, rounding.loss, rounding.gradients)


def _compared(name: str, errors: Errors, limit: float, what: str = "logits") -> Finding:
    numbers = f"{what} {errors.logits:.1e}, loss {errors.loss:.1e}, gradients {errors.gradients:.1e}"
    ok = errors.within(limit)
    reason = "" if ok else f" (limit {limit:.1e}, worst gradient {errors.worst})"
    return Finding(name, ok, numbers + reason)


def _words(features: frozenset[str]) -> str:
    return ", ".join(sorted(features)) or "nothing"

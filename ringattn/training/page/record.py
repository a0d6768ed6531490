"""run.json: what a run knows at its start and nothing else in its folder says; rank 0 writes it, `folder.py` reads it.

A run that goes on in its folder replaces it, and adds to its list of starts.
"""

import importlib.metadata
import json
import os
import platform
import socket
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ringattn.hf.heads import heads_of
from ringattn.memory.host import host_memory
from ringattn.parallel.layout import Layout
from ringattn.training.data.mixture import CachedCorpus
from ringattn.training.data.streaming import StreamedCorpus
from ringattn.training.page.folder import FILE
from ringattn.training.secrets import redacted
from ringattn.training.start.job import Job

PACKAGES = (
    "ringattn", "torch", "triton", "transformers", "flash-attn", "flash-attn-4", "flash_attn_3", "deepspeed", "torchao",
    "peft", "accelerate", "safetensors", "numpy",
)  # fmt: skip
LONGEST_COMMAND = 20_000  # signs of a command line that are kept


def write_record(job: Job, step: int, parameters: int, layout: Layout) -> None:
    """Writes run.json; a disk that does not take it costs a warning.

    Arguments:
        step: that the run goes on after.
        parameters: of the model.
        layout: of the first pack.
    """
    record = redacted(_record(job, step, parameters, layout))
    record["starts"] = [*_starts(job.output), record["starts"]]
    partial = job.output / f".{FILE}.partial"
    try:
        job.output.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(record, indent=1) + "\n")
        partial.replace(job.output / FILE)
    except OSError as error:  # a run does not end for its record
        print(f"warning: {FILE} could not be written: {error.strerror}", file=sys.stderr, flush=True)


def _record(job: Job, step: int, parameters: int, layout: Layout) -> dict[str, Any]:
    cfg, launch = job.cfg, job.launch
    return {
        "title": f"{cfg.model.name} on {cfg.data.name}",
        "command": " ".join(sys.argv)[:LONGEST_COMMAND],
        "starts": {"time": datetime.now(UTC).isoformat(timespec="seconds"), "step": step, "ranks": launch.world_size},
        "steps": cfg.run.steps,
        "parameters": parameters,
        "ranks": launch.world_size,
        "ranks_per_node": launch.ranks_per_node,
        "hardware": hardware(job.device),
        "versions": versions(),
        "memory": _memory(job),
        "data": {} if isinstance(job.corpus, StreamedCorpus) else data_numbers(job.corpus),
        "attention": {
            "lengths": list(layout.docs.lengths),
            "data": cfg.parallel.data,
            "ring": cfg.parallel.ring,
            "ulysses": cfg.parallel.ulysses,
            "policy": layout.policy,
            "scheme": cfg.parallel.scheme,
            **_heads(job.model_config.get_text_config()),
        },
    }


def _heads(text: Any) -> dict[str, int]:
    """Of a model's configuration; nothing for one that has none, or another number in each layer."""
    try:
        heads = heads_of(text)
        return {"query_heads": int(heads.queries), "key_heads": int(heads.keys), "head_dim": int(heads.dim)}
    except (AttributeError, NotImplementedError, TypeError, ValueError, ZeroDivisionError):
        return {}


def _starts(output: Path) -> list[Any]:
    """The starts before this one."""
    try:
        known = json.loads((output / FILE).read_text())["starts"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return known[-99:] if isinstance(known, list) else []


def _memory(job: Job) -> dict[str, Any]:
    """The plan: bytes by item at the fullest moment of a step, and what the host holds."""
    choice = job.plan.choice
    if choice is None:
        return {"note": job.plan.note, "items": {}}
    return {
        "note": job.plan.note,
        "at": choice.plan.peak().name,
        "items": dict(job.plan.items),
        "room": choice.limits.device_room,
        "host": dict(choice.plan.host),
    }


def hardware(device: torch.device) -> dict[str, Any]:
    """The machine of rank 0; memory in bytes."""
    found: dict[str, Any] = {
        "host": socket.gethostname(),
        "system": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory": host_memory().total,
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["gpu_memory"] = torch.cuda.get_device_properties(device).total_memory
        found["gpus_of_the_machine"] = torch.cuda.device_count()
    return found


def versions() -> dict[str, str]:
    """Of what a run computes with, as far as it is installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["CUDA"] = torch.version.cuda
    return found


def data_numbers(corpus: CachedCorpus) -> dict[str, Any]:
    """Documents and tokens of a corpus, and both by length: `[shortest, longest, documents, tokens]` for each power of
    two."""
    lengths = corpus.lengths[corpus.lengths > 0]
    powers = np.floor(np.log2(lengths)).astype(np.int64)
    counts = np.bincount(powers)
    tokens = np.bincount(powers, weights=lengths)
    return {
        "documents": len(corpus),
        "empty": len(corpus) - len(lengths),
        "tokens": corpus.total,
        "longest": corpus.longest,
        "median": int(np.median(lengths)) if len(lengths) else 0,
        "histogram": [
            [1 << power, (2 << power) - 1, int(counts[power]), int(tokens[power])]
            for power in range(int(powers.min(initial=len(counts))), len(counts))
        ],
    }

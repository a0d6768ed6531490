"""`recipes/evaluate.py` after its preparation: opens the model, measures, writes results and pictures."""

import json
import math
import os
import time
import warnings
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ringattn import init_mesh
from ringattn.first_failure import FirstFailure
from ringattn.training.evaluation.measures import (
    answered,
    generated,
    limited_reach,
    loss_by_position,
    position_edges,
    write_logprobs,
)
from ringattn.training.evaluation.opened import open_model
from ringattn.training.evaluation.pictures import draw_by_length, draw_heat_map, draw_positions, tokens_of
from ringattn.training.evaluation.prepared import Evaluation, cells
from ringattn.training.evaluation.scoring import Scorer

SUMMARY = "evaluation.json"


@FirstFailure()
def evaluate(job: Evaluation) -> None:
    """Runs a prepared evaluation. Collective.

    Each task writes its results to a JSON file and a picture of its own, in the order of `tasks`; `evaluation.json` has
    the results of all of them, and of earlier evaluations into the same folder for tasks that are not done again.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.")
    settings, rank0 = job.settings, job.launch.rank == 0
    shape = settings.shape
    mesh = init_mesh(
        data=shape.data,
        ring=shape.ring,
        ulysses=shape.ulysses,
        device_type=job.device.type,
        ulysses_across_nodes=settings["parallel.ulysses_across_nodes"],
    )
    if rank0:
        settings.output.mkdir(parents=True, exist_ok=True)
        print(_opening(job), flush=True)
    scorer = Scorer(open_model(job.source, settings, mesh), mesh, settings["parallel.policy"])
    for task in settings["tasks"]:
        started = time.perf_counter()
        result = _TASKS[task](job, scorer, task)
        result["seconds"] = round(time.perf_counter() - started, 3)
        if rank0:
            _record(job, task, result)
            print(f"{task}: {_told(result)}  {result['seconds']:.1f} s", flush=True)
    if rank0:
        print(f"done: {settings.output}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


def _opening(job: Evaluation) -> str:
    shape = job.settings.shape
    return (
        f"{job.source.name}, {job.settings.dtype}, tokens of {job.source.tokenizer}\n"
        f"{job.launch.world_size} ranks on {job.device.type}: data {shape.data} × ring {shape.ring} × ulysses "
        f"{shape.ulysses}, into {job.settings.output}"
    )


def _asked(job: Evaluation, scorer: Scorer, task: str) -> dict[str, Any]:
    """A task with examples: the share of right answers by length, and for one needle by depth."""
    settings, examples = job.settings, list(job.examples[task])
    found = answered(scorer, examples, settings.pack)
    lengths = settings["lengths"]
    depths = settings["depths"] if task == "needle" else [math.nan]
    result: dict[str, Any] = {"lengths": lengths}
    if task == "needle":
        result["depths"] = depths
    shares = {"right": [one.share for one in found]}
    if settings["generate"]:
        stop = getattr(job.source.config.get_text_config(), "eos_token_id", None)
        written = generated(scorer, examples, settings.pack, stop if isinstance(stop, int) else None)
        shares["right_generated"] = [one.share for one in written]
    for name, values in shares.items():
        table = cells(examples, values, depths, lengths)
        result[name] = table if task == "needle" else table[0]
    logprobs = cells(examples, [one.logprob for one in found], depths, lengths)
    result["logprob"] = logprobs if task == "needle" else logprobs[0]
    result["mean"] = sum(shares["right"]) / len(examples)
    result["examples"] = len(examples)
    if job.launch.rank == 0:
        _draw(job, task, result)
    return result


def _draw(job: Evaluation, task: str, result: dict[str, Any]) -> None:
    path, lengths = job.settings.output / f"{task}.png", result["lengths"]
    if task == "needle":
        draw_heat_map(path, lengths, result["depths"], result["right"], f"{job.source.name}: a needle in a haystack")
        return
    lines = {"scored": result["right"]} | (
        {"generated": result["right_generated"]} if "right_generated" in result else {}
    )
    draw_by_length(path, lengths, lines, f"{job.source.name}: {task.replace('_', ' ')}")


def _positions(job: Evaluation, scorer: Scorer, task: str) -> dict[str, Any]:
    """Loss by position; for `window` also with attention of limited reach."""
    settings, texts = job.settings, job.texts
    assert texts is not None
    edges = position_edges(min(settings.max_length, texts.longest), settings["bins"])
    reaches = [None, *(settings["windows"] if task == "window" else [])]
    losses: dict[str, list[float]] = {}
    means: dict[str, float] = {}
    counts: list[int] = []
    for reach in reaches:
        name = "full" if reach is None else f"window {tokens_of(reach)}"
        with limited_reach(scorer.model, reach):
            losses[name], counts = loss_by_position(scorer, texts, edges, settings.pack)
        known = [(loss, count) for loss, count in zip(losses[name], counts, strict=True) if count]
        means[name] = sum(loss * count for loss, count in known) / sum(count for _, count in known)
    if job.launch.rank == 0:
        told = "loss by position" if task == "position" else "loss with full and with limited attention"
        draw_positions(settings.output / f"{task}.png", edges, losses, f"{job.source.name}: {told}")
    plain = {name: [None if math.isnan(one) else one for one in values] for name, values in losses.items()}
    return {"edges": edges, "loss": plain, "targets": counts, "mean": means}


def _logprobs(job: Evaluation, scorer: Scorer, task: str) -> dict[str, Any]:
    assert job.texts is not None
    documents = write_logprobs(scorer, job.texts, job.settings.pack, job.settings.output / "logprobs.jsonl")
    return {"file": "logprobs.jsonl", "documents": documents, "tokens": job.texts.total}


_TASKS = {
    "position": _positions,
    "window": _positions,
    "logprobs": _logprobs,
    "needle": _asked,
    "multi_needle": _asked,
    "variable_tracking": _asked,
}


def _record(job: Evaluation, task: str, result: dict[str, Any]) -> None:
    """Writes a task's own file, and all results so far."""
    folder = job.settings.output
    about = {"model": job.source.name, "step": job.source.step, "dtype": str(job.settings.dtype).removeprefix("torch.")}
    _write(folder / f"{task}.json", about | result)
    path = folder / SUMMARY
    try:
        known = json.loads(path.read_text())["tasks"]
    except (OSError, ValueError, KeyError, TypeError):
        known = {}
    _write(path, {"tasks": known | {task: about | result}})


def _write(path: Path, values: dict[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(values, indent=1) + "\n")
    os.replace(partial, path)


def _told(result: dict[str, Any]) -> str:
    mean = result.get("mean")
    if isinstance(mean, dict):
        return ", ".join(f"loss {loss:.4f} ({name})" for name, loss in mean.items())
    if mean is not None:
        return f"{mean:.1%} right of {result['examples']} documents"
    return f"{result['tokens']:,} tokens of {result['documents']:,} documents in {result['file']}"

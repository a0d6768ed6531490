"""The model card: what a model was made of, how, how good it is, and by which versions; README.md of its folder."""

import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from ringattn.training.export.run_folder import RunFolder
from ringattn.training.report.records import read_metrics
from ringattn.training.resuming.best import METRICS
from ringattn.training.secrets import redacted

PACKAGES = ("ringattn", "torch", "transformers", "peft", "tokenizers", "safetensors")
EVALUATION = Path("evaluation", "evaluation.json")
_LAST = 10  # steps whose losses are averaged
_HEAD = """---
library_name: {library}
pipeline_tag: text-generation
tags:
- long-context
- ringattn
---
"""


def model_card(run: RunFolder, name: str, adapter: bool, tokenizer: bool) -> str:
    """The text of README.md.

    Arguments:
        name: of the model's folder.
        adapter: whether the folder holds factors alone.
        tokenizer: whether it holds a tokenizer.
    """
    parts = [_HEAD.format(library="peft" if adapter else "transformers"), f"# {name}\n", _opening(run, adapter)]
    if not tokenizer:
        parts.append("Tokens are bytes of UTF-8: there is no tokenizer.\n")
    parts.append(_table("Training", _training(run)))
    parts.append(_table("Data", _data(run)))
    parts.append(_table("Evaluation", _evaluation(run)))
    parts.append(_table("Versions of this export", _versions()))
    return str(redacted("\n".join(parts)))


def _opening(run: RunFolder, adapter: bool) -> str:
    length = f"{run.cfg['data']['seq_len']:,} tokens"
    begun = f"continued from `{Path(run.base).name}`" if run.base else "trained from random weights"
    kind = f"LoRA factors (PEFT) for `{run.base}`" if adapter else f"A {run.model_config.model_type} language model"
    steps = run.cfg["run"]["steps"]
    early = "" if run.state.step >= steps else f" This is step {run.state.step:,} of {steps:,}: the run was not done."
    return f"{kind}, {begun} on packs of {length} with ringattn.{early}\n"


def _training(run: RunFolder) -> dict[str, str]:
    cfg, config = run.cfg, run.model_config.get_text_config()
    optim, model = cfg["optim"], cfg["model"]
    rows = {
        "steps": f"{run.state.step:,}",
        "tokens": f"{run.state.tokens:,}",
        "tokens a pack": f"{cfg['data']['seq_len']:,}",
        "packs a step": f"{cfg['data'].get('packs_per_step', 1):,}",
        "longest position": f"{getattr(config, 'max_position_embeddings', 0):,}",
        "rotary positions": _inline(getattr(config, "rope_parameters", None)),
        "optimizer": f"{optim.get('name', 'adamw')}, weight decay {optim['weight_decay']:g}, clip {optim['clip']:g}",
        "learning rate": f"{optim['lr']:g}, {optim.get('schedule', 'cosine')}",
        "computed in": cfg["run"]["dtype"],
        "seed": str(cfg["run"]["seed"]),
    }
    if run.lora is not None:
        rows["LoRA"] = str(run.lora)
    if model.get("freeze"):
        rows["frozen"] = ", ".join(f"`{pattern}`" for pattern in model["freeze"])
    return rows


def _data(run: RunFolder) -> dict[str, str]:
    """Names of files and not their paths, which tell of the machine."""
    data = run.cfg["data"]
    rows = {"corpus": str(data["name"])}
    if files := data.get("files"):
        names = [Path(str(one)).name for one in files] if isinstance(files, list) else [str(files)]
        rows["files"] = ", ".join(f"`{name}`" for name in names)
    for one in data.get("sources") or ():
        name = one.get("name") or Path(str(one.get("path") or one.get("hub"))).name
        weight = f", weight {one['weight']:g}" if one.get("weight") is not None else ""
        rows[f"`{name}`"] = f"{one.get('kind') or 'text'}{weight}"
    if any(one.get("kind") == "chat" for one in data.get("sources") or ()):
        rows["loss on"] = str(data.get("loss_on"))
    return rows | {"fingerprint": f"`{run.state.corpus[:16]}`"}


def _evaluation(run: RunFolder) -> dict[str, str]:
    """Losses up to the step of the checkpoint."""
    records = [one for one in read_metrics(run.path / METRICS) if one["step"] <= run.state.step]
    losses = [one["loss"] for one in records if isinstance(one.get("loss"), int | float)][-_LAST:]
    rows = {}
    if losses:
        rows[f"training loss, mean of the last {len(losses)} steps"] = f"{sum(losses) / len(losses):.4f} nats a token"
    validated = [one for one in records if one.get("validation")]
    for name, loss in (validated[-1]["validation"] if validated else {}).items():
        rows[f"validation loss of {name} (step {validated[-1]['step']:,})"] = f"{loss:.4f} nats a token"
    return rows | _tasks(run)


def _tasks(run: RunFolder) -> dict[str, str]:
    """Results of `ringattn evaluate` for this step, from the run's folder."""
    try:
        tasks = json.loads((run.path / EVALUATION).read_text())["tasks"]
        done = {task: one["mean"] for task, one in tasks.items() if one.get("step") == run.state.step and "mean" in one}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    rows = {}
    for task, mean in done.items():
        if isinstance(mean, dict):
            rows[task] = ", ".join(f"{loss:.4f} nats a token ({name})" for name, loss in mean.items())
        elif isinstance(mean, int | float):
            rows[task] = f"{mean:.1%} right"
    return rows


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _inline(value: Mapping[str, Any] | None) -> str:
    return ", ".join(f"{key} {one}" for key, one in sorted((value or {}).items())) or "none"


def _table(title: str, rows: Mapping[str, str]) -> str:
    if not rows:
        return ""
    lines = [f"| {key} | {value} |" for key, value in rows.items()]
    return "\n".join([f"## {title}\n", "| | |", "| --- | --- |", *lines, ""])

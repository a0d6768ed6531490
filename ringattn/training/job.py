"""Everything about a run that is decided before a process group exists: one place to refuse, and nothing to hang."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from ringattn import hf
from ringattn.training.checkpoint import TrainState, newest_checkpoint
from ringattn.training.config import check_model, curve_differences, resolve, validate
from ringattn.training.corpus import Corpus, matching_files, stdlib_corpus, text_corpus
from ringattn.training.launched import Launch, pick_device
from ringattn.training.models import empty_model, model_config


@dataclass(frozen=True)
class Job:
    """A run that can start.

    Arguments:
        cfg: the resolved configuration, as the output folder keeps it.
        launch: this process among the others.
        device: where it computes.
        output: the run's folder.
        corpus: its documents.
        model_config: its transformers configuration.
        resume: newest complete checkpoint and its state, or None for a first start.
    """

    cfg: DictConfig
    launch: Launch
    device: torch.device
    output: Path
    corpus: Corpus
    model_config: Any
    resume: tuple[Path, TrainState] | None

    @property
    def done(self) -> bool:
        """Whether the folder already holds all steps of this run."""
        return self.resume is not None and self.resume[1].step >= self.cfg.run.steps


def prepare(cfg: DictConfig, launch: Launch) -> Job:
    """Checks a configuration against this machine, its data and the output folder. No collective.

    Raises ValueError with one message that names the key and the numbers.
    """
    device = pick_device(launch)
    shape = validate(cfg, launch.world_size, launch.ranks_per_node, device.type)
    resolved = resolve(cfg, shape, device.type)
    output = Path(cfg.run.output).expanduser().resolve()
    if output.exists() and not output.is_dir():
        raise ValueError(f"run.output={cfg.run.output} is a file; it must be a folder")
    family_overrides = resolved["model"]["config"] or {}
    model = model_config(cfg.model.family, cfg.model.path, family_overrides)
    corpus = load_corpus(cfg)
    _check_attention(model)
    check_model(cfg, model, corpus)
    resume = newest_checkpoint(output / "checkpoints")
    if resume is not None:
        _check_resume(cfg, resolved, output, resume[1], launch, corpus)
    return Job(OmegaConf.create(resolved), launch, device, output, corpus, model, resume)


def _check_attention(config: Any) -> None:
    """Raises ValueError for a model whose attention cannot be computed over a sequence axis."""
    try:
        hf.check_model(empty_model(config))
    except NotImplementedError as error:
        raise ValueError(f"model: {error}") from None


def load_corpus(cfg: DictConfig) -> Corpus:
    """The corpus of `data`; the first process to ask for a text corpus tokenizes it, the others wait."""
    if cfg.data.name == "stdlib":
        return stdlib_corpus()
    return text_corpus(
        matching_files(list(cfg.data.files)),
        str(cfg.data.tokenizer),
        cfg.data.text_field,
        cfg.data.add_eos,
        Path(cfg.data.cache).expanduser(),
    )


def write_config(cfg: DictConfig, output: Path) -> None:
    """Writes the resolved configuration as `config.yaml`."""
    output.mkdir(parents=True, exist_ok=True)
    partial = output / "config.yaml.partial"
    OmegaConf.save(cfg, partial)
    partial.replace(output / "config.yaml")


def _check_resume(
    cfg: DictConfig, resolved: dict[str, Any], output: Path, state: TrainState, launch: Launch, corpus: Corpus
) -> None:
    if state.engine != cfg.engine.name:
        raise ValueError(
            f"engine.name={cfg.engine.name}, but the checkpoint in {output} was written by {state.engine} and only it "
            "can read it; choose another run.output"
        )
    if state.engine == "deepspeed" and state.world_size != launch.world_size:
        raise ValueError(
            f"the DeepSpeed checkpoint in {output} was written by {state.world_size} ranks and {launch.world_size} "
            "were started; start as many, or choose another run.output"
        )
    if cfg.run.resume == "force":
        return
    if state.corpus != corpus.fingerprint:
        raise ValueError(
            f"the documents of data.name={cfg.data.name} changed since the checkpoint in {output}; choose another "
            "run.output, or go on all the same with run.resume=force"
        )
    saved = output / "config.yaml"
    old: Any = OmegaConf.to_container(OmegaConf.load(saved)) if saved.is_file() else resolved
    differences = curve_differences(old, resolved)
    if differences:
        shown = "; ".join(f"{key} was {json.dumps(a)} and is now {json.dumps(b)}" for key, a, b in differences)
        raise ValueError(
            f"{output} holds a run with another configuration: {shown}. Choose another run.output, or go on from its "
            "checkpoint all the same with run.resume=force"
        )

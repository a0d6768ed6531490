"""Everything about a run that is decided before a process group exists: one place to refuse, and nothing to hang."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from ringattn.training.architecture import check_family, configured
from ringattn.training.checkpoint import TrainState, newest_checkpoint
from ringattn.training.choices import with_saved_model
from ringattn.training.config import check_positions, check_vocabulary, completed, resolve, validate
from ringattn.training.corpus import Corpus, stdlib_corpus, text_corpus
from ringattn.training.data.files import matching_files
from ringattn.training.data.tokenizer import BYTE_VOCABULARY, BYTES, has_tokenizer, load_tokenizer
from ringattn.training.evaluation.validation import shared_notes, validation_sets
from ringattn.training.fitness import check_attention, check_head_chunks, compile_mode
from ringattn.training.launched import Launch, pick_device
from ringattn.training.lora import lora_notes, lora_of
from ringattn.training.memory_plan import MemoryPlan, plan_memory, values_of
from ringattn.training.output import check_output
from ringattn.training.pretrained import load_weights
from ringattn.training.resume import check_resume


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
        plan: what is done about memory, and what it takes.
        resume: newest complete checkpoint and the state to go on from, or None for a first start.
        notes: what the user should know about what was decided for them.
        validation: documents that are only looked at, by the names of their sets.
    """

    cfg: DictConfig
    launch: Launch
    device: torch.device
    output: Path
    corpus: Corpus
    model_config: Any
    plan: MemoryPlan
    resume: tuple[Path, TrainState] | None
    notes: tuple[str, ...] = ()
    validation: Mapping[str, Corpus] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        """Whether the folder already holds all steps of this run."""
        return self.resume is not None and self.resume[1].step >= self.cfg.run.steps


def prepare(cfg: DictConfig, launch: Launch, chosen: Collection[str] | None = None) -> Job:
    """Checks a configuration against this machine, its data and the output folder. No collective.

    Arguments:
        chosen: the `model` keys that the user set (see `choices.py`): with a path only these change the saved
            configuration. None for all that `cfg` has.

    Raises ValueError with one message that names the key and the numbers.
    """
    device = pick_device(launch)
    cfg = with_saved_model(completed(cfg), chosen)
    shape = validate(cfg, launch.world_size, launch.ranks_per_node, device.type)
    resolved = OmegaConf.create(resolve(cfg, shape, device.type))
    output = Path(cfg.run.output).expanduser().resolve()
    found = newest_checkpoint(output / "checkpoints")
    check_output(output, str(cfg.run.output), write=found is None or found[1].step < cfg.run.steps)
    config, notes = _model(resolved)
    empty = check_attention(config, lora_of(resolved.model))
    notes += lora_notes(resolved, lora_of(resolved.model), cfg.optim.lr, empty)
    check_head_chunks(cfg, shape, config)
    resolved.engine.compile = compile_mode(cfg, device.type, empty)
    plan = plan_memory(resolved, config, empty, shape, launch, device)
    resolved.memory.update(values_of(plan))
    corpus = load_corpus(resolved, config, output)
    validation = validation_sets(resolved, output)
    for documents in (corpus, *validation.values()):
        check_positions(resolved, config, documents)
    if launch.rank == 0:  # which alone tells notes
        notes += shared_notes(corpus, validation)
    if found is not None:
        state, said = check_resume(resolved, output, found[1], launch, corpus, config, empty)
        found, notes = (found[0], state), notes + said
    return Job(resolved, launch, device, output, corpus, config, plan, found, (*notes, plan.note), validation)


def _model(cfg: DictConfig) -> tuple[Any, list[str]]:
    """The configuration of the model, and what is to be said about it."""
    path = cfg.model.path
    overrides: Any = OmegaConf.to_container(cfg.model.config)
    config, changes = configured(cfg.model.family, path, overrides)
    if path is None:
        return config, []
    if cfg.model.family is not None:
        check_family(cfg.model.family, path, config)
    _, differing = load_weights(config, path, list(cfg.model.allow_mismatch), shapes_only=True)
    changed = "with " + ", ".join(map(str, changes)) if changes else "as it was saved"
    notes = [f"model.path={path}: {changed}"]
    if differing:
        notes.append(f"weights that differ, as model.allow_mismatch permits: {differing}")
    if cfg.data.get("tokenizer", BYTES) == BYTES and has_tokenizer(path):
        notes.append(
            f"warning: data.name={cfg.data.name} is read as bytes, but the model has a tokenizer of its own, whose ids "
            f"mean something else; data=text data.tokenizer={path} uses it"
        )
    return config, notes


def load_corpus(cfg: DictConfig, model_config: Any, output: Path) -> Corpus:
    """The corpus of `data`; the first process to ask for a text corpus tokenizes it, the others wait.

    Raises ValueError, before anything is tokenized, for more tokens than the model knows.
    """
    data = cfg.data
    if data.name == "stdlib":
        check_vocabulary(cfg, model_config, BYTE_VOCABULARY)
        return stdlib_corpus()
    tokenizer = load_tokenizer(data.tokenizer, data.add_eos)
    check_vocabulary(cfg, model_config, tokenizer.vocab_size)
    cache = Path(data.cache).expanduser()
    files = matching_files(list(data.files), own=(output, cache.resolve()))
    return text_corpus(files, tokenizer, data.text_field, data.add_eos, cache)

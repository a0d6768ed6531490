"""Everything about a run that is decided before a process group exists: one place to refuse, and nothing to hang."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from ringattn.training.checkpoint import TrainState, newest_checkpoint
from ringattn.training.config.checks import check_positions, check_vocabulary, completed, resolve, validate
from ringattn.training.config.choices import with_saved_model
from ringattn.training.config.data_keys import check_enough, notes_of
from ringattn.training.data.corpus import Corpus, stdlib_corpus, text_corpus
from ringattn.training.data.files import matching_files
from ringattn.training.data.loading import Loader, load_validation, shared_documents
from ringattn.training.data.mixture import MixedCorpus
from ringattn.training.data.sources import sources_of
from ringattn.training.data.tokenizer import BYTE_VOCABULARY, BYTES, has_tokenizer, load_tokenizer
from ringattn.training.memory_plan import MemoryPlan, plan_memory, values_of
from ringattn.training.model.architecture import check_family, configured, longer_without_rope
from ringattn.training.model.fitness import check_attention, check_head_chunks, check_sharing, compile_mode
from ringattn.training.model.freezing import freeze_notes
from ringattn.training.model.lora import lora_notes, lora_of
from ringattn.training.model.pretrained import load_weights
from ringattn.training.model.rope import rope_of
from ringattn.training.packs.ordering import AnyCorpus
from ringattn.training.resuming.resume import check_resume
from ringattn.training.resuming.save_plan import settle_saving
from ringattn.training.start.elastic import fitted
from ringattn.training.start.launched import Launch, pick_device
from ringattn.training.start.output import check_output


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
        validation: held-out corpora by name.
    """

    cfg: DictConfig
    launch: Launch
    device: torch.device
    output: Path
    corpus: AnyCorpus
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
    output = Path(str(cfg.run.output)).expanduser().resolve()
    cfg, sizes = fitted(cfg, output, launch.world_size, launch.ranks_per_node)
    shape = validate(cfg, launch.world_size, launch.ranks_per_node, device.type)
    resolved = OmegaConf.create(resolve(cfg, shape, device.type))
    found = newest_checkpoint(output / "checkpoints")
    check_output(output, str(cfg.run.output), write=found is None or found[1].step < cfg.run.steps)
    config, notes = model_of(resolved)
    empty = check_attention(config, lora_of(resolved.model), list(resolved.model.freeze))
    check_sharing(resolved, config, empty)
    notes += sizes
    notes += lora_notes(resolved, lora_of(resolved.model), cfg.optim.lr, empty) + freeze_notes(resolved, empty)
    check_head_chunks(cfg, shape, config)
    resolved.engine.compile = compile_mode(cfg, device.type, empty)
    plan = plan_memory(resolved, config, empty, shape, launch, device)
    resolved.memory.update(values_of(plan))
    if plan.head_chunks is not None:
        resolved.parallel.head_chunks = plan.head_chunks
    resolved.run.async_save = settle_saving(resolved, empty, plan.states, launch, device, output)
    corpus = load_corpus(resolved, config, output)
    check_enough(resolved, corpus)
    loader = loader_of(resolved, config, output)
    held_out = load_validation(loader)
    for documents in (corpus, *held_out.values()):
        check_positions(resolved, config, documents)
    notes += notes_of(resolved.data, corpus) + loader.notes + leaks(corpus, held_out)
    if found is not None:
        state, said = check_resume(resolved, output, found[1], launch, corpus, config, empty)
        found, notes = (found[0], state), notes + said
    return Job(resolved, launch, device, output, corpus, config, plan, found, (*notes, plan.note), held_out)


def model_of(cfg: DictConfig) -> tuple[Any, list[str]]:
    """The configuration of the model, and what is to be said about it."""
    path = cfg.model.path
    overrides: Any = OmegaConf.to_container(cfg.model.config)
    config, changes = configured(cfg.model.family, path, overrides, rope_of(cfg.model), cfg.data.seq_len)
    if path is None:
        return config, []
    if cfg.model.family is not None:
        check_family(cfg.model.family, path, config)
    _, differing = load_weights(config, path, list(cfg.model.allow_mismatch), shapes_only=True)
    changed = "with " + ", ".join(map(str, changes)) if changes else "as it was saved"
    notes = [f"model.path={path}: {changed}"]
    if warning := longer_without_rope(changes):
        notes.append(warning)
    if differing:
        notes.append(f"weights that differ, as model.allow_mismatch permits: {differing}")
    if cfg.data.get("tokenizer", BYTES) == BYTES and has_tokenizer(path):
        notes.append(
            f"warning: data.name={cfg.data.name} is read as bytes, but the model has a tokenizer of its own, whose ids "
            f"mean something else; data=text data.tokenizer={path} uses it"
        )
    return config, notes


def load_corpus(cfg: DictConfig, model_config: Any, output: Path) -> AnyCorpus:
    """The corpus of `data`; the first process to ask for a text corpus tokenizes it, the others wait.

    Raises ValueError, before anything is tokenized, for more tokens than the model knows.
    """
    data = cfg.data
    if data.name == "stdlib":
        check_vocabulary(cfg, model_config, BYTE_VOCABULARY)
        return stdlib_corpus()
    if data.name == "sources":
        loader, sources = loader_of(cfg, model_config, output), sources_of(OmegaConf.to_container(data.sources))
        return loader.stream(sources) if data.streaming else loader.mixture(sources)
    tokenizer = load_tokenizer(data.tokenizer, data.add_eos)
    check_vocabulary(cfg, model_config, tokenizer.vocab_size)
    cache = Path(data.cache).expanduser()
    files = matching_files(list(data.files), own=(output, cache.resolve()))
    return text_corpus(files, tokenizer, data.text_field, data.add_eos, cache)


def loader_of(cfg: DictConfig, model_config: Any, output: Path) -> Loader:
    known = model_config.get_text_config().vocab_size
    return Loader(cfg.data, (output,), lambda tokens: check_vocabulary(cfg, model_config, tokens), known)


def leaks(corpus: AnyCorpus, held_out: Mapping[str, Corpus]) -> list[str]:
    """What is to be said about held-out documents that are also trained on."""
    if held_out and not isinstance(corpus, Corpus | MixedCorpus):
        return ["data.validation: whether it shares documents with a stream is not known before that is read"]
    notes = []
    for name, one in held_out.items():
        if isinstance(corpus, Corpus | MixedCorpus) and (count := shared_documents(corpus, one)):
            notes.append(
                f"warning: data.validation: {count:,} of the {len(one):,} documents of {name!r} are also in the "
                "training data, token for token: their loss says nothing about unseen text"
            )
    return notes

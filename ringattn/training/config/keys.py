"""Every key of a configuration, and what its value may be: tables that `checks.py` checks by."""

import math

from ringattn.kernels.registry import backends
from ringattn.parallel.planning.options import scheme_names
from ringattn.training.config import memory_keys as memory
from ringattn.training.config import optim
from ringattn.training.config.data_keys import OF_PACKS
from ringattn.training.packs.ahead import PLACES

CHOICES: dict[str, tuple[str | bool, ...]] = {
    "data.name": ("stdlib", "text", "sources"),
    "data.ahead": PLACES,
    "parallel.scheme": scheme_names(),
    "parallel.policy": ("auto", "contiguous", "zigzag", "balanced"),
    "parallel.backend": ("auto", *backends()),
    "engine.name": ("fsdp2", "deepspeed"),
    "engine.compile": ("auto", "none", "elementwise"),
    **optim.CHOICES,
    "run.dtype": ("auto", "float32", "bfloat16"),
    "run.resume": ("auto", "force"),
    "run.on_spike": ("record", "skip"),
    "run.async_save": ("auto", True, False),
}
# Smallest allowed value.
INTEGERS: dict[str, int] = {
    "data.seq_len": 1,
    "data.packs_per_step": 1,
    "data.prefetch": 1,
    "data.delay": 0,
    "parallel.data": 1,
    "parallel.ring": 1,
    "parallel.ulysses": 1,
    "parallel.head_chunks": 1,
    "run.steps": 1,
    "run.seed": 0,
    "run.save_every": 0,
    "run.keep": 1,
    "run.keep_best": 0,
    "run.memory_every": 0,
    "run.max_failed_saves": 1,
    "run.log_every": 1,
    "run.check_every": 0,
    "run.recompute_every": 0,
    "run.max_bad_steps": 0,
    "run.straggler_every": 0,
    "run.evaluate_every": 0,
}
LARGEST = {"run.seed": 2**32 - 1}  # what every library's generator takes
# Allowed interval, both ends included, of finite numbers.
NUMBERS: dict[str, tuple[float, float]] = {
    "model.lr": (0.0, math.inf),
    "model.lr_from_path": (0.0, math.inf),
    "optim.lr": (0.0, math.inf),
    "optim.warmup_ratio": (0.0, 1.0),
    "optim.min_ratio": (0.0, 1.0),
    "optim.decay_ratio": (0.0, 1.0),
    "optim.weight_decay": (0.0, math.inf),
    "optim.eps": (0.0, math.inf),
    "optim.clip": (0.0, math.inf),
    "run.start_timeout": (1.0, math.inf),
    "run.spike": (0.0, math.inf),
    "run.straggler_percent": (0.0, math.inf),
    "run.grace": (1.0, math.inf),
}
SWITCHES = (
    "data.pad", "parallel.ulysses_across_nodes", "run.deterministic", "run.elastic", "run.memory_neighbours",
    "run.plan_only", "run.report", "run.tensorboard",
)  # fmt: skip
TEXTS = ("model.name", "model.family", "model.path", "run.output", "run.memory_folder")
# Keys that only one option of their group has.
OF_TEXT = ("data.files", "data.text_field", "data.tokenizer", "data.add_eos", "data.cache")
OF_DEEPSPEED = ("engine.zero_stage",)
# May be null, which is the same as left out.
OPTIONAL = {"data.packs_per_step", "data.delay", "parallel.data", "parallel.ring", "parallel.ulysses"}
OPTIONAL |= {"parallel.head_chunks", "optim.lr"}
OPTIONAL |= {"model.family", "model.path", "model.config", "model.lr", "model.lr_from_path", "model.allow_mismatch"}
OPTIONAL |= memory.OPTIONAL | {"model.lora", "model.rope", "model.freeze", "run.trackers", "run.profile"} | OF_PACKS
# Below model.config every key of the transformers configuration is allowed; these have keys of their own, and sets of
# data.validation have names.
NESTED = ("model.config.", "model.lora.", "model.rope.", "data.validation.")
KEYS = {*CHOICES, *INTEGERS, *NUMBERS, *SWITCHES, *TEXTS, "model.config", "model.allow_mismatch", "optim.betas"}
KEYS |= {"run.hang_after", "run.trackers", "run.profile"}
KEYS |= memory.KEYS | {"model.lora", "model.rope", "model.freeze"} | OF_PACKS

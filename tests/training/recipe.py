"""The recipe as a user starts it: up to the point where it would train, in this process; or whole, in a fork."""

import json
import shutil
import socket
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import open_dict

from ringattn.training.config.choices import chosen_by_user
from ringattn.training.start import job, meeting
from ringattn.training.start.job import Job, prepare
from ringattn.training.start.launched import Launch
from tests.training.forked import ROOT, all_end, fork_rank

CONFIGS = ROOT / "configs"
SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
}


THREE_LAYERS: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
}


_stdlib = cache(job.stdlib_corpus)  # the same for every test


def save_model(folder: Path, seed: int = 0, **changes: Any) -> Any:
    """Saves a tiny Llama with Llama 3.1's rotary scaling, as another program would have."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SIZES | changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.12)
    model.save_pretrained(folder)
    return model


def prepared(*overrides: str, ranks: int = 1) -> Job:
    """What `recipes/train.py` makes of a command line; raises what it would refuse with."""
    with initialize_config_dir(str(CONFIGS), version_base=None):
        cfg = compose("train", list(overrides), return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        with open_dict(cfg):
            del cfg["hydra"]
        with mock.patch.object(job, "stdlib_corpus", _stdlib):
            return prepare(cfg, Launch("single", 0, ranks, 0, ranks, "127.0.0.1", 0), chosen_by_user(cfg))


def alone() -> None:
    """The other ranks of a started one never come: it shall not wait long to tell them anything."""
    meeting.HEARD = 0.2


def started(tmp_path: Path, *arguments: str, **variables: str) -> tuple[int | None, str, str]:
    """Exit code, stdout and stderr of the recipe in one rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    environment |= {"LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    out, err = tmp_path / "stdout", tmp_path / "stderr"
    for path in (out, err):
        path.unlink(missing_ok=True)
    rank = fork_rank(arguments, environment | variables, out, err, alone)
    assert all_end([rank], 200), out.read_text() + err.read_text()
    return rank.exitcode, out.read_text(), err.read_text()


def assert_it_goes_on(tmp_path: Path, *given: str) -> None:
    """A run of four steps that saves after two of them, started again without its last checkpoint, has its losses."""

    def losses() -> list[float]:
        return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]

    output = tmp_path / "out"
    given = (f"run.output={output}", "data.seq_len=128", "run.steps=4", "run.save_every=2", "run.keep=5", *given)
    code, out, err = started(tmp_path, *given)
    assert code == 0, out + err
    whole = losses()
    shutil.rmtree(output / "checkpoints" / "step-00000004")
    code, out, err = started(tmp_path, *given)
    assert code == 0, out + err
    assert "from step 2" in out
    assert losses() == whole

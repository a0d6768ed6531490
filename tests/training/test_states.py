"""What lives between steps: each setting against the same run without it, on two ranks."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from ringattn import Documents, Layout, SequenceMesh
from ringattn.hf import attention_kwargs, parallelize
from ringattn.memory.settings import StateSettings
from ringattn.training.engines import Engine, EngineOptions, build_engine
from ringattn.training.engines.optimizers import PAIRS, why_no_optimizer
from ringattn.training.loss import backward_loss, share, token_loss_sum
from ringattn.training.models import build_model, model_config
from tests.parallel.ranks import mesh_of
from tests.pool import Pools

SIZES = {
    "vocab_size": 320,  # times 64 numbers over 2 ranks: more than 4,096 a shard
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
DOCS = Documents([40, 7, 100])


def options_of(mesh: SequenceMesh, states: StateSettings, tied: bool = False, **changes: Any) -> EngineOptions:
    config = model_config("llama", None, SIZES | {"tie_word_embeddings": tied})
    given: dict[str, Any] = {
        "config": config,
        "load": partial(build_model, config, 0),
        "attach": lambda model: parallelize(model, mesh),
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "weight_decay": 0.1,
        "betas": (0.9, 0.95),
        "eps": 1e-8,
        "clip": 1.0,
        "checkpoint_layers": False,
        "micro_steps": 1,
        "zero_stage": 0,
        "states": states,
    }
    return EngineOptions(**given | changes)


def train(engine: Engine, mesh: SequenceMesh, first: int, last: int, rate: float = 3e-3) -> list[tuple[float, float]]:
    """(loss, norm) of some steps, each of other tokens."""
    found = []
    for step in range(first, last):
        layout = Layout(DOCS, mesh)
        ids = torch.randint(0, 64, (DOCS.total,), generator=torch.Generator().manual_seed(step))
        local = layout.shard(ids)[None]
        logits = engine.model(
            input_ids=local, position_ids=layout.position_ids()[None], use_cache=False, **attention_kwargs(layout)
        ).logits[0]
        loss = token_loss_sum(logits, local[0])
        engine.backward(backward_loss(loss, DOCS.total, mesh.sequence_size))
        found.append((share(loss, False)[0] / DOCS.total, engine.step(rate)))
    return found


def curve(ranks: int, states: StateSettings, steps: int = 6, **changes: Any) -> list[tuple[float, float]]:
    """A run with everything at its own pace: torchao's step is not compiled, which takes seconds for each shape."""
    torch.manual_seed(0)
    mesh = mesh_of(ranks, 1)
    with torch.compiler.set_stance("force_eager"):
        engine = build_engine(changes.pop("engine", "fsdp2"), mesh, options_of(mesh, states, **changes))
        return train(engine, mesh, 0, steps)


def flat(values: list[tuple[float, float]]) -> list[float]:
    return [one for pair in values for one in pair]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("tied", [False, True])
def test_where_states_are_changes_nothing(pool: Pools, ranks: int, tied: bool) -> None:
    expected = pool(ranks).run(curve, ranks, StateSettings(), tied=tied)[0]
    assert expected[0][0] > expected[-1][0]
    for settings in (
        StateSettings(states_on="host"),
        StateSettings(reshard=False),
        StateSettings(prefetch=0),
        StateSettings(prefetch=3, states_on="host"),
    ):
        found = pool(ranks).run(curve, ranks, settings, tied=tied)
        assert found[0] == found[-1]
        assert flat(found[0]) == pytest.approx(flat(expected), rel=1e-6)

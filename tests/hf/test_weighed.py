"""`shard_batch(layers=...)`: a model's layers are read, and its loss is the same on the layout that they ask for."""

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from ringattn import Documents, Mask, init_mesh
from ringattn.hf import parallelize, shard_batch
from ringattn.hf.shape import mixing_layers
from ringattn.hf.tiny import read_config, tiny_config, tiny_model
from ringattn.recurrent.price import RecurrenceShape
from ringattn.recurrent.weighing import weigh
from ringattn.training.model.models import empty_model
from tests.pool import Pools

LENGTHS = [150, 7, 90]
DELTA = RecurrenceShape(2, 4, 16, 12, True, False)


def losses(ring: int) -> tuple[float, bool]:
    """The loss of a tiny Qwen3.5, and whether its layout is the one of `weigh`."""
    model: Any = tiny_model(tiny_config(read_config("qwen3_5_text")))
    layers = mixing_layers(model)
    parallelize(model, mesh := init_mesh(ring=ring))
    ids = torch.arange(sum(LENGTHS))[None] % 97
    batch = shard_batch({"input_ids": ids, "labels": ids}, Documents(LENGTHS), mesh, layers=layers)
    weighed = weigh(Documents(LENGTHS), mesh, layers).layout
    return float(model(**batch).loss.detach()), batch["cu_seq_lens_q"].positions == weighed.positions


def test_the_loss_is_that_of_one_rank(pool: Pools) -> None:
    ((alone, _),) = pool(1).run(losses, 1)
    for loss, weighed in pool(2).run(losses, 2):
        assert loss == pytest.approx(alone, rel=1e-5)
        assert weighed


@pytest.mark.parametrize(
    ("family", "masks", "states"),
    [("qwen3_5_text", 1, 3), ("falcon_h1", 4, 4), ("nemotron_h", 1, 1), ("llama", 4, 0)],
)
def test_layers_of_models_are_counted(family: str, masks: int, states: int) -> None:
    found = mixing_layers(empty_model(tiny_config(read_config(family))))
    assert sum(count for _, count in found.masks) == masks
    assert sum(count for _, count in found.states) == states
    if family == "qwen3_5_text":
        assert found.states == ((DELTA, 3),)
        assert (found.heads, found.head_dim) == ((4, 2), 16)


@pytest.mark.parametrize("given", [{"policy": "zigzag"}, {"mask": Mask()}])
def test_what_layers_say_already_is_refused(given: dict[str, Any]) -> None:
    layers = mixing_layers(empty_model(tiny_config(read_config("qwen3_5_text"))))
    ids = torch.arange(8)[None]
    with pytest.raises(ValueError, match='expected policy="auto" and mask=None, got policy='):
        shard_batch({"input_ids": ids}, Documents([8]), init_mesh(), layers=layers, **given)

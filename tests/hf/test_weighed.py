"""`shard_batch(layers=...)`: a model's layers are read, and its loss is the same on the layout that they ask for."""

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from ringattn import Documents, Layout, Mask, init_mesh
from ringattn.hf import parallelize, shard_batch
from ringattn.hf.recurrent import KNOWN, kind_of
from ringattn.hf.shape import mixing_layers, weighed_layers
from ringattn.hf.tiny import read_config, tiny_config, tiny_model
from ringattn.recurrent.price import RecurrenceShape
from ringattn.recurrent.weighing import weigh
from ringattn.training.model.models import empty_model
from tests.hf.families import FAMILIES
from tests.hf.trainer_runs import trainer_of
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


HYBRIDS = ["qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid", "kimi_linear", "mamba2", "bamba"]
HYBRIDS += ["granitemoehybrid", "falcon_h1", "nemotron_h", "jamba", "minimax"]


@pytest.mark.parametrize("family", HYBRIDS)
def test_every_known_layer_is_weighed(family: str) -> None:
    model = empty_model(tiny_config(read_config(family), **FAMILIES[family]))
    layers = weighed_layers(model)
    assert layers is not None
    assert sum(count for _, count in layers.states) == sum(kind_of(part) != "" for part in model.modules())
    ((rule, _),) = layers.states
    # Channels of Jamba's are heads of one dim.
    assert rule.heads > 1
    assert (rule.value_dim == 1) == (family == "jamba")


def test_no_known_layer_is_left_out() -> None:
    models = [empty_model(tiny_config(read_config(family), **FAMILIES[family])) for family in HYBRIDS]
    kinds = {kind_of(part) for model in models for part in model.modules()} - {""}
    assert kinds == {kind for kind in KNOWN if not kind.endswith("ShortConv")}
    for family in ("lfm2", "llama", "gemma3_text"):
        assert weighed_layers(empty_model(tiny_config(read_config(family), **FAMILIES[family]))) is None


def layouts_of_trainer(folder: str, family: str, lengths: list[int], policy: str, free: bool) -> list[tuple[Any, ...]]:
    """Degrees and ranges of each of a Trainer's batches, and of both choices for its documents."""
    mesh = init_mesh(sequence=2) if free else init_mesh(ring=2)
    model: Any = tiny_model(tiny_config(read_config(family), **FAMILIES[family], max_position_embeddings=512))
    layers, seen = mixing_layers(model), []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["cu_seq_lens_q"]), with_kwargs=True)
    rows = [{"input_ids": torch.arange(size) % 97, "labels": torch.arange(size) % 97} for size in lengths]
    trainer = trainer_of(
        mesh, folder, {"per_device_train_batch_size": len(rows), "eval_strategy": "epoch",
                       "per_device_eval_batch_size": len(rows)}, model=model, policy=policy,
        train_dataset=rows, eval_dataset=rows, data_collator=packed,
    )  # fmt: skip
    trainer.train()
    assert len(seen) == 2  # training and evaluation
    choices = [(one, Layout(one.docs, mesh, policy), weigh(one.docs, mesh, layers).layout) for one in seen]
    return [tuple((one.mesh.ring, one.mesh.ulysses, one.positions) for one in three) for three in choices]


def packed(rows: list[Any]) -> dict[str, torch.Tensor]:
    """All rows in one, their positions beside them."""
    ids = torch.cat([row["input_ids"] for row in rows])[None]
    positions = torch.cat([torch.arange(len(row["input_ids"])) for row in rows])[None]
    return {"input_ids": ids, "labels": ids, "position_ids": positions}


@pytest.mark.parametrize(
    ("family", "lengths", "policy", "free", "weighed"),
    [
        ("qwen3_5_text", [64] * 5, "auto", False, True),
        ("qwen3_5_text", [400], "auto", True, True),
        ("qwen3_5_text", LENGTHS, "balanced", False, False),
        ("llama", LENGTHS, "auto", False, False),
    ],
)
def test_the_trainer_weighs_what_the_model_has(
    pool: Pools, tmp_path: Any, family: str, lengths: list[int], policy: str, free: bool, weighed: bool
) -> None:
    """Degrees too where they are open; the policy that is asked for, and models of attention alone, as they were."""
    ranks = pool(2).run(layouts_of_trainer, str(tmp_path), family, lengths, policy, free)
    assert ranks[0] == ranks[1]
    for found, attention, layers in ranks[0]:
        assert found == (layers if weighed else attention)
        assert found != (attention if weighed else layers)
        if free:
            assert attention[:2] != layers[:2]


def reason_on_one_rank() -> str:
    layers = mixing_layers(empty_model(tiny_config(read_config("qwen3_5_text"))))
    batch = shard_batch({"input_ids": torch.arange(8)[None]}, Documents([8]), init_mesh(), layers=layers)
    return batch["cu_seq_lens_q"].reason


def test_where_there_is_no_choice_nothing_is_priced(pool: Pools) -> None:
    """On one rank each batch took 2 ms for that, and thousands of documents on ranks of Ulysses 120."""
    assert pool(1).run(reason_on_one_rank) == [""]


def refusal_of(given: dict[str, Any]) -> str:
    layers = mixing_layers(empty_model(tiny_config(read_config("qwen3_5_text"))))
    try:
        shard_batch({"input_ids": torch.arange(8)[None]}, Documents([8]), init_mesh(), layers=layers, **given)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("given", [{"policy": "zigzag"}, {"mask": Mask()}])
def test_what_layers_say_already_is_refused(pool: Pools, given: dict[str, Any]) -> None:
    (said,) = pool(1).run(refusal_of, given)
    assert 'expected policy="auto" and mask=None, got policy=' in said

"""What a Trainer on a mesh refuses, by name, in __init__ and before anything is read or sent."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy, logsigmoid

from ringattn import Documents
from ringattn.hf import parallelize, shard_batch
from tests.hf.trainer_runs import Rows, arguments, collate, failure, mesh, small_model, trainer_of
from tests.pool import Pools

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate (pip install 'ringattn[hf]')")
OPTIONS: dict[str, dict[str, Any]] = {
    "label_smoothing_factor=0.1": {"label_smoothing_factor": 0.1},
    "use_liger_kernel=True": {"use_liger_kernel": True},
    "neftune_noise_alpha=5.0": {"neftune_noise_alpha": 5.0},
    "auto_find_batch_size=True": {"auto_find_batch_size": True},
    "enable_jit_checkpoint=True": {"enable_jit_checkpoint": True},
    "dataloader_in_order=False": {"dataloader_in_order": False},
    "label_names=['targets']": {"label_names": ["targets"]},
    "optim": {"optim": "lomo"},
    "accelerator_config.split_batches=True": {"accelerator_config": {"split_batches": True}},
    "accelerator_config.dispatch_batches=True": {"accelerator_config": {"dispatch_batches": True}},
}
ARGUMENTS: dict[str, Callable[..., Any]] = {
    "compute_metrics": lambda _: {},
    "compute_loss_func": lambda *_, **__: torch.zeros(()),
    "preprocess_logits_for_metrics": lambda logits, _: logits,
}


def made(folder: str, changes: dict[str, Any], keywords: tuple[str, ...] = ()) -> str:
    given = {name: ARGUMENTS[name] for name in keywords}
    return failure(lambda: trainer_of(mesh(1, 1), folder, changes, train_dataset=Rows(2), **given))


@pytest.mark.parametrize("name", OPTIONS)
def test_options(pool: Pools, name: str, tmp_path: Path) -> None:
    told = pool(1).run(made, str(tmp_path), OPTIONS[name])[0]
    assert told.startswith(f"NotImplementedError: {name}")
    assert " is not supported: " in told


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments(pool: Pools, name: str, tmp_path: Path) -> None:
    told = pool(1).run(made, str(tmp_path), {}, (name,))[0]
    assert told == f"NotImplementedError: {name} is not supported: a rank holds a part of the logits only"


def set_later(folder: str, kind: str) -> str:
    trainer = trainer_of(mesh(1, 1), folder, train_dataset=Rows(2), eval_dataset=Rows(2))
    if kind == "predict":
        return failure(lambda: trainer.predict(Rows(2)))
    if kind == "compute_metrics":
        trainer.compute_metrics = ARGUMENTS[kind]
        return failure(trainer.evaluate)
    trainer.args.neftune_noise_alpha = 5.0
    return failure(trainer.train)


@pytest.mark.parametrize("kind", ["predict", "compute_metrics", "neftune_noise_alpha"])
def test_what_is_asked_for_later(pool: Pools, kind: str, tmp_path: Path) -> None:
    told = pool(1).run(set_later, str(tmp_path), kind)[0]
    assert told.startswith(f"NotImplementedError: {kind}")


def without_labels(folder: str) -> str:
    def unlabelled(rows: list[Any]) -> dict[str, Any]:
        return {name: x for name, x in collate(rows).items() if name != "labels"}

    trainer = trainer_of(mesh(1, 1), folder, train_dataset=Rows(2), data_collator=unlabelled)
    return failure(trainer.train)


def test_batches_without_labels(pool: Pools, tmp_path: Path) -> None:
    told = pool(1).run(without_labels, str(tmp_path))[0]
    assert told == "ValueError: a batch needs labels for its loss, got the keys ['attention_mask', 'input_ids']"


def of_class(folder: str, kind: str) -> str:
    from ringattn.hf.trainer import OnMesh

    class Weighted(transformers.Trainer):
        def compute_loss(self, *_: Any, **__: Any) -> Any:
            return torch.zeros((), requires_grad=True)

    class Counting(transformers.Trainer):
        def prediction_step(self, *_: Any, **__: Any) -> Any:
            return None, None, None

    below = {"Weighted": Weighted, "Counting": Counting, "Seq2SeqTrainer": transformers.Seq2SeqTrainer}.get(
        kind, object
    )

    class Mine(OnMesh, below):  # type: ignore[misc, valid-type]
        pass

    return failure(lambda: Mine(small_model(), arguments(folder), mesh=mesh(1, 1)))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("Weighted", "Weighted is not supported: OnMesh would replace its own compute_loss"),
        ("Counting", "Counting is not supported: OnMesh would replace its own prediction_step"),
        ("Seq2SeqTrainer", "Seq2SeqTrainer is not supported: OnMesh would replace its own prediction_step"),
        ("none", "Mine must derive from OnMesh and then from a transformers.Trainer"),
    ],
)
def test_classes_with_a_loss_of_their_own(pool: Pools, kind: str, words: str, tmp_path: Path) -> None:
    assert pool(1).run(of_class, str(tmp_path), kind)[0].startswith(f"NotImplementedError: {words}")


def above(folder: str) -> tuple[str, float, float]:
    """A class of the user above OnMesh may have its own: it gets the whole batch, and the loss over all ranks."""
    from ringattn.hf.trainer import SequenceTrainer

    class Doubled(SequenceTrainer):
        def compute_loss(self, *args: Any, **keywords: Any) -> Any:
            return 2 * super().compute_loss(*args, **keywords)

    losses = []
    for kind in (SequenceTrainer, Doubled):
        trainer = kind(
            small_model(), arguments(folder, max_steps=1), mesh=mesh(1, 1), train_dataset=Rows(2), data_collator=collate
        )
        told = failure(trainer.train)
        losses.append(trainer.state.log_history[0]["loss"])
    return told, losses[0], losses[1]


def test_a_loss_of_ones_own(pool: Pools, tmp_path: Path) -> None:
    told, loss, doubled = pool(1).run(above, str(tmp_path))[0]
    assert told == "none"
    assert doubled == pytest.approx(2 * loss, rel=1e-6)


def of_trl(folder: str, module: str, name: str) -> str:
    from ringattn.hf.trainer import OnMesh

    try:
        base = getattr(importlib.import_module(module), name)
    except ImportError as error:
        return f"not installed: {error}"

    class Mine(OnMesh, base):  # type: ignore[misc, valid-type]
        pass

    return failure(lambda: Mine(model=small_model(), args=arguments(folder), mesh=mesh(1, 1)))


PREFERENCE = "adds up the log-probabilities of each sequence"
GENERATION = "generates text between its steps"
TEACHER = "compares logits with those of a teacher"
WORDS = {
    "DPOTrainer": PREFERENCE,
    "KTOTrainer": PREFERENCE,
    "GRPOTrainer": GENERATION,
    "RLOOTrainer": GENERATION,
    "RewardTrainer": "takes a score from one token of each sequence",
    "DistillationTrainer": TEACHER,
    "cpo.CPOTrainer": PREFERENCE,
    "orpo.ORPOTrainer": PREFERENCE,
    "tpo.TPOTrainer": PREFERENCE,
    "online_dpo.OnlineDPOTrainer": GENERATION,
    "gkd.GKDTrainer": TEACHER,
    "gold.GOLDTrainer": TEACHER,
    "sdpo.SDPOTrainer": GENERATION,
    "sdft.SDFTTrainer": TEACHER,
}


def test_trainers_of_other_losses(pool: Pools, tmp_path: Path) -> None:
    """Every one that TRL has: what it is, and what to do instead."""
    trl = pytest.importorskip("trl", reason="TRL is not installed (pip install 'ringattn[dev]')")
    have = {name for name in trl.__all__ if name.endswith("Trainer")} - {"SFTTrainer"}
    assert have <= set(WORDS)
    names = [name for name in WORDS if name in have or "." in name]
    places = [("trl.experimental." * ("." in name) + ("trl." + name if "." not in name else name)) for name in names]
    cases = [(str(tmp_path), *place.rsplit(".", 1)) for place in places]
    for name, (told,) in zip(names, pool(1).run_many(of_trl, cases), strict=True):
        if "." in name and told.startswith("not installed"):
            continue
        assert told.startswith(f"NotImplementedError: {name.split('.')[-1]} is not supported: "), told
        assert WORDS[name] in told


def preferred(ring: int) -> tuple[float, dict[str, torch.Tensor]]:
    """What the refusal of a preference loss says to do instead: the loss of pairs of documents, and its gradients."""
    where, model = mesh(1, ring), small_model()
    parallelize(model, where)
    docs = Documents([9, 14, 21, 8])
    ids = torch.arange(docs.total)[None] * 7 % 94 + 3
    batch = shard_batch({"input_ids": ids, "labels": ids}, docs, where, "zigzag")
    layout = batch["cu_seq_lens_q"]
    targets = batch["shift_labels"][0]
    logits = model(**{name: x for name, x in batch.items() if "labels" not in name}).logits[0]
    local = -cross_entropy(logits, targets, ignore_index=-100, reduction="none")
    sums = torch.stack([part.sum() for part in layout.unshard(local).split(list(docs.lengths))])
    loss = -logsigmoid(0.1 * (sums[0::2] - sums[1::2])).mean()
    (loss * dist.get_world_size()).backward()
    for p in model.parameters():
        dist.all_reduce(p.grad)
        p.grad /= dist.get_world_size()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def test_a_preference_loss_of_ones_own(pool: Pools) -> None:
    loss, gradients = pool(1).run(preferred, 1)[0]
    for found, mine in pool(2).run(preferred, 2):
        assert found == pytest.approx(loss, rel=1e-5)
        for name, expected in gradients.items():
            assert (mine[name] - expected).norm() <= 1e-5 * expected.norm(), name


def not_a_mesh(folder: str) -> str:
    where: Any = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    return failure(lambda: trainer_of(where, folder))


def test_what_is_no_mesh(pool: Pools, tmp_path: Path) -> None:
    told = pool(1).run(not_a_mesh, str(tmp_path))[0]
    assert told == "ValueError: mesh must come from init_mesh, got DeviceMesh"


def of_policy(folder: str) -> str:
    return failure(lambda: trainer_of(mesh(1, 1), folder, policy="spiral"))


def test_a_policy_that_there_is_not(pool: Pools, tmp_path: Path) -> None:
    told = pool(1).run(of_policy, str(tmp_path))[0]
    assert told == "ValueError: policy must be one of contiguous, zigzag, balanced, auto, got 'spiral'"

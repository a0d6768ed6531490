"""The Trainer's data: each row once over the replicas, equal batches on the ranks of a sequence."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler

from tests.hf.trainer_runs import (
    Rows,
    Stream,
    arguments,
    collate,
    failure,
    history,
    make_rows,
    mesh,
    same_history,
    small_model,
    trainer_of,
)
from tests.pool import Pools

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="transformers.Trainer needs accelerate (pip install 'ringattn[hf]')")


def trained(folder: str, data: int, ring: int, rows: int, stream: bool, changes: dict[str, Any]) -> dict[str, Any]:
    set_ = (Stream if stream else Rows)(rows)
    trainer = trainer_of(mesh(data, ring), folder, changes, train_dataset=set_)
    trainer.train()
    return history(trainer)


UNEVEN: dict[str, tuple[int, bool, dict[str, Any]]] = {
    "5 rows": (5, False, {"num_train_epochs": 2}),
    "accumulation": (5, False, {"gradient_accumulation_steps": 2, "num_train_epochs": 2}),
    "7 rows, accumulation": (7, False, {"gradient_accumulation_steps": 3, "num_train_epochs": 2}),
    "1 row": (1, False, {"num_train_epochs": 2}),
    "drop last": (7, False, {"dataloader_drop_last": True, "gradient_accumulation_steps": 2}),
    "no length": (5, True, {"max_steps": 7}),
    "no length, accumulation": (5, True, {"max_steps": 4, "gradient_accumulation_steps": 2}),
    "balanced": (11, False, {"train_sampling_strategy": "batch_rebalance", "gradient_accumulation_steps": 2}),
}


@pytest.mark.parametrize("name", UNEVEN)
def test_replicas_with_different_numbers_of_batches(pool: Pools, name: str, tmp_path: Path) -> None:
    """They do what one process does with the rows of both, in as many steps."""
    rows, stream, changes = UNEVEN[name]
    expected = pool(1).run(trained, str(tmp_path), 1, 1, rows, stream, changes | {"per_device_train_batch_size": 2})[0]
    assert expected["steps"] >= 1
    for found in pool(2).run(trained, str(tmp_path), 2, 1, rows, stream, changes):
        same_history(found, expected)


@pytest.mark.slow
def test_four_ranks_with_accumulation_epochs_and_resume(pool: Pools, tmp_path: Path) -> None:
    """Two replicas of two ranks, an epoch that ends in the middle of a step, and a run that goes on after step 3."""
    changes = {"gradient_accumulation_steps": 2, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3}
    one = str(tmp_path / "one")
    expected = pool(1).run(trained, one, 1, 1, 9, False, changes | {"per_device_train_batch_size": 2})[0]
    assert expected["steps"] == 6
    four = str(tmp_path / "four")
    for found in pool(4).run(trained, four, 2, 2, 9, False, changes):
        same_history(found, expected)
    for found in pool(4).run(resumed, four, 2, 2, 9, changes):
        same_history(found, expected)


def resumed(folder: str, data: int, ring: int, rows: int, changes: dict[str, Any]) -> dict[str, Any]:
    trainer = trainer_of(mesh(data, ring), folder, changes, train_dataset=Rows(rows))
    trainer.train(resume_from_checkpoint=str(Path(folder, "checkpoint-3")))
    return history(trainer)


def rows_read(folder: str, kind: str, count: int) -> list[tuple[int, ...]]:
    """What this rank's replica trained on in one epoch of two ranks."""
    from ringattn.hf.trainer import SequenceTrainer

    where, read = mesh(2, 1), []
    rows: Any = Stream(count) if kind == "stream" else Rows(count)
    changes: dict[str, Any] = {"max_steps": (count + 1) // 2} if kind.startswith("stream") else {}
    if kind in ("random", "sequential", "group_by_length", "batch_rebalance"):
        changes |= {"train_sampling_strategy": kind, "gradient_accumulation_steps": 2}
    if kind.startswith("streamed"):
        from datasets import Dataset
        from datasets.distributed import split_dataset_by_node

        rows = Dataset.from_list(make_rows(count)).to_iterable_dataset(num_shards=2)
        if kind == "streamed by node":
            rows = split_dataset_by_node(rows, rank=where.data_rank, world_size=where.data)
        if kind == "streamed in workers":  # each of which reads a part, and has a last round of its own
            changes |= {"dataloader_num_workers": 2, "dataloader_multiprocessing_context": "fork"}

    class Sampled(SequenceTrainer):
        def _get_train_sampler(self, *args: Any) -> Any:
            if kind != "distributed":
                return super()._get_train_sampler(*args)
            return DistributedSampler(rows, where.data, where.data_rank, seed=3)

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **keywords: Any) -> Any:
            trained = (inputs["labels"] != -100).any(dim=1)
            for ids, mask in zip(inputs["input_ids"][trained], inputs["attention_mask"][trained], strict=True):
                read.append(tuple(ids[mask.bool()].tolist()))
            return super().compute_loss(model, inputs, *args, **keywords)

    Sampled(small_model(), arguments(folder, **changes), mesh=where, train_dataset=rows, data_collator=collate).train()
    return read


KINDS = ("random", "sequential", "group_by_length", "batch_rebalance", "distributed", "stream", "streamed",
         "streamed by node", "streamed in workers")  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_once(pool: Pools, kind: str, tmp_path: Path) -> None:
    if kind.startswith("streamed"):
        pytest.importorskip("datasets")
    for count in (16,) if kind == "distributed" else (13,) if "workers" in kind else (16, 13):
        read = pool(2).run(rows_read, str(tmp_path), kind, count)
        assert sorted(read[0] + read[1]) == sorted(tuple(row["input_ids"]) for row in make_rows(count))
        assert abs(len(read[0]) - len(read[1])) <= (2 if kind == "batch_rebalance" else 1)


def sharded_by_rank(folder: str) -> str:
    """A sampler that deals rows to all ranks, though the ranks share their sequences."""
    from ringattn.hf.trainer import SequenceTrainer

    class Sampled(SequenceTrainer):
        def _get_train_sampler(self, *args: Any) -> Any:
            return DistributedSampler(self.train_dataset, dist.get_world_size(), dist.get_rank())

    trainer = Sampled(small_model(), arguments(folder), mesh=mesh(1, 2), train_dataset=Rows(4), data_collator=collate)
    return failure(trainer.train)


def test_samplers_that_deal_to_ranks_are_refused(pool: Pools, tmp_path: Path) -> None:
    for rank, told in enumerate(pool(2).run(sharded_by_rank, str(tmp_path))):
        assert told.startswith(f"ValueError: DistributedSampler deals rows to 2 ranks of which this is {rank}")
        assert "expected the replicas: 1 of which this is 0" in told


def with_own_loader(folder: str, data: int, ring: int, kind: str) -> dict[str, Any] | str:
    """A Trainer that makes its data loader itself."""
    from ringattn.hf.trainer import OnMesh

    class Loading(transformers.Trainer):
        def get_train_dataloader(self) -> Any:
            if kind == "list":
                return [collate([row]) for row in self.train_dataset]
            loader = DataLoader(self.train_dataset, 2 // data, collate_fn=collate)
            return self.accelerator.prepare_data_loader(loader) if kind == "prepared" else loader

    class Mine(OnMesh, Loading):
        pass

    trainer = Mine(small_model(), arguments(folder), mesh=mesh(data, ring), policy="contiguous", train_dataset=Rows(5))
    told = failure(trainer.train)
    return history(trainer) if told == "none" else told


@pytest.mark.parametrize("kind", ["plain", "prepared"])
def test_loaders_of_ones_own(pool: Pools, kind: str, tmp_path: Path) -> None:
    expected = pool(1).run(with_own_loader, str(tmp_path), 1, 1, kind)[0]
    assert expected["steps"] == 3
    for data, ring in ((1, 2), (2, 1)):
        for found in pool(2).run(with_own_loader, str(tmp_path), data, ring, kind):
            same_history(found, expected)


def test_what_is_no_loader(pool: Pools, tmp_path: Path) -> None:
    told = pool(1).run(with_own_loader, str(tmp_path), 1, 1, "list")[0]
    assert told == "ValueError: the data loader must be a torch.utils.data.DataLoader, got list"


def seeded_by_rank(folder: str, name: str) -> str:
    trainer = trainer_of(mesh(2, 1), folder, {name: 1 + dist.get_rank()}, train_dataset=Rows(6))
    return failure(trainer.train)


@pytest.mark.parametrize("name", ["seed", "data_seed"])
def test_seeds_that_differ(pool: Pools, name: str, tmp_path: Path) -> None:
    told = "ValueError: data_seed (or seed) must be the same on every rank, got [1, 2]"
    assert pool(2).run(seeded_by_rank, str(tmp_path), name) == [told, told]


def given_unequal_sets(folder: str) -> str:
    trainer = trainer_of(mesh(2, 1), folder, train_dataset=Rows(6 + 2 * dist.get_rank()))
    return failure(trainer.train)


def test_data_sets_that_differ(pool: Pools, tmp_path: Path) -> None:
    for told in pool(2).run(given_unequal_sets, str(tmp_path)):
        assert told.startswith("ValueError: ranks must be given the same data set")
        assert told.endswith("got loaders of [3, 4] batches")


class Drawing:
    """A collator that replaces one token of every row by draws of each generator that collators use."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = collate(rows)
        batch["input_ids"][:, 1] = torch.randint(3, 97, (len(rows),))
        batch["input_ids"][:, 2] = random.randrange(3, 97)
        batch["input_ids"][:, 3] = int(np.random.randint(3, 97))  # noqa: NPY002
        return batch


def drawn(folder: str, data: int, ring: int, changes: dict[str, Any], checkpoint: str | None) -> list[torch.Tensor]:
    """The batches of this rank, of a model with dropout."""
    from ringattn.hf.trainer import SequenceTrainer

    seen = []

    class Seeing(SequenceTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **keywords: Any) -> Any:
            seen.append(inputs["input_ids"][:, 1:4].clone())
            return super().compute_loss(model, inputs, *args, **keywords)

    model = small_model(family="gpt2", resid_pdrop=0.1)
    torch.manual_seed(dist.get_rank())  # ranks that differ in what they drew before
    trainer = Seeing(
        model, arguments(folder, **changes), mesh=mesh(data, ring), policy="contiguous", train_dataset=Rows(8),
        data_collator=Drawing(),
    )  # fmt: skip
    torch.manual_seed(100 + dist.get_rank())
    trainer.train(resume_from_checkpoint=checkpoint)
    return seen


def test_draws_of_the_collator(pool: Pools, tmp_path: Path) -> None:
    """The same on the ranks of a sequence, other ones in every step and epoch, the same again in a run that goes on."""
    changes = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3}
    first, second = pool(2).run(drawn, str(tmp_path), 1, 2, changes, None)
    assert len(first) == 16
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert len({tuple(x.flatten().tolist()) for x in first}) == 16
    again, _ = pool(2).run(drawn, str(tmp_path), 1, 2, changes, str(tmp_path / "checkpoint-3"))
    assert all(torch.equal(a, b) for a, b in zip(again, first[3:], strict=True))


def test_draws_of_replicas_differ(pool: Pools, tmp_path: Path) -> None:
    first, second = pool(2).run(drawn, str(tmp_path), 2, 1, {}, None)
    assert len(first) == len(second) == 4
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("persistent", [False, True])
def test_draws_in_workers(pool: Pools, persistent: bool, tmp_path: Path) -> None:
    changes = {
        "num_train_epochs": 2,
        "dataloader_num_workers": 2,
        "dataloader_persistent_workers": persistent,
        "dataloader_multiprocessing_context": "fork",
    }
    first, second = pool(2).run(drawn, str(tmp_path), 1, 2, changes, None)
    assert len(first) == 16
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert len({tuple(x.flatten().tolist()) for x in first}) == 16


class Differing:
    """Rank 1 gets something else in its third batch."""

    def __init__(self, what: str) -> None:
        self.what, self.calls = what, 0

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = collate(rows) | {"weights": torch.ones(len(rows), 1)}
        self.calls += 1
        if dist.get_rank() == 1 and self.calls == 3:
            if self.what == "error":
                raise KeyError("no such row")
            batch[self.what][0, -1] += 1
        return batch


def differing(folder: str, what: str, evaluation: bool) -> str:
    trainer = trainer_of(
        mesh(1, 2), folder, {"remove_unused_columns": False}, train_dataset=Rows(5), eval_dataset=Rows(5),
        data_collator=Differing(what),
    )  # fmt: skip
    trainer.compute_loss = without_weights(trainer.compute_loss)
    return failure(trainer.evaluate if evaluation else trainer.train)


def without_weights(compute_loss: Any) -> Any:
    """A loss that does not use one of the tensors."""

    def compute(model: Any, inputs: Any, *args: Any, **keywords: Any) -> Any:
        return compute_loss(model, {k: v for k, v in inputs.items() if k != "weights"}, *args, **keywords)

    return compute


@pytest.mark.parametrize("evaluation", [False, True])
@pytest.mark.parametrize("what", ["input_ids", "labels", "weights"])
def test_batches_that_differ(pool: Pools, what: str, evaluation: bool, tmp_path: Path) -> None:
    for told in pool(2).run(differing, str(tmp_path), what, evaluation):
        assert told.startswith("ValueError: the ranks that share a sequence got different batches: ")
        assert f": {what} of batch 0 differ on ranks 0 to 1. The data set" in told


def test_a_batch_that_one_rank_cannot_read(pool: Pools, tmp_path: Path) -> None:
    """All raise: none waits for the rank that failed."""
    first, second = pool(2).run(differing, str(tmp_path), "error", False)
    assert first == "RuntimeError: rank 1 could not read its batch: KeyError: 'no such row'"
    assert second == "KeyError: 'no such row'"


def test_options_of_the_loader(pool: Pools, tmp_path: Path) -> None:
    for given in ({"use_seedable_sampler": False}, {"gradient_accumulation_kwargs": {"sync_each_batch": True}}):
        changes = {"accelerator_config": given, "gradient_accumulation_steps": 2}
        one = changes | {"per_device_train_batch_size": 2}
        expected = pool(1).run(trained, str(tmp_path), 1, 1, 7, False, one)[0]
        for data, ring in ((1, 2), (2, 1)):
            for found in pool(2).run(trained, str(tmp_path), data, ring, 7, False, one if data == 1 else changes):
                same_history(found, expected)


def with_columns(folder: str, ring: int) -> dict[str, Any]:
    from datasets import Dataset

    rows = [row | {"seq_idx": [0] * 5 + [1] * (len(row["input_ids"]) - 5), "from": "a book"} for row in make_rows(6)]
    trainer = trainer_of(mesh(1, ring), folder, train_dataset=Dataset.from_list(rows), data_collator=segmented)
    trainer.train()
    return history(trainer)


def segmented(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    assert set(rows[0]) == {"input_ids", "labels", "seq_idx"}
    return {name: torch.tensor([rows[0][name]]) for name in rows[0]}


def test_columns_that_are_kept(pool: Pools, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    expected = pool(1).run(with_columns, str(tmp_path), 1)[0]
    for found in pool(2).run(with_columns, str(tmp_path), 2):
        same_history(found, expected)

"""`transformers.Trainer` on a sequence mesh: batches go to replicas, every rank of a replica takes its part of them.

Only three things differ from the stock Trainer: who gets which batch, how targets are counted, and evaluation, which
is the exact mean over all targets of the data set. Needs accelerate, as the stock Trainer does.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from ringattn.hf.batch import count_targets, shard_batch
from ringattn.hf.loss import IGNORE_INDEX
from ringattn.hf.metadata import METADATA
from ringattn.hf.model import parallelize, unwrapped
from ringattn.parallel.mesh.mesh import SequenceMesh

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object
IDLE = {"input_ids": torch.zeros(1, 1, dtype=torch.int64), "labels": torch.full((1, 1), IGNORE_INDEX)}


class OnMesh(_Base):
    """For a Trainer class: its model attends over the sequence ranks of `mesh`. A step is what one process computes.

    `per_device_train_batch_size` counts rows for each replica (the ranks that share a sequence), and batches may hold
    whatever `shard_batch` reads: padded rows, packed rows with segment ids, what DataCollatorWithFlattening makes.
    A model that is not parallelized yet will be. The loss of a step is the mean over the targets of all micro-batches
    of all replicas; the loss of an evaluation the mean over the targets of the whole data set.

    Raises NotImplementedError for what would be wrong silently: compute_metrics and predictions (a rank holds a part
    of the logits), label smoothing, a compute_loss_func.

        class Mine(OnMesh, SFTTrainer): ...   # and so for other Trainers; the loss is then the model's own
    """

    def __init__(self, *args: Any, mesh: SequenceMesh, policy: str = "auto", **kwargs: Any) -> None:
        self.sequence_mesh, self.policy = mesh, policy
        self._compared = False
        super().__init__(*args, **kwargs)
        for name in ("compute_metrics", "compute_loss_func"):
            if getattr(self, name) is not None:
                raise NotImplementedError(f"{name} is not supported: a rank holds a part of the logits only")
        if self.args.label_smoothing_factor:
            raise NotImplementedError("label_smoothing_factor is not supported: the loss is the model's own")
        inner = unwrapped(self.model)
        if getattr(inner, "_ringattn", None) is None:
            parallelize(inner, mesh)
        # Rows of a batch stay with their replica: the loss counts targets itself, over all ranks.
        self.model_accepts_loss_kwargs = True

    def _set_signature_columns_if_needed(self) -> None:
        """Columns that say where documents are must not be dropped for being no keywords of the model."""
        super()._set_signature_columns_if_needed()
        self._signature_columns: Any = [*dict.fromkeys([*(self._signature_columns or []), "position_ids", *METADATA])]

    def get_train_dataloader(self) -> DataLoader:
        return self._by_replica(super().get_train_dataloader)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        return self._by_replica(super().get_eval_dataloader, eval_dataset)

    def _by_replica(self, make: Any, *args: Any) -> DataLoader:
        """A data loader of the stock Trainer, dealt to the replicas rather than to all ranks."""
        from accelerate.data_loader import prepare_data_loader

        plain: list[DataLoader] = []
        prepare = self.accelerator.prepare

        def keep(loader: Any, *rest: Any) -> Any:
            if rest or not isinstance(loader, DataLoader):
                return prepare(loader, *rest)
            plain.append(loader)
            return loader

        self.accelerator.prepare = keep
        try:
            loader = make(*args)
        finally:
            self.accelerator.prepare = prepare
        mesh = self.sequence_mesh
        return prepare_data_loader(
            plain[-1] if plain else loader,
            device=self.accelerator.device,
            num_processes=mesh.data,
            process_index=mesh.data_rank,
            put_on_device=False,
            rng_types=["generator"],
            use_seedable_sampler=True,
            data_seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
            even_batches=False,
        )

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        """Targets of this replica in all micro-batches of a step; the loss adds up the replicas."""
        counts = [count_targets(batch) for batch in batch_samples if batch.get("labels") is not None]
        return torch.stack([count.to(device) for count in counts]).sum() if counts else torch.zeros((), device=device)

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The share of a micro-batch in the mean over the targets of the step; its gradient is to be averaged."""
        batch = dict(inputs)
        if not self._compared:
            same_batch(batch, self.sequence_mesh)
            self._compared = True
        if num_items_in_batch is not None:
            batch["num_items_in_batch"] = num_items_in_batch
        outputs = model(**shard_batch(batch, None, self.sequence_mesh, self.policy))
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    @torch.no_grad()
    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The mean loss over all targets of a data set. Collective; every rank returns the same."""
        if description == "Prediction":
            raise NotImplementedError("predict is not supported: a rank holds a part of the logits only")
        model = self.model_wrapped if self.model_wrapped is not None else self.model
        was_training = model.training
        model.eval()
        totals = torch.zeros(3, dtype=torch.float64, device=self.sequence_mesh.device)  # loss sum, targets, rows
        iterator = iter(dataloader)
        while self._any(batch := next(iterator, None)):
            # Losses are added over all replicas: one that ran out of batches takes part with no target.
            batch = self._prepare_inputs(IDLE if batch is None else batch)
            targets, rows = count_targets(batch), len(batch["labels"])
            counts = torch.stack([targets, targets.new_tensor(rows if targets else 0)]).to(totals.device)
            if self.sequence_mesh.data > 1:
                dist.all_reduce(counts, group=self.sequence_mesh.device_mesh.get_group("data"))
            totals[0] += self.compute_loss(model, batch).double() * counts[0]
            totals[1:] += counts
        model.train(was_training)
        mean = float(totals[0] / totals[1]) if totals[1] else float("nan")
        return EvalLoopOutput(None, None, {f"{metric_key_prefix}_loss": mean}, int(totals[2]))  # type: ignore[arg-type]

    def _any(self, batch: Any) -> bool:
        """Whether any replica still has a batch."""
        if self.sequence_mesh.data == 1:
            return batch is not None
        left = torch.tensor(batch is not None, dtype=torch.int64, device=self.sequence_mesh.device)
        dist.all_reduce(left, dist.ReduceOp.MAX)
        return bool(left)


def same_batch(batch: Mapping[str, Any], mesh: SequenceMesh) -> None:
    """Raises ValueError on every rank if the ranks of a replica hold different batches. Collective."""
    ids = batch["input_ids"].to(torch.int64)
    places = torch.arange(1, ids.numel() + 1, device=ids.device)
    mine = torch.stack([torch.tensor(ids.numel(), device=ids.device), (ids.flatten() * places).sum()]).to(mesh.device)
    bounds = torch.cat([mine, -mine])
    dist.all_reduce(bounds, dist.ReduceOp.MAX, group=mesh.sequence_group)
    if not torch.equal(bounds[:2], -bounds[2:]):
        raise ValueError(
            f"the ranks that share a sequence got different batches ({int(-bounds[2])} to {int(bounds[0])} tokens): "
            "the data set, its order and the collator must be the same on every rank, and so must their seeds"
        )


class SequenceTrainer(OnMesh, Trainer):
    """`transformers.Trainer` on a sequence mesh, see `OnMesh`."""

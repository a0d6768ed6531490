"""`OnMesh`: what a Trainer class does differently on a sequence mesh."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput, has_length

from ringattn.first_failure import FirstFailure
from ringattn.hf.batch import count_targets, shard_batch
from ringattn.hf.metadata import METADATA
from ringattn.hf.model import parallelize, unwrapped
from ringattn.hf.options import check_arguments, check_trainer
from ringattn.hf.shape import weighed_layers
from ringattn.hf.support import check_model, text_model
from ringattn.hf.token_ids import Vocabulary, check_batch
from ringattn.hf.trainer.agreement import Idle, agree_on_control, check_any_target, check_averaged, in_step
from ringattn.hf.trainer.dealing import ReplicaRows, deal, with_loaders_kept
from ringattn.hf.trainer.evaluation import Tally
from ringattn.hf.trainer.failures import told_to_torchrun
from ringattn.hf.trainer.lockstep import Lockstep
from ringattn.hf.trainer.refusals import check_class, check_counts, check_place, check_unused
from ringattn.hf.trainer.tokens import count_tokens
from ringattn.memory.settings import MemorySettings
from ringattn.parallel.mesh.mesh import SequenceMesh
from ringattn.parallel.placement.placement import POLICIES

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class OnMesh(_Base):
    """For a Trainer class: its model attends over the sequence ranks of `mesh`. A step is what one process computes.

    `per_device_train_batch_size` counts rows for each replica (the ranks that share a sequence), and batches may hold
    whatever `shard_batch` reads: padded rows, packed rows with segment ids, what DataCollatorWithFlattening makes, and
    images.
    Every rank is given the whole data set; rows are dealt to replicas here, each once. What data sets and collators
    draw is the same on all ranks of a sequence, and again when a run goes on. A model that is not parallelized yet
    will be, whenever it is set, with `memory` as of `parallelize`. The loss of a step is the mean over the targets of
    all micro-batches of all replicas; the loss of an evaluation the mean over the targets of the whole data set.

    `docs/trainer-options.md` lists every option: tested, inert, or refused. Raises NotImplementedError, before anything
    is read or sent, for what would be wrong silently: compute_metrics and predictions (a rank holds a part of the
    logits), losses that are not the model's own, Trainer classes whose loss pools over sequences. Raises ValueError on
    every rank when the ranks of a sequence get different batches.

        class Mine(OnMesh, SFTTrainer): ...   # and so for other Trainers of language models
    """

    def __init__(
        self,
        *args: Any,
        mesh: SequenceMesh,
        policy: str = "auto",
        memory: MemorySettings | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(mesh, SequenceMesh):
            raise ValueError(f"mesh must come from init_mesh, got {type(mesh).__name__}")
        if policy not in POLICIES:
            raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}")
        check_class(type(self), OnMesh)
        given = inspect.signature(super().__init__).bind_partial(*args, **kwargs).arguments
        if given.get("args") is not None:
            check_arguments(given["args"])
        check_trainer(given)
        self.sequence_mesh, self.policy, self.memory = mesh, policy, memory
        self._failures, self._tally = FirstFailure(), Tally(mesh)
        self._spent: Any = None  # an iterator of which no replica has a batch left
        self._any_target = False  # the first step had one
        self._averaged = False  # gradients were seen to be equal on all ranks
        super().__init__(*args, **kwargs)
        check_place(self.args, self.accelerator, mesh)
        # Rows of a batch stay with their replica: the loss counts targets itself, over all ranks.
        self.model_accepts_loss_kwargs = True
        handler = self.accelerator.ddp_handler  # None in older versions of transformers, which make it later
        if self._tower() is not None and self.args.ddp_find_unused_parameters is None and handler is not None:
            # Also where layers are checkpointed: a micro-batch without images leaves the tower's parameters unused.
            handler.find_unused_parameters = True
        self._check()

    def _check(self) -> None:
        """Raises for options, arguments and a model that became unfit since they were checked last."""
        check_arguments(self.args)
        check_counts(self.args, Trainer)
        check_trainer(vars(self))
        inner = unwrapped(self.model)
        check_model(inner)
        # TRL keeps the coefficient of its option to itself, as it makes the loss; here the model makes it.
        own = vars(self)
        if own.get("aux_loss_enabled") and hasattr(inner, "router_aux_loss_coef"):
            inner.router_aux_loss_coef = own["router_aux_loss_coef"]

    @property
    def model(self) -> Any:
        return self.__dict__.get("_model")

    @model.setter
    def model(self, model: Any) -> None:
        """Whoever sets the model: __init__, model_init before each training, a wrapper around it, the user."""
        if model is not None:
            self._put_on_mesh(model)
            self.model_wrapped = model
        self.__dict__["_model"] = model

    def _put_on_mesh(self, model: Any) -> None:
        handle = getattr(unwrapped(model), "_ringattn", None)
        if handle is None:
            options: dict[str, Any] = {"deterministic": True} if self.args.full_determinism else {}
            parallelize(model, self.sequence_mesh, self.memory, **options)
        elif handle.mesh != self.sequence_mesh:
            raise ValueError(f"model was parallelized on {handle.mesh}, the Trainer's mesh is {self.sequence_mesh}")
        self._layers = weighed_layers(unwrapped(model)) if self.policy == "auto" else None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with told_to_torchrun(), self._failures:
            self._check()
            return super().train(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        with told_to_torchrun(), self._failures:
            self._check()
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("predict is not supported: a rank holds a part of the logits only")

    # Data

    @property
    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def get_train_dataloader(self) -> DataLoader:
        return self._dealt(super().get_train_dataloader)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        return self._dealt(super().get_eval_dataloader, eval_dataset)

    def _dealt(self, make: Any, *args: Any) -> DataLoader:
        """A data loader of the stock Trainer, dealt to the replicas rather than to all ranks."""
        loader = with_loaders_kept(self.accelerator, make, *args)
        seedable = getattr(self.args.accelerator_config, "use_seedable_sampler", True)
        return deal(loader, self.sequence_mesh, self._data_seed, seedable)

    def _set_signature_columns_if_needed(self) -> None:
        """Columns that say where documents are must not be dropped for being no keywords of the model."""
        super()._set_signature_columns_if_needed()
        self._signature_columns: Any = [*dict.fromkeys([*(self._signature_columns or []), "position_ids", *METADATA])]

    def set_initial_training_values(self, args: Any, dataloader: Any, *more: Any) -> Any:
        return super().set_initial_training_values(args, self._lockstep(dataloader), *more)

    def _lockstep(self, loader: Any) -> Any:
        return Lockstep(loader, self.sequence_mesh, self._data_seed, self._check_of_batches())

    def _check_of_batches(self) -> Callable[[Mapping[str, Any]], None]:
        """What raises ValueError for ids that the model has no row for, while a batch is on the host.

        It does not hold the Trainer, which would live on in a circle with its loaders, and its DeepSpeed configuration
        with it, by which transformers makes the next model in parts.
        """
        inner = unwrapped(self.model)
        return partial(check_batch, vocabulary=Vocabulary.of(inner, inner._ringattn.needs))

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The micro-batches of a step, as many on every replica. Collective over all ranks, once a step."""
        if epoch_iterator is self._spent:
            return [], None
        # A step that a length promises must come to its end, where the stock Trainer applies its gradient.
        sized = has_length(self.callback_handler.train_dataloader)
        batches = in_step(epoch_iterator, num_batches, self.sequence_mesh, self._check_of_batches(), fill=sized)
        if not batches:
            self._spent = epoch_iterator
        targets = self._get_num_items_in_batch(list(batches), device)
        if batches and not self._any_target:
            check_any_target(batches, targets, self.sequence_mesh)
            self._any_target = True
        return list(batches), targets

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        """Targets of this replica in all micro-batches of a step; the loss adds up the replicas."""
        counts = [count_targets(batch) for batch in batch_samples if batch.get("labels") is not None]
        return torch.stack([count.to(device) for count in counts]).sum() if counts else torch.zeros((), device=device)

    # Loss

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The share of a micro-batch in the mean over the targets of the step; its gradient is to be averaged."""
        batch = dict(inputs)
        if batch.get("labels") is None:
            raise ValueError(f"a batch needs labels for its loss, got the keys {sorted(batch)}")
        if num_items_in_batch is not None:
            batch["num_items_in_batch"] = num_items_in_batch
        if (tower := self._tower()) is not None:
            check_unused(model, batch, tower, text_model(unwrapped(self.model)))
        needs = unwrapped(self.model)._ringattn.needs
        local = shard_batch(batch, None, self.sequence_mesh, self.policy, needs=needs, layers=self._layers)
        outputs = model(**local)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def _tower(self) -> Any:
        """The module whose `get_image_features` batches of images go through; None without."""
        if self.model is None:  # model_init makes it before each training
            return None
        inner = unwrapped(self.model)
        towers = inner._ringattn.needs.towers
        return inner.get_submodule(towers[0].path) if towers else None

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The norm of a step's gradient. At the first one it is compared: whoever wraps the model has to average."""
        norm = super()._get_grad_norm(model, grad_norm)
        if not self._averaged and norm is not None:
            check_averaged(float(norm), self.sequence_mesh)
            self._averaged = True
        return norm

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        agree_on_control(self.control, self.sequence_mesh)
        super()._maybe_log_save_evaluate(*args, **kwargs)

    # Evaluation

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The mean loss over all targets of a data set. Collective; every rank returns the same."""
        self._tally.clear(metric_key_prefix)
        loader = self._lockstep(dataloader)
        output = super().evaluation_loop(loader, description, True, ignore_keys, metric_key_prefix)
        metrics = (output.metrics or {}) | {f"{metric_key_prefix}_loss": self._tally.mean}
        rows = _rows_of(dataloader.dataset)
        return output._replace(metrics=metrics, num_samples=len(rows) if has_length(rows) else self._tally.rows)

    @torch.no_grad()
    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, None, None]:
        """Counts a batch of every replica; there is nothing to gather."""
        batch = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            self._tally.add(self.compute_loss(model, batch), batch)
        return None, None, None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        self._tally.correct_speed(logs)
        super().log(logs, *args, **kwargs)

    # Figures, which the stock Trainer adds up over all ranks as if each had a batch of its own

    def get_total_train_batch_size(self, args: Any) -> int:
        return self._train_batch_size * args.gradient_accumulation_steps * self.sequence_mesh.data

    def num_examples(self, dataloader: DataLoader) -> int:
        rows = _rows_of(dataloader.dataset)
        return len(rows) if has_length(rows) else super().num_examples(dataloader)

    def floating_point_ops(self, inputs: Any) -> Any:
        return 0 if isinstance(inputs, Idle) else super().floating_point_ops(inputs) / self.sequence_mesh.sequence_size

    def _track_num_input_tokens(self, inputs: Any) -> None:
        kind = self.args.include_num_input_tokens_seen
        if kind in (False, "no"):
            return
        tokens = torch.tensor(count_tokens(inputs, kind, self.processing_class), device=self.sequence_mesh.device)
        if self.sequence_mesh.data > 1:
            dist.all_reduce(tokens, group=self.sequence_mesh.device_mesh.get_group("data"))
        self.state.num_input_tokens_seen += int(tokens)


def _rows_of(dataset: Any) -> Any:
    """The data set as it was given."""
    return dataset.rows if isinstance(dataset, ReplicaRows) else dataset

"""The training loop: data, layout, forward, loss, backward, clip, step, metrics, checkpoint."""

import random
import signal
import time
import warnings
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from ringattn import init_mesh
from ringattn.first_failure import FirstFailure
from ringattn.hf import attention_kwargs, parallelize
from ringattn.hf.elementwise import Elementwise
from ringattn.hf.memory import note_targets
from ringattn.memory.out_of_memory import CudaMemory, MemoryWatch
from ringattn.training.ahead import BatchesAhead
from ringattn.training.batches import Batch
from ringattn.training.checkpoint import TrainState, load_random_states, save_checkpoint
from ringattn.training.config import compute_dtype
from ringattn.training.engines import Engine, EngineOptions, build_engine
from ringattn.training.evaluation.validation import Validation
from ringattn.training.flops import StepFlops, peak_flops
from ringattn.training.grouping import DocumentCost, GroupedPacker, GroupedPosition
from ringattn.training.job import Job
from ringattn.training.lora import lora_of
from ringattn.training.loss import brought
from ringattn.training.metrics import StepMetrics, StepSeconds, peak_memory_gib
from ringattn.training.models import build_model, empty_model
from ringattn.training.output import write_config
from ringattn.training.packing import Packer, Position
from ringattn.training.placing import BatchMaker, LocalPack
from ringattn.training.report import Report
from ringattn.training.schedule import Schedule


class StopRequest:
    """Notes SIGTERM, SIGINT and SIGUSR1 (what schedulers send before they take a machine) instead of dying from them.

    A second SIGINT interrupts at once. Use it as a context manager; the handlers before it come back.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, object] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


class StepDone(NamedTuple):
    """A step's results, the same on every rank: mean loss and gradient norm of the global batch, and whether any rank
    was asked to stop."""

    loss: float
    norm: float
    stopping: bool


class Trainer:
    """One run. Making it is collective over all ranks, and so is `run`; both expect an initialised process group."""

    def __init__(self, job: Job) -> None:
        cfg = job.cfg
        self.job, self.cfg = job, cfg
        parallel = cfg.parallel
        self.mesh = init_mesh(
            data=parallel.data,
            ring=parallel.ring,
            ulysses=parallel.ulysses,
            device_type=job.device.type,
            ulysses_across_nodes=parallel.ulysses_across_nodes,
        )
        self.world_size = dist.get_world_size()
        _same_plan_everywhere(job)
        self.schedule = Schedule(
            cfg.optim.lr, round(cfg.optim.warmup_ratio * cfg.run.steps), cfg.run.steps, cfg.optim.min_ratio
        )
        self.flops = StepFlops.of(empty_model(job.model_config, lora_of(cfg.model)), job.model_config)
        _seed(cfg.run.seed, dist.get_rank())
        self.engine: Engine = build_engine(cfg.engine.name, self.mesh, self._engine_options())
        memory = CudaMemory(job.device) if job.device.type == "cuda" else None
        self.memory = MemoryWatch(memory, job.output, dist.get_rank(), job.plan.items, job.plan.advice)
        self.validation = Validation(
            job.validation,
            self.engine.model,
            self.mesh,
            cfg.data.seq_len,
            cfg.run.evaluate_every,
            cfg.run.steps,
            parallel.policy,
        )
        self.step, self.tokens, self.position = 0, 0, Position().state_dict()
        if job.resume is not None:
            self._resume()

    def _engine_options(self) -> EngineOptions:
        cfg, job = self.cfg, self.job
        config, lora = job.model_config, lora_of(cfg.model)
        return EngineOptions(
            empty=lambda: empty_model(config, lora),
            load=lambda: build_model(config, cfg.run.seed, cfg.model.path, list(cfg.model.allow_mismatch), lora),
            attach=self._attach,
            device=job.device,
            dtype=compute_dtype(cfg),
            weight_decay=cfg.optim.weight_decay,
            betas=(cfg.optim.betas[0], cfg.optim.betas[1]),
            eps=cfg.optim.eps,
            clip=cfg.optim.clip,
            micro_steps=cfg.data.packs_per_step // self.mesh.data,
            zero_stage=cfg.engine.get("zero_stage", 0),
            states=job.plan.states,
        )

    def _attach(self, model: nn.Module) -> None:
        """What is done to a model before it is sharded."""
        parallel = self.cfg.parallel
        if self.cfg.engine.compile == "elementwise":
            Elementwise(model)
        parallelize(
            model,
            self.mesh,
            self.job.plan.memory,
            scheme=parallel.scheme,
            backend=parallel.backend,
            head_chunks=parallel.head_chunks,
        )

    def _resume(self) -> None:
        assert self.job.resume is not None
        folder, state = self.job.resume
        self.engine.load(folder)
        load_random_states(folder)
        self.step, self.tokens, self.position = state.step, state.tokens, state.position

    def run(self, report: Report) -> bool:
        """Trains until all steps are done or a signal asks to stop, and saves in both cases. True if all are done."""
        cfg = self.cfg
        with StopRequest() as stop, self._batches() as stream:
            first = True
            while self.step < cfg.run.steps:
                started = time.perf_counter()
                batch = next(stream)
                waited = time.perf_counter() - started
                done = self._train_step(batch, stop.requested)
                seconds = StepSeconds(time.perf_counter() - started, waited, warmup=first)
                validation = None if done.stopping else self.validation.losses(self.step)
                report.step(self._metrics(batch, done, seconds, validation))
                first, stopping = False, done.stopping
                due = cfg.run.save_every > 0 and self.step % cfg.run.save_every == 0
                if due or stopping or self.step == cfg.run.steps:
                    self.save()
                    report.saved()
                if stopping:
                    break
        return bool(self.step == cfg.run.steps)

    def save(self) -> None:
        """Writes a checkpoint of the steps done so far. Collective."""
        state = TrainState(
            self.step,
            self.tokens,
            self.position,
            self.job.corpus.fingerprint,
            self.cfg.engine.name,
            self.world_size,
        )
        save_checkpoint(self.job.output / "checkpoints", state, self.engine.save, self.cfg.run.keep)

    def _batches(self) -> BatchesAhead:
        data, mesh = self.cfg.data, self.mesh
        maker = BatchMaker(
            self._packer(), data.packs_per_step, mesh.data_rank, mesh.data, mesh, self.cfg.parallel.policy
        )
        return BatchesAhead(maker, mesh, self.job.device, data.prefetch, data.ahead)

    def _packer(self) -> Packer | GroupedPacker:
        data, corpus, seed = self.cfg.data, self.job.corpus, self.cfg.run.seed
        if data.delay is None:
            return Packer(corpus, data.seq_len, seed, data.pad, Position.from_state(self.position))
        cost = DocumentCost(self.flops.attention, self.flops.per_token)
        return GroupedPacker(corpus, data.seq_len, seed, cost, data.delay, GroupedPosition.from_state(self.position))

    def _train_step(self, batch: Batch[LocalPack], stop: bool) -> StepDone:
        """One optimiser step. The host waits for the device once, at its end."""
        loss = torch.zeros((), device=self.job.device)
        with self.memory.step(self.step + 1) as at:
            for local in batch.micro:
                at("forward pass")
                share = self._forward(local, batch.targets_of(self.mesh.data_rank, self.mesh.data))
                at("backward pass")
                self.engine.backward(share)
                loss += share.detach()
            at("optimizer step")
            norm = self.engine.step(self.schedule(self.step))
            done = StepDone(*brought(loss, norm, stop))
        self.step += 1
        self.tokens += batch.tokens
        self.position = batch.position.state_dict()
        return done

    def _forward(self, local: LocalPack, targets: int) -> torch.Tensor:
        """A micro-step's share in the mean loss of the step, the same number on every rank.

        Arguments:
            targets: of this replica's micro-steps together.
        """
        note_targets(local.layout, local.count)
        ids, positions, labels = (x[None].to(self.job.device) for x in (local.ids, local.positions, local.targets))
        loss: torch.Tensor = self.engine.model(
            input_ids=ids,
            position_ids=positions,
            labels=labels,
            shift_labels=labels,
            num_items_in_batch=targets,
            use_cache=False,
            **attention_kwargs(local.layout),
        ).loss
        return loss

    def _metrics(
        self, batch: Batch[LocalPack], done: StepDone, seconds: StepSeconds, validation: dict[str, float] | None
    ) -> StepMetrics:
        device = self.job.device
        peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        at_peak = self.flops(batch.tokens, batch.lengths) / (peak * self.world_size) if peak else None
        return StepMetrics(
            step=self.step,
            loss=done.loss,
            grad_norm=done.norm,
            lr=self.schedule(self.step - 1),
            peak_memory_gib=peak_memory_gib(device),
            tokens=self.tokens,
            targets=batch.targets,
            epoch=batch.epoch,
            validation=validation,
            **seconds.rates(batch.tokens, self.world_size, at_peak),
        )


@FirstFailure()
def train(job: Job) -> None:
    """Runs a prepared job to its end, or to a checkpoint if a signal asks to stop. Collective."""
    rank0 = job.launch.rank == 0
    if job.done:
        if rank0:
            print(_finished(job))
        return
    _quiet_libraries()
    trainer = Trainer(job)
    _same_checkpoint_everywhere(job)
    if rank0:
        write_config(job.cfg, job.output, job.model_config)
    with Report(job, trainer.step, trainer.engine.num_parameters, enabled=rank0) as report:
        done = trainer.run(report)
    if rank0:
        state = "done" if done else f"stopped after step {trainer.step}; start again with the same command to go on"
        print(f"{state}: {job.output}", flush=True)
    dist.barrier()
    # Not where something was raised: the others would hear of lost connections before they can hear of the reason.
    dist.destroy_process_group()


def _same_checkpoint_everywhere(job: Job) -> None:
    """Raises RuntimeError on every rank if machines see different checkpoints, that is, do not share the folder."""
    step = -1 if job.resume is None else job.resume[1].step
    steps: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(steps, step)
    if len(set(steps)) > 1:
        raise RuntimeError(
            f"run.output={job.output} must be on a file system that all machines share; "
            f"newest checkpoint by rank: {steps}"
        )


def _same_plan_everywhere(job: Job) -> None:
    """Raises RuntimeError on every rank if their machines have different memories, for which they planned apart."""
    plans: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(plans, (job.plan.memory, job.plan.states))
    other = next((rank for rank, plan in enumerate(plans) if plan != plans[0]), None)
    if other is not None:
        raise RuntimeError(
            f"memory is planned apart on ranks 0 and {other}, whose machines differ: {plans[0]} and {plans[other]}; "
            "give memory.gpu_memory and memory.host_memory, those of the smallest"
        )


def _finished(job: Job) -> str:
    return (
        f"{job.output} already holds all {job.cfg.run.steps} steps: see metrics.jsonl and loss.png there. For another "
        f"run choose run.output=...; to train this one further use run.steps=<more> run.resume=force"
    )


def _seed(seed: int, rank: int) -> None:
    """Random states for dropout and the like, another one for each rank; the weights have their own seed."""
    random.seed(seed * 1_000_003 + rank)
    np.random.seed((seed * 1_000_003 + rank) % 2**32)  # noqa: NPY002  libraries use the global generator
    torch.manual_seed(seed * 1_000_003 + rank)


def _quiet_libraries() -> None:
    """Libraries speak of errors only: a run of many ranks would repeat their advice on every one."""
    import transformers

    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.")

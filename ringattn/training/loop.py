"""The training loop: data, layout, forward, loss, backward, clip, step, metrics, checkpoint."""

import random
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import numpy as np
import torch
import torch.distributed as dist

from ringattn import Layout, init_mesh
from ringattn.first_failure import FirstFailure
from ringattn.hf import attention_kwargs, parallelize
from ringattn.memory.out_of_memory import CudaMemory, MemoryWatch
from ringattn.training.batches import Batch, Prefetcher, batches
from ringattn.training.checkpoint import TrainState, load_random_states, save_checkpoint
from ringattn.training.config import compute_dtype
from ringattn.training.engines import Engine, EngineOptions, build_engine
from ringattn.training.flops import StepFlops, peak_flops
from ringattn.training.grouping import DocumentCost, GroupedPacker, GroupedPosition
from ringattn.training.job import Job
from ringattn.training.loss import backward_loss, share, token_loss_sum
from ringattn.training.metrics import StepMetrics, peak_memory_gib
from ringattn.training.models import build_model, empty_model
from ringattn.training.output import write_config
from ringattn.training.packing import Pack, Packer, Position
from ringattn.training.report import Report
from ringattn.training.schedule import Schedule


@dataclass(frozen=True)
class LocalPack:
    """This rank's part of a pack: t of its T tokens.

    Arguments:
        ids, targets, positions: (t,) int64 on the CPU; targets are already shifted, positions count in the document.
        layout: who holds which token.
    """

    ids: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor
    layout: Layout


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
        self.schedule = Schedule(
            cfg.optim.lr, round(cfg.optim.warmup_ratio * cfg.run.steps), cfg.run.steps, cfg.optim.min_ratio
        )
        self.flops = StepFlops.of(empty_model(job.model_config), job.model_config)
        _seed(cfg.run.seed, dist.get_rank())
        self.engine: Engine = build_engine(cfg.engine.name, self.mesh, self._engine_options())
        memory = CudaMemory(job.device) if job.device.type == "cuda" else None
        self.memory = MemoryWatch(memory, job.output, dist.get_rank())
        self.step, self.tokens, self.position = 0, 0, Position().state_dict()
        if job.resume is not None:
            self._resume()

    def _engine_options(self) -> EngineOptions:
        cfg, job = self.cfg, self.job
        return EngineOptions(
            config=job.model_config,
            load=lambda: build_model(job.model_config, cfg.run.seed, cfg.model.path, list(cfg.model.allow_mismatch)),
            attach=lambda model: parallelize(
                model,
                self.mesh,
                scheme=cfg.parallel.scheme,
                backend=cfg.parallel.backend,
                head_chunks=cfg.parallel.head_chunks,
            ),
            device=job.device,
            dtype=compute_dtype(cfg),
            weight_decay=cfg.optim.weight_decay,
            betas=(cfg.optim.betas[0], cfg.optim.betas[1]),
            eps=cfg.optim.eps,
            clip=cfg.optim.clip,
            checkpoint_layers=cfg.engine.checkpoint_layers,
            micro_steps=cfg.data.packs_per_step // self.mesh.data,
            zero_stage=cfg.engine.get("zero_stage", 0),
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
            while self.step < cfg.run.steps:
                started = time.perf_counter()
                batch = next(stream)
                loss, norm, stopping = self._train_step(batch, stop.requested)
                report.step(self._metrics(batch, loss, norm, time.perf_counter() - started))
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

    @contextmanager
    def _batches(self) -> Iterator[Prefetcher[Batch[LocalPack]]]:
        data = self.cfg.data
        source = batches(self._packer(), data.packs_per_step, self.mesh.data_rank, self.mesh.data, self._place)
        with Prefetcher(source, data.prefetch) as stream:
            yield stream

    def _packer(self) -> Packer | GroupedPacker:
        data, corpus, seed = self.cfg.data, self.job.corpus, self.cfg.run.seed
        if data.delay is None:
            return Packer(corpus, data.seq_len, seed, data.pad, Position.from_state(self.position))
        cost = DocumentCost(self.flops.attention, self.flops.per_token)
        return GroupedPacker(corpus, data.seq_len, seed, cost, data.delay, GroupedPosition.from_state(self.position))

    def _place(self, pack: Pack) -> LocalPack:
        """Plans the layout of a pack and takes this rank's tokens; runs in the prefetch thread."""
        layout = Layout(pack.docs, self.mesh, policy=self.cfg.parallel.policy)
        positions = layout.position_ids(torch.device("cpu"))
        return LocalPack(layout.shard(pack.tokens), layout.shard(pack.labels), positions, layout)

    def _train_step(self, batch: Batch[LocalPack], stop: bool) -> tuple[float, float, bool]:
        """Global mean loss, global gradient norm, and whether any rank was asked to stop."""
        loss_sum = torch.zeros((), device=self.job.device)
        with self.memory.step(self.step + 1) as at:
            for local in batch.micro:
                at("forward pass")
                local_sum = self._forward(local)
                at("backward pass")
                self.engine.backward(backward_loss(local_sum, batch.targets, self.world_size))
                loss_sum += local_sum.detach()
            at("optimizer step")
            norm = self.engine.step(self.schedule(self.step))
        total, stopping = share(loss_sum, stop)
        self.step += 1
        self.tokens += batch.tokens
        self.position = batch.position.state_dict()
        return total / max(batch.targets, 1), norm, stopping

    def _forward(self, local: LocalPack) -> torch.Tensor:
        """Sum of the losses of this rank's targets."""
        device = self.job.device
        logits = self.engine.model(
            input_ids=local.ids[None].to(device, non_blocking=True),
            position_ids=local.positions[None].to(device, non_blocking=True),
            use_cache=False,
            **attention_kwargs(local.layout),
        ).logits
        return token_loss_sum(logits[0], local.targets.to(device, non_blocking=True))

    def _metrics(self, batch: Batch[LocalPack], loss: float, norm: float, seconds: float) -> StepMetrics:
        device = self.job.device
        peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        mfu = self.flops(batch.tokens, batch.lengths) / (seconds * self.world_size * peak) if peak else None
        return StepMetrics(
            step=self.step,
            loss=loss,
            grad_norm=norm,
            lr=self.schedule(self.step - 1),
            tokens_per_second=batch.tokens / seconds,
            tokens_per_second_per_gpu=batch.tokens / seconds / self.world_size,
            mfu=mfu,
            peak_memory_gib=peak_memory_gib(device),
            seconds=seconds,
            tokens=self.tokens,
            targets=batch.targets,
            epoch=batch.epoch,
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

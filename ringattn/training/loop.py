"""The training loop: data, layout, forward, loss, backward, clip, step, metrics, checkpoint."""

import math
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from ringattn.first_failure import FirstFailure
from ringattn.hf import attention_kwargs
from ringattn.hf.memory import note_targets
from ringattn.hf.model import unwrapped
from ringattn.hf.shape import weighed_layers
from ringattn.memory.out_of_memory import CudaMemory, MemoryWatch
from ringattn.parallel.layout import Layout
from ringattn.parallel.machine.peak_flops import peak_flops
from ringattn.recurrent.weighing import weighed_layout
from ringattn.training.checkpoint import Place, TrainState
from ringattn.training.checks.bad_numbers import check_weights, finite
from ringattn.training.checks.determinism import be_deterministic
from ringattn.training.checks.spikes import Spikes, losses_before, record_spike
from ringattn.training.checks.step_checks import StepChecks
from ringattn.training.checks.stragglers import Stragglers
from ringattn.training.config.optim import schedule_of
from ringattn.training.engines import Engine
from ringattn.training.evaluation.validation import Validation
from ringattn.training.garbage import Garbage
from ringattn.training.health.rank import Health, StopRequest
from ringattn.training.loss import Brought, brought, spoiling
from ringattn.training.making import engine_of, mesh_of, quiet_libraries, seed_libraries
from ringattn.training.model.flops import StepFlops
from ringattn.training.model.lora import lora_of
from ringattn.training.model.models import empty_model
from ringattn.training.packs.ahead import BatchesAhead
from ringattn.training.packs.batches import Batch
from ringattn.training.packs.grouping import DocumentCost
from ringattn.training.packs.ordering import Position
from ringattn.training.packs.packers import AnyPacker, make_packer
from ringattn.training.packs.placing import BatchMaker, LocalPack
from ringattn.training.page.record import write_record
from ringattn.training.report.metrics import StepMetrics, StepSeconds, peak_memory_gib
from ringattn.training.report.profile import Profile
from ringattn.training.report.telling import Report
from ringattn.training.resuming.keeping import Keeping
from ringattn.training.resuming.resume import SEED
from ringattn.training.start.agreement import meet
from ringattn.training.start.job import Job
from ringattn.training.start.output import write_config


class Trainer:
    """One run. Making it is collective over all ranks, and so is `run`.

    Arguments:
        health: where this rank says what it does.
    """

    def __init__(self, job: Job, health: Health | None = None) -> None:
        cfg = job.cfg
        self.job, self.cfg = job, cfg
        self.health = health = Health() if health is None else health
        self.stop = StopRequest(health.record)
        self.mesh = mesh_of(job)
        self.world_size = dist.get_world_size()
        self.schedule = schedule_of(cfg)
        self.flops = StepFlops.of(
            empty_model(job.model_config, lora_of(cfg.model), list(cfg.model.freeze)), job.model_config
        )
        seed_libraries(cfg.run.seed, dist.get_rank())
        self.engine: Engine = engine_of(job, self.mesh, health)
        self._layers = weighed_layers(unwrapped(self.engine.model))
        memory = CudaMemory(job.device) if job.device.type == "cuda" else None
        self.memory = MemoryWatch(memory, job.output, dist.get_rank(), job.plan.items, job.plan.advice)
        self.checks = StepChecks(job, self.mesh, self.engine, self._forward)
        self.validation = Validation(
            job.validation,
            self.engine.model,
            self.mesh,
            cfg.data.seq_len,
            cfg.run.evaluate_every,
            cfg.run.steps,
            cfg.parallel.policy,
        )
        self.step, self.tokens, self.position = 0, 0, Position().state_dict()
        self.keeping = Keeping(job)
        self.restore()

    def restore(self, before: int | None = None) -> bool:
        """Goes on from the newest good checkpoint, not later than step `before`; False if there is none. Collective.

        Batches that were made ahead are of the old place in the data: a stream is to be opened anew.
        """
        state = self.keeping.restored(self.engine, before)
        if state is None:
            return False
        self.step, self.tokens, self.position = state.step, state.tokens, state.position
        return True

    def run(self, report: Report) -> bool:
        """Trains until all steps are done or a signal asks to stop, and saves in both cases. True if all are done."""
        cfg = self.cfg
        self.spikes = Spikes(cfg.run.spike, losses_before(self.job.output, self.step) if cfg.run.spike else ())
        record = self.health.record
        profile = Profile(self.job.output, cfg.run.profile, dist.get_rank())
        with self.stop, Garbage() as garbage, self._batches() as stream, self._stragglers() as stragglers, profile:
            first = True
            owed: list[Place] = []
            self._look_again(report)
            while self.step < cfg.run.steps:
                profile.before(self.step + 1)
                started = time.perf_counter()
                record.begin(self.step + 1)
                record.at("data")
                with stragglers.step():
                    batch = next(stream)
                    self.health.computes(batch.counts.digest)
                    waited = time.perf_counter() - started
                    done = self._train_step(batch)
                seconds = StepSeconds(time.perf_counter() - started, waited, warmup=first)
                record.took(seconds.seconds)
                profile.after(self.step)
                validation = None if done.stopping else self.validation.losses(self.step)
                self.keeping.validated(self.step, validation)
                report.step(self._metrics(batch, done, seconds, validation))
                stragglers.done(self.step, waited, warmup=first)
                if first:
                    self.keeping.take_memory(self.engine)
                    garbage.settle()
                first, last = False, done.stopping or self.step == cfg.run.steps
                if self._went_back(batch, done):
                    report.back_to(self.step)
                    last = done.stopping
                owed = self._owed(owed, last)
                if owed and (last or not self.checks.bad_steps.last_was_bad):
                    report.written()
                    self.save(owed)
                    report.saved(owed)
                    owed = []
                if last:
                    self.keeping.finish()
                    break
        return bool(self.step == cfg.run.steps)

    def _look_again(self, report: Report) -> None:
        """At validation sets after the step that the run goes on from, if a signal left no time for it."""
        if self.step and self.validation.due(self.step) and self.keeping.unvalidated(self.step):
            losses = self.validation.losses(self.step)
            assert losses is not None
            self.keeping.validated(self.step, losses)
            report.validated(self.step, losses)

    def _owed(self, owed: Sequence[Place], last: bool) -> list[Place]:
        """Where the state is to be saved now, or after the next step whose numbers are good."""
        due = self.keeping.due(self.step, last)
        return due if last else [*owed, *(place for place in due if place not in owed)]

    def _stragglers(self) -> Stragglers:
        run = self.cfg.run
        return Stragglers(
            self.job.output,
            self.engine.model,
            self.job.device,
            run.straggler_every,
            run.straggler_percent,
            self.mesh.sequence_group if self.mesh.sequence_size > 1 else None,
        )

    def _went_back(self, batch: Batch[LocalPack], done: Brought) -> bool:
        """Whether the loss of a step was a spike after which the run is back at a checkpoint, its data further on."""
        known = finite(done) and batch.targets
        middle = self.spikes.median_before(self.step, done.loss) if known else None
        if middle is None:
            return False
        spiked, skip = self.step, self.cfg.run.on_spike == "skip"
        back = skip and self.restore()
        then = "there is no checkpoint to go back to" if skip else "the run goes on"
        if back:
            then = f"back to step {self.step}, and on with the data after step {spiked}"
        record_spike(self.job.output, spiked, done.loss, middle, batch, then)
        if back:
            self.spikes.back_to(self.step, self.cfg.run.max_bad_steps)
            self.position = batch.position.state_dict()
        return back

    def save(self, places: Sequence[Place] | None = None) -> None:
        """Saves the steps done so far, on disk unless other places are given. Collective.

        Raises BadNumbers instead of saving weights that are not finite.
        """
        self.health.record.at("saving")
        check_weights(self.engine.model, self.step, self.job.device)
        state = TrainState(
            self.step,
            self.tokens,
            self.position | {SEED: self.cfg.run.seed},
            self.job.corpus.fingerprint,
            self.cfg.engine.name,
            self.world_size,
        )
        self.keeping.save(state, self.engine, places)

    def _batches(self) -> BatchesAhead:
        data, mesh = self.cfg.data, self.mesh
        maker = BatchMaker(
            self._packer(),
            data.packs_per_step,
            mesh.data_rank,
            mesh.data,
            mesh,
            self.cfg.parallel.policy,
            self._layers,
            share=bool(data.share_prefixes),
        )
        return BatchesAhead(maker, mesh, self.job.device, data.prefetch, data.ahead)

    def _packer(self) -> AnyPacker:
        cost = DocumentCost(self.flops.attention, self.flops.per_token)
        return make_packer(self.cfg.data, self.job.corpus, self.cfg.run.seed, self.position, lambda: cost)

    def next_layout(self) -> Layout:
        """Of the next pack, without prefixes that are shared."""
        docs = self._packer().step(self.cfg.data.packs_per_step)[0].docs
        return weighed_layout(docs, self.mesh, self.cfg.parallel.policy, self._layers)

    def _train_step(self, batch: Batch[LocalPack]) -> Brought:
        """One optimiser step. The host waits for the device once, at its end, and again where something is wrong."""
        before = self.checks.before(self.step, self.schedule(self.step), batch)
        loss = torch.zeros((), device=self.job.device)
        with self.memory.step(self.step + 1) as told:
            at = self.health.in_step(told)
            for local in batch.micro:
                at("forward pass")
                share = self._forward(local, batch.targets_of(self.mesh.data_rank, self.mesh.data))
                at("backward pass")
                self.engine.backward(spoiling(share))
                loss += share.detach()
            at("optimizer step")
            self.keeping.hold()
            norm = self.engine.step(self.schedule(self.step))
            done = brought(loss, norm, self.stop.requested, before.digest)
        self.checks.after(before, done, batch)
        self.step += 1
        self.tokens += batch.tokens
        self.position = batch.position.state_dict()
        return done

    def _forward(self, local: LocalPack, targets: int) -> torch.Tensor:
        """A micro-step's share in the mean loss of the step, the same number on every rank.

        Arguments:
            targets: of this replica's micro-steps together.
        """
        note_targets(local.layout, local.known)
        ids, positions, labels = (x[None].to(self.job.device) for x in (local.ids, local.positions, local.labels))
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
        self, batch: Batch[LocalPack], done: Brought, seconds: StepSeconds, validation: dict[str, float] | None
    ) -> StepMetrics:
        device = self.job.device
        # What shared prefixes save of the work is not known to ranks that do not read the pack.
        known = device.type == "cuda" and not self.cfg.data.share_prefixes
        peak = peak_flops(torch.cuda.get_device_name(device)) if known else None
        at_peak = self.flops(batch.tokens, batch.lengths) / (peak * self.world_size) if peak else None
        return StepMetrics(
            step=self.step,
            loss=done.loss if math.isfinite(done.loss) and batch.targets else None,
            grad_norm=done.norm if math.isfinite(done.norm) else None,
            lr=self.schedule(self.step - 1),
            peak_memory_gib=peak_memory_gib(device),
            tokens=self.tokens,
            targets=batch.targets,
            epoch=batch.epoch,
            skipped=not finite(done),
            validation=validation,
            **seconds.rates(batch.tokens, self.world_size, at_peak),
        )


@FirstFailure()
def train(job: Job, health: Health | None = None) -> None:
    """Runs a prepared job to its end, or to a checkpoint if a signal asks to stop. Collective."""
    rank0 = job.launch.rank == 0
    health = Health() if health is None else health
    health.record.at("joining")
    meet(job)
    if job.done:
        if rank0:
            print(_finished(job))
        return
    quiet_libraries()
    if job.launch.world_size > 1 and dist.is_initialized():
        health.joined()
    health.record.at("starting")
    if job.cfg.run.deterministic:
        be_deterministic()
    trainer = Trainer(job, health)
    if rank0:
        write_config(job.cfg, job.output, job.model_config)
        write_record(job, trainer.step, trainer.engine.num_parameters, trainer.next_layout())
    with Report(job, trainer.step, trainer.engine.num_parameters, enabled=rank0) as report:
        done = trainer.run(report)
    health.finished(trainer.step, done)
    if rank0:
        state = "done" if done else f"stopped after step {trainer.step}; start again with the same command to go on"
        print(f"{state}: {job.output}", flush=True)
    dist.barrier()
    # Not where something was raised: the others would hear of lost connections before they can hear of the reason.
    dist.destroy_process_group()


def _finished(job: Job) -> str:
    return (
        f"{job.output} already holds all {job.cfg.run.steps} steps: see metrics.jsonl and loss.png there. For another "
        f"run choose run.output=...; to train this one further use run.steps=<more> run.resume=force"
    )

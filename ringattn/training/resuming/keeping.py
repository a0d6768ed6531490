"""A run's checkpoints and copies in memory: what is due when, what a start goes on from, and what stays at the end."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ringattn.training.checkpoint import BadCheckpoint, Place, SaveFailed, Saves, TrainState
from ringattn.training.checkpoint.folders import found_in
from ringattn.training.checkpoint.memory_copies import (
    adopt,
    copies_folder,
    known_run,
    make_rank_folder,
    rank_folder,
    remove_copies,
    remove_other_copies,
    run_of,
)
from ringattn.training.checkpoint.neighbours import bring_home, remove_guests
from ringattn.training.checkpoint.random_states import random_states, set_random_states
from ringattn.training.engines.interface import STATE, Engine
from ringattn.training.model.lora import lora_of
from ringattn.training.model.models import empty_model
from ringattn.training.report.records import read_metrics
from ringattn.training.resuming.best import METRICS, BestSteps
from ringattn.training.resuming.passed_over import runs_of, tell_passed_over
from ringattn.training.resuming.restoring import Chosen, choose
from ringattn.training.resuming.resume import check_resume
from ringattn.training.start.job import Job

RANDOM = "random"


class Keeping:
    """Saves and restores the state of a run. Making it is collective, and so are all calls but `due`, `validated` and
    `hold`."""

    def __init__(self, job: Job) -> None:
        self._job, run = job, job.cfg.run
        self._saves = Saves(job.output, run.async_save, run.max_failed_saves, job.device)
        self._rank = self._saves.together.rank
        # On all ranks or none, since an engine's state is collective; machines may differ in their memories.
        self._ahead = any(self._saves.together.gather(run.async_save and job.device.type == "cuda"))
        # Rank 0 alone deletes what is on disk, so that no other needs to know.
        self._best = BestSteps(job.output, 0 if self._rank else run.keep_best)
        self._disk = Place(job.output / "checkpoints", run.keep, spared=self._best)
        self._copies = copies_folder(Path(run.memory_folder), job.output)
        self._memory = self._place_in_memory() if run.memory_every else None
        self._outgrown, self._saved = False, 0

    def _place_in_memory(self) -> Place:
        checkpoints = self._disk.root

        def made() -> tuple[Path, str]:
            return make_rank_folder(self._copies, self._rank), run_of(checkpoints) if self._rank == 0 else ""

        places = self._saves.together(made)
        run, before = runs_of(places[0][1], self._job)
        launch, told = self._job.launch, self._job.cfg.run.memory_neighbours
        distance = launch.ranks_per_node if told and launch.world_size > launch.ranks_per_node else 0
        return Place(places[self._rank][0], 1, False, "copy in memory", run, before, neighbour=distance)

    def due(self, step: int, last: bool) -> list[Place]:
        """Where a step that was done is to be saved."""
        run = self._job.cfg.run
        if last:
            return [self._disk]
        places = []
        # In memory first: writing to a disk takes longer.
        if self._memory is not None and step % run.memory_every == 0:
            places.append(self._memory)
        if run.save_every > 0 and step % run.save_every == 0:
            places.append(self._disk)
        return places

    def save(self, state: TrainState, engine: Engine, places: Sequence[Place] | None = None) -> None:
        """Saves in places, on disk by itself; see `Saves.save` for what happens if it fails."""
        self._free_outgrown()
        self._saved = state.step
        tree = {STATE: engine.state(), RANDOM: random_states()}
        self._saves.save(state, tree, [self._disk] if places is None else places)

    def _free_outgrown(self) -> None:
        """Once each rank has a copy of its own, frees that of another number of ranks, which the start went on from."""
        if not self._outgrown or self._memory is None:
            return
        self._saves.wait()
        count = self._saves.together.count
        own = [one for one in found_in(self._memory.root) if one.marker and one.marker.state.world_size == count][:1]
        if all(self._saves.together.gather(bool(own))):
            remove_other_copies(self._copies, self._rank, count, [one.folder for one in own])
            remove_guests(self._copies)
            self._outgrown = False

    def validated(self, step: int, losses: dict[str, float] | None) -> None:
        """What validation sets said after a step, before that is saved: some checkpoints stay for it."""
        self._best.note(step, losses)

    def unvalidated(self, step: int) -> bool:
        """Whether a step was recorded without a look at validation sets, as where a signal left no time for it."""
        records = read_metrics(self._job.output / METRICS) if self._rank == 0 else []
        last = records[-1] if records else {}
        return self._saves.together.gather(last.get("step") == step and last.get("validation") is None)[0]

    def hold(self) -> None:
        """Before a step changes the engine: a GPU that still copies what was saved ends that first."""
        self._saves.hold()

    def take_memory(self, engine: Engine) -> None:
        """Takes what the first save would wait for, once there is something to save: after the first step."""
        if self._ahead:
            self._saves.take_memory({STATE: engine.state(), RANDOM: random_states()})

    def finish(self) -> None:
        """After the last save: waits for it, and removes copies in memory. Raises SaveFailed if it failed."""
        self._saves.finish()
        if self._memory is None:
            # An earlier start may have kept some. Newer ones were told of, and the next start may go on from them.
            runs = runs_of(known_run(self._disk.root), self._job)
            own = found_in(rank_folder(self._copies, self._rank))
            if any(one.step > self._saved and one.marker and one.marker.run in runs for one in own):
                return
        remove_guests(self._copies)
        remove_copies(self._copies, self._rank, self._saves.together.count)

    def restored(self, engine: Engine, before: int | None = None) -> TrainState | None:
        """Loads the newest good checkpoint into an engine and the random generators, and returns its state. None if
        there is none, and then nothing is changed.

        Arguments:
            before: the latest step that may be taken.

        Raises BadCheckpoint if it cannot be read by this run, or none is good.
        """
        self._saves.wait()
        together = self._saves.together
        if self._memory is not None:
            self._bring_home(self._memory)
        chosen = choose(self._job.output, self._disk, self._memory, together, before)
        if before is None:
            tell_passed_over(self._job, 0 if chosen is None else chosen.state.step, together)
        if self._memory is not None:
            kept = () if chosen is None or chosen.place.shared else chosen.folders
            remove_other_copies(self._copies, self._rank, together.count, kept)
            remove_guests(self._copies, chosen.state.step if kept and chosen else -1)
            self._outgrown = chosen is not None and bool(kept) and chosen.state.world_size != together.count
        if chosen is None:
            if before is None:  # the run begins anew
                self._best.back_to(0)
            return None
        state = self._checked(chosen)
        self._best.back_to(state.step)
        saved = chosen.opened(self._rank)
        engine.load(saved)
        if not chosen.place.shared:
            adopt(chosen.folders, chosen.place.run)
        with suppress(KeyError):  # fewer ranks wrote it
            set_random_states(saved.own(RANDOM))
        return state

    def _bring_home(self, memory: Place) -> None:
        try:
            bring_home(memory, self._saves.together)
        except SaveFailed as error:  # what every rank has of its own is there all the same
            if self._rank == 0:
                print(f"warning: copies in memory of other machines were not brought here: {error}", flush=True)

    def _checked(self, chosen: Chosen) -> TrainState:
        """The state to go on from. One that was found only now that ranks can talk is checked as others were before."""
        job = self._job
        if job.resume is not None and chosen.folder == job.resume[0]:
            return job.resume[1]
        model = empty_model(job.model_config, lora_of(job.cfg.model))
        try:
            state, said = check_resume(
                job.cfg, job.output, chosen.state, job.launch, job.corpus, job.model_config, model
            )
        except ValueError as error:
            raise BadCheckpoint(str(error)) from None
        if self._rank == 0:
            print("\n".join([f"going on from the {chosen.place.kind} {chosen.folder}", *said]), flush=True)
        return state

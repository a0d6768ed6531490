"""Trains a language model on long packed documents: `torchrun --nproc-per-node 2 recipes/train.py [overrides]`.

Starts under torchrun (`ringattn train` calls it), as the tasks of SLURM's srun, or alone. Every key is in `configs/`,
with a comment.
Exit codes of a rank: 0 done, or stopped by a signal with a checkpoint; 1 if its state could not be saved; 2 for a
configuration that cannot run, or that is not the same on all ranks. torchrun makes 1 of all but 0, and `ringattn train`
more than it: how a run ended stands in exit.json of its folder.
"""

import os

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ringattn.training.config.choices import chosen_by_user
from ringattn.training.failures import reported
from ringattn.training.health.start import hold, refused
from ringattn.training.start.job import prepare
from ringattn.training.start.launched import current
from ringattn.training.start.refusal import of_a_list, refuse


@hydra.main(config_path="../configs", config_name="train", version_base=None)
def main(cfg: DictConfig) -> None:
    """Refuses before any process group starts, then trains."""
    try:
        job = prepare(cfg, current(), chosen_by_user(cfg))
        lock = None if job.cfg.run.plan_only else hold(job)
    except (ValueError, OmegaConfBaseException) as error:
        refused(cfg, error)
        refuse(error)
    if lock is None:
        if job.launch.rank == 0:
            print(job.plan.text())
        return
    # Imported late: a refusal must not wait for torch.distributed and transformers.
    from ringattn.training.checkpoint import BadCheckpoint, SaveFailed
    from ringattn.training.health.rank import running
    from ringattn.training.loop import train
    from ringattn.training.start.meeting import CannotStart

    try:
        with running(job, lock) as health:
            train(job, health)
    except SaveFailed as error:
        refuse(error, code=1)
    except (CannotStart, BadCheckpoint) as error:
        refuse(error)


if __name__ == "__main__":
    # Hydra prints and exits by itself, on every rank, unless asked for its exceptions.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        reported(main)()
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        refuse(error)
    except ValueError as error:
        if (told := of_a_list(error)) is None:
            raise
        refuse(told)

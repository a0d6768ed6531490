"""Evaluates a language model on long documents: `torchrun --nproc-per-node 2 recipes/evaluate.py model.run=RUN`.

Starts under torchrun (`ringattn evaluate` calls it), as the tasks of SLURM's srun, or alone. Every key is in
`configs/evaluate.yaml`, with a comment.
Exit codes: 0 done, 2 for a configuration that cannot run.
"""

import os

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ringattn.training.evaluation.prepared import prepare
from ringattn.training.failures import reported
from ringattn.training.health.start import tell_launcher
from ringattn.training.start.launched import current
from ringattn.training.start.refusal import of_a_list, refuse


@hydra.main(config_path="../configs", config_name="evaluate", version_base=None)
def main(cfg: DictConfig) -> None:
    """Refuses before any process group starts, then evaluates."""
    try:
        job = prepare(cfg, current())
    except (ValueError, OmegaConfBaseException) as error:
        tell_launcher(error)
        refuse(error)
    from ringattn.training.evaluation.evaluate import evaluate

    evaluate(job)


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

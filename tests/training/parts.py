"""An engine's state in a folder, without what completes a checkpoint."""

from pathlib import Path

import torch.distributed as dist

from ringattn.training.checkpoint.saved_state import SavedState, write_part
from ringattn.training.checkpoint.snapshot import snapshot_of
from ringattn.training.engines import Engine
from ringattn.training.engines.interface import STATE


def save_parts(engine: Engine, folder: Path) -> None:
    """Writes every rank's part; when it returns, all of them are there."""
    write_part(folder, dist.get_rank(), snapshot_of({STATE: engine.state()}))
    dist.barrier()


def load_parts(engine: Engine, folder: Path) -> None:
    """Reads what `save_parts` wrote, on any number of ranks."""
    engine.load(SavedState.of(folder, dist.get_rank()))

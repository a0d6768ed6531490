"""Checkpoints that are complete or absent, summed, free of pickle, and copies of them in memory.

A checkpoint is a folder `step-00000010` with one safetensors file a rank and a marker, `complete.json`, which has the
small part of the state, and size and CRC-32 of every file. `folders.py` finds and judges them, `writing.py` writes
one, `saving.py` is what a run calls, and `saved_state.py` reads, by any number of ranks.
"""

from ringattn.training.checkpoint.folders import complete_checkpoints, newest_checkpoint
from ringattn.training.checkpoint.marker import BadCheckpoint, OldCheckpoint, TrainState
from ringattn.training.checkpoint.saved_state import SavedState
from ringattn.training.checkpoint.saving import Saves
from ringattn.training.checkpoint.together import SaveFailed
from ringattn.training.checkpoint.writing import Place

__all__ = [
    "BadCheckpoint",
    "OldCheckpoint",
    "Place",
    "SaveFailed",
    "SavedState",
    "Saves",
    "TrainState",
    "complete_checkpoints",
    "newest_checkpoint",
]

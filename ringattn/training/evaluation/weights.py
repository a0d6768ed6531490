"""The trained weights of a checkpoint, without the optimizer's states."""

from pathlib import Path

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

from ringattn.training.checkpoint.saved_state import SavedState
from ringattn.training.engines.interface import STATE


def load_trained(model: nn.Module, folder: Path) -> None:
    """Reads the weights that FSDP2 saved in a checkpoint into a model that is sharded over any ranks. Collective."""
    options = StateDictOptions(ignore_frozen_params=True, strict=False)
    weights = get_model_state_dict(model, options=options)
    SavedState.of(folder, dist.get_rank()).fill(STATE, {"model": weights})
    set_model_state_dict(model, weights, options=options)

"""The trained weights of a checkpoint, without the optimizer's states."""

from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict


def load_trained(model: nn.Module, folder: Path) -> None:
    """Reads the weights that FSDP2 saved in a checkpoint into a model that is sharded over any ranks. Collective."""
    options = StateDictOptions(ignore_frozen_params=True, strict=False)
    weights = get_model_state_dict(model, options=options)
    dcp.load({"model": weights}, checkpoint_id=folder)
    set_model_state_dict(model, weights, options=options)

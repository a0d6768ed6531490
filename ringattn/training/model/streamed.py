"""A model's first weights piece by piece: a rank reads from the files what its shards need, and never the whole."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ringattn.training.model.lora import Lora, put_lora
from ringattn.training.model.weight_files import WeightFiles, places_in


class StreamedWeights:
    """Tensors of a model's state by their names in it.

    Arguments:
        files, places: where saved ones are.
        factors: those of LoRA, which no file holds.
        buffers: those that are computed and never saved, such as rotary frequencies.
    """

    def __init__(
        self,
        files: WeightFiles,
        places: Mapping[str, str],
        factors: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
    ) -> None:
        self._files, self._places, self._factors, self.buffers = files, places, factors, buffers

    def rows(self, name: str, low: int = 0, high: int | None = None) -> Tensor:
        """Rows `[low, high)`, the whole by itself, in the dtype that they were saved in."""
        if name in self._factors:
            return self._factors[name][low:high] if self._factors[name].dim() else self._factors[name]
        return self._files.rows(self._places[name], low, high)

    def __contains__(self, name: str) -> bool:
        return name in self._factors or name in self._places


def streamed_weights(config: Any, seed: int, path: str | None, lora: Lora | None) -> StreamedWeights | None:
    """What `build_model` would make of the same arguments, number for number; None where only it can.

    That is where weights are drawn, are no safetensors, or do not stand in the files as they do in the model.
    """
    files = WeightFiles.of(path) if path is not None else None
    if files is None:
        return None
    model = skeleton(config)
    plain = set(model.state_dict())
    if lora is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            put_lora(model, lora)
    state = model.state_dict()
    factors = {name: tensor for name, tensor in state.items() if name.replace(".base_layer", "") not in plain}
    places = places_in(files, model, factors)
    if places is None:
        return None
    buffers = {name: buffer for name, buffer in model.named_buffers() if name not in state}
    return StreamedWeights(files, places, factors, buffers)


def skeleton(config: Any) -> nn.Module:
    """The model with its buffers as they are computed, and parameters that take no memory: one zero for all numbers.

    They are on the CPU, so that whatever is drawn beside them is drawn as beside real ones.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for module in model.modules():
        for name, parameter in [*module.named_parameters(recurse=False)]:
            zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            module.register_parameter(name, nn.Parameter(zeros))
    model.tie_weights()  # type: ignore[operator]
    return model

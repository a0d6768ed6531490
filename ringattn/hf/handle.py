"""What `parallelize` did to a model: its handle, and how a model is told which attention to use."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from ringattn.hf.cached import KeyCache
from ringattn.hf.features import features_of
from ringattn.hf.image_features import take_exchange
from ringattn.hf.images import EmbeddingNeeds
from ringattn.hf.local_draws import LocalDraws
from ringattn.hf.memory import ModelMemory
from ringattn.hf.recurrent import RecurrentLayers, take_back
from ringattn.hf.router_loss import RouterLoss
from ringattn.hf.support import LengthLimit
from ringattn.hf.vision import ImageDeal
from ringattn.parallel.mesh.mesh import SequenceMesh

# Only "ringattn" works: transformers treats names that hold "flash" or "/" in ways of its own.
NAME = "ringattn"
OPTIONS = frozenset(
    {"scheme", "backend", "stages", "keep_keys", "wide_reduce", "memory_limit", "head_chunks", "deterministic"}
)


@dataclass(eq=False)
class Handle:
    """What `parallelize` did to a model.

    Arguments:
        layers: attention layers that the configuration says there are.
        draws: the random numbers of its forward passes.
        memory: what was put in about memory.
        adapters: those of PEFT that were looked at.
        limits, needs: what batches must keep to, see `LengthLimit` and `EmbeddingNeeds`.
        calls: attention calls of each layer module in the newest forward pass.
        states: layers that carry a state; state_calls are those of their functions in the newest forward pass.
        asked: for each layer index the features (window, chunk, softcap, sinks) of its calls so far.
        without: features to leave out, by layer index: to see that they count. For checks only.
        verified: a forward pass ran in which every attention layer called exactly once.
        reach: for evaluation only: no query sees more than so many tokens back, itself counted, in any layer.
        cache: for evaluation only: keeps the keys of the next forward pass.
        images, images_placed: of a forward pass that is running, who computes which images and videos, and how often
            they were exchanged, by medium.
        routers: the loss of a model's routers, where it has one.
    """

    model: Any = field(repr=False)
    mesh: SequenceMesh
    options: dict[str, Any]
    layers: int
    limits: list[LengthLimit]
    needs: EmbeddingNeeds
    draws: LocalDraws
    memory: ModelMemory | None = None
    adapters: tuple[tuple[str, int], ...] = ()
    calls: dict[str, int] = field(default_factory=dict)
    states: RecurrentLayers = field(default_factory=lambda: RecurrentLayers({}), repr=False)
    state_calls: dict[str, int] = field(default_factory=dict)
    asked: dict[int, frozenset[str]] = field(default_factory=dict)
    without: dict[int, tuple[str, ...]] = field(default_factory=dict)
    verified: bool = False
    reach: int | None = None
    cache: KeyCache | None = field(default=None, repr=False)
    images: dict[str, ImageDeal] = field(default_factory=dict, repr=False)
    images_placed: dict[str, int] = field(default_factory=dict, repr=False)
    routers: RouterLoss = field(default_factory=RouterLoss)
    _implementation: str = ""
    _loss: Callable[..., Any] | None = field(default=None, repr=False)
    _called: list[nn.Module] = field(default_factory=list, repr=False)
    _hooks: list[RemovableHandle] = field(default_factory=list, repr=False)

    @property
    def layers_seen(self) -> int:
        """Attention layers that came through ringattn."""
        return len(self.calls)

    def note(self, module: nn.Module, options: dict[str, Any]) -> None:
        """Count a call of an attention layer, and until `verified` note which features it asks for."""
        index = getattr(module, "layer_idx", None)
        key = f"layer {index}" if index is not None else f"{type(module).__name__} {id(module)}"
        self.calls[key] = self.calls.get(key, 0) + 1
        if self.verified:
            return
        self._called.append(module)
        if isinstance(index, int):
            self.asked[index] = self.asked.get(index, frozenset()) | features_of(options)

    def note_state(self, module: nn.Module, name: str) -> None:
        """Count a call of a function by which a layer with a state mixes tokens."""
        key = f"{name} of {type(module).__name__} {getattr(module, 'layer_idx', id(module))}"
        self.state_calls[key] = self.state_calls.get(key, 0) + 1

    def verify(self, compiled: int = 0) -> None:
        """Raises NotImplementedError if attention did not run here once per layer: some models ignore its name, and
        others are changed after their first forward pass.

        Arguments:
            compiled: calls from inside of compiled layers, which are counted but not told apart.
        """
        name = type(self.model).__name__
        ran = len(self.calls) + compiled
        if ran != self.layers:
            reason = "this was changed after its first forward pass" if self.verified else "it cannot be replaced"
            raise NotImplementedError(
                f"{name} ran {ran} of its {self.layers} attention layers through ringattn: as for its attention, "
                f"{reason}"
            )
        if several := {key: count for key, count in self.calls.items() if count != 1}:
            raise NotImplementedError(f"{name} called attention more than once in a forward pass: {several}")
        if several := {key: count for key, count in self.state_calls.items() if count != 1}:
            raise NotImplementedError(f"{name} called these more than once in a forward pass: {several}")
        if len(self.state_calls) != self.states.calls:
            raise NotImplementedError(
                f"{name} ran {len(self.state_calls)} of the {self.states.calls} functions of its layers with a state "
                "through ringattn: something replaced the others"
            )
        self.verified = True

    def __deepcopy__(self, memo: dict[int, Any]) -> "Handle":
        """A copied model gets a handle of its own; a part that is copied alone (PEFT does that) stays with this one."""
        if id(self.model) not in memo:
            return self
        copied = memo[id(self)] = object.__new__(Handle)
        copied.__dict__ |= copy.deepcopy(self.__dict__, memo)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"mesh": None}  # process groups cannot be pickled; `check_changes` says what to do

    def undo(self) -> None:
        """Give the model its own attention, mask, loss and layers back. Without effect the second time."""
        model = self.model
        if model.__dict__.get("_ringattn") is not self:
            return
        for hook in self._hooks:
            hook.remove()
        if self.memory is not None:
            self.memory.undo()
        if self._loss is not None:
            model.loss_function = self._loss
        else:
            model.__dict__.pop("_loss_function", None)
        for module in model.modules():
            module.__dict__.pop("_ringattn", None)
        take_back(model)
        take_exchange(model)
        set_attention(model, self._implementation)


def set_attention(model: Any, name: str) -> None:
    """Set the attention of the text decoder by name; a vision tower keeps its own."""
    wanted: Any = name
    for key in reversed(_path_to(model.config, model.config.get_text_config())):
        wanted = {key: wanted}
    model.set_attn_implementation(wanted)


def _path_to(config: Any, wanted: Any) -> list[str]:
    """Keys of sub-configurations that lead from `config` to `wanted`, the outermost first."""
    if config is wanted:
        return []
    for key in config.sub_configs:
        inner = getattr(config, key, None)
        if inner is not None and (inner is wanted or _contains(inner, wanted)):
            return [key, *_path_to(inner, wanted)]
    raise NotImplementedError(f"{type(config).__name__} does not list its {type(wanted).__name__} as a sub-config")


def _contains(config: Any, wanted: Any) -> bool:
    """Whether `wanted` is a sub-configuration of `config`, at any depth."""
    inner = [getattr(config, key, None) for key in config.sub_configs]
    return any(part is wanted or (part is not None and _contains(part, wanted)) for part in inner)

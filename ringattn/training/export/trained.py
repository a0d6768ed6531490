"""The trained weights of a run, one by one: from its checkpoint, and frozen ones from where they came."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from ringattn.training.checkpoint.saved_state import SavedState
from ringattn.training.checkpoint.snapshot import below
from ringattn.training.engines.interface import STATE
from ringattn.training.export.flat import FlatPieces
from ringattn.training.export.run_folder import RunFolder
from ringattn.training.model.models import build_model, empty_model
from ringattn.training.model.streamed import streamed_weights

# DeepSpeed's own name for what holds the weights, of a run without tensor parallelism.
_OF_DEEPSPEED = "mp_rank_00_model_states.pt"
_FACTORS = ("lora_A.default.weight", "lora_B.default.weight")
_OF_EMBEDDING = ("lora_embedding_A.default", "lora_embedding_B.default")


class TrainedWeights:
    """Tensors of the trained model by their names in it, LoRA's factors beside their base. Nothing is kept.

    Raises ValueError where the checkpoint does not hold them, or frozen ones cannot be had any more.
    """

    def __init__(self, run: RunFolder) -> None:
        frozen = list(run.cfg["model"].get("freeze") or ())
        self.model = empty_model(run.model_config, run.lora, frozen)
        self.plain = empty_model(run.model_config)
        self.lora = run.lora
        self._state = self.model.state_dict(keep_vars=True)
        self._trained = _trained_of(run, self.model)
        self._held = self._trained.names()
        missing = [name for name in unique(self._state) if not self._held & aliases(self._state, name)]
        self._base = _base_of(run, missing, frozen)

    def names(self) -> list[str]:
        """Of the plain model, tied ones once."""
        return unique(self.plain.state_dict(keep_vars=True))

    def factors(self) -> list[str]:
        """Of LoRA, in the model."""
        return [name for name in self._state if ".lora_" in name]

    def of(self, name: str) -> Tensor:
        """A tensor of the trained model, as it was held in training."""
        same = aliases(self._state, name)
        if found := sorted(same & self._held):
            return self._trained.whole(found[0])
        assert self._base is not None
        return self._base[sorted(same)[0]]

    def merged(self, name: str) -> Tensor:
        """A tensor of the plain model, the product of its factors added."""
        layer, _, own = name.rpartition(".")
        between = f"{layer}.base_layer.{own}"
        if between not in self._state:
            return self.of(name)
        base = self.of(between)
        if own != "weight":
            return base
        assert self.lora is not None
        scale = self.lora.alpha / self.lora.rank
        first, second = (self.of(f"{layer}.{end}").float() for end in self._ends(layer))
        product = second @ first
        product = product if product.shape == base.shape else product.T  # those of an embedding lie crosswise
        return (base.float() + scale * product).to(base.dtype)

    def check_merge(self) -> None:
        """Raises ValueError for factors that cannot be merged into the weights of the plain model."""
        plain, end = self.plain.state_dict(keep_vars=True), ".base_layer.weight"
        for layer in (name.removesuffix(end) for name in self._state if name.endswith(end)):
            if not all(f"{layer}.{one}" in self._state for one in self._ends(layer)):
                raise ValueError(f"the factors of {layer} cannot be merged: they are of no linear layer or embedding")
            if len(aliases(plain, f"{layer}.weight")) > 1:
                raise ValueError(
                    f"the factors of {layer} cannot be merged: its weight is tied to another layer's, which has other "
                    "factors or none; export with --adapter"
                )

    def _ends(self, layer: str) -> tuple[str, str]:
        return _OF_EMBEDDING if f"{layer}.{_OF_EMBEDDING[0]}" in self._state else _FACTORS


class _Base(Protocol):
    def __getitem__(self, name: str) -> Tensor: ...


class _Streamed:
    def __init__(self, weights: Any) -> None:
        self._weights = weights

    def __getitem__(self, name: str) -> Tensor:
        found: Tensor = self._weights.rows(name)
        return found


def _base_of(run: RunFolder, missing: Iterable[str], frozen: list[str]) -> _Base | None:
    """Where weights come from that the checkpoint does not hold; None where it holds all."""
    missing = list(missing)
    if not missing:
        return None
    model, seed = run.cfg["model"], run.cfg["run"]["seed"]
    if not (model.get("lora") or frozen):
        raise ValueError(f"the checkpoint of step {run.state.step} does not hold {missing[0]}: it is of another model")
    try:
        streamed = streamed_weights(run.model_config, seed, run.base, run.lora)
        if streamed is not None:
            return _Streamed(streamed)
        allow = list(model.get("allow_mismatch") or ())
        return build_model(run.model_config, seed, run.base, allow, run.lora).state_dict()
    except (ValueError, OSError) as error:
        raise ValueError(f"the frozen weights of the run cannot be had: {error}") from None


def _trained_of(run: RunFolder, model: nn.Module) -> "_Trained":
    """What the engine saved of the weights. Raises ValueError where that is not known."""
    stage = run.cfg["engine"].get("zero_stage")
    if run.state.engine == "fsdp2":
        return _ByName(run.saved, (STATE, "model"))
    if run.state.engine == "deepspeed" and stage in (1, 2):
        return _ByName(run.saved, (STATE, _OF_DEEPSPEED, "module"))
    if run.state.engine == "deepspeed" and stage == 3:
        return FlatPieces(run.saved, model, run.state.world_size)
    raise ValueError(
        f"the checkpoint was written by engine={run.state.engine} with engine.zero_stage={stage}; engine=fsdp2, and "
        "deepspeed with zero_stage 1, 2 and 3, can be exported"
    )


class _Trained(Protocol):
    def names(self) -> set[str]: ...

    def whole(self, name: str) -> Tensor: ...


class _ByName:
    """Weights that stand in the checkpoint by their names, below some keys."""

    def __init__(self, saved: SavedState, place: tuple[str, ...]) -> None:
        self._saved, self._place = saved, place

    def names(self) -> set[str]:
        return set(self._saved.names(*self._place))

    def whole(self, name: str) -> Tensor:
        return self._saved.whole(below("/".join(self._place), name))


def unique(state: Mapping[str, Tensor]) -> list[str]:
    """Names of a state, of tensors with several names the first."""
    first: dict[int, str] = {}
    for name, tensor in state.items():
        first.setdefault(id(tensor), name)
    return list(first.values())


def aliases(state: Mapping[str, Tensor], name: str) -> set[str]:
    """All names of a tensor."""
    return {other for other, tensor in state.items() if tensor is state[name]}

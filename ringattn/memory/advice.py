"""What to change when a step does not fit: the next key, cheapest in time first, and what it saves.

The numbers are rounded arithmetic from shapes, good enough to tell gibibytes from megabytes; nothing is measured.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ringattn.memory.settings import Keep, MemorySettings, StateSettings

TILE = 2048  # tokens, to begin with
LEAST_TILE = 512
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
# Where a layer keeps less: what to try instead.
LESS: dict[Keep, Keep] = {"all": "selective", "selective": "attention", "attention": "layer"}


@dataclass(frozen=True)
class Load:
    """What a rank computes, as far as memory goes.

    Arguments:
        tokens: of a rank.
        hidden, inner, words: widths of hidden states, of the MLP's inner rows (gate and up each) and of logits.
        queries, keys: widths of queries and of keys, all heads.
        layers: of the model.
        parameters: of the whole model.
        gpus: that share them.
        width: bytes of an element of a hidden state.
    """

    tokens: int
    hidden: int
    inner: int
    words: int
    queries: int
    keys: int
    layers: int
    parameters: int
    gpus: int
    width: int

    @classmethod
    def of(cls, config: Any, tokens: int, parameters: int, gpus: int, width: int = 2) -> "Load":
        """From a model's transformers configuration."""
        text = config.get_text_config()
        heads = text.num_attention_heads
        head = getattr(text, "head_dim", None) or text.hidden_size // heads
        return cls(
            tokens=tokens,
            hidden=text.hidden_size,
            inner=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
            words=text.vocab_size,
            queries=heads * head,
            keys=(getattr(text, "num_key_value_heads", None) or heads) * head,
            layers=text.num_hidden_layers,
            parameters=parameters,
            gpus=gpus,
            width=width,
        )

    def kept(self, keep: Keep) -> int:
        """Bytes that a layer keeps for its backward pass."""
        attention = self.hidden + self.queries
        selective = attention + self.queries + 2 * self.keys + self.hidden
        elements = {"layer": self.hidden, "attention": attention, "selective": selective}
        # What autograd saves beside: norms' outputs, q and k before rotary positions, four inner rows.
        elements["all"] = selective + 2 * self.hidden + self.queries + self.keys + 4 * self.inner
        return elements[keep] * self.tokens * self.width


@dataclass(frozen=True)
class Change:
    """Arguments:
    keys: what to write, as `memory.loss_tile=2048`.
    saves: bytes of a GPU, about.
    """

    keys: str
    saves: int

    def __str__(self) -> str:
        return f"{self.keys} saves about {self.saves / 2**30:.1f} GiB a GPU"


def changes(settings: MemorySettings, states: StateSettings, load: Load) -> list[Change]:
    """All that is left to change, cheapest in time first; the last one is more GPUs."""
    return [change for change in _changes(settings, states, load) if change.saves > 0]


def next_change(settings: MemorySettings, states: StateSettings, load: Load, wanted: int = 0) -> Change:
    """The first change that saves as many bytes as were wanted; if none does, the one that saves most."""
    left = changes(settings, states, load)
    return next((one for one in left if one.saves >= wanted), max(left, key=lambda one: one.saves))


def _changes(settings: MemorySettings, states: StateSettings, load: Load) -> Iterator[Change]:
    # Logits in three float32 copies: themselves, their softmax, their gradient.
    yield from _tiled("loss_tile", settings.loss_tile, load.tokens, 12 * load.words)
    yield from _tiled("mlp_tile", settings.mlp_tile, load.tokens, 3 * load.inner * load.width)
    kept = load.kept(settings.keep)
    here = load.layers - settings.host_layers
    if settings.keep in ("all", "selective"):
        less = LESS[settings.keep]
        yield Change(f"memory.keep={less}", here * (kept - load.kept(less)))
    elif here:
        host = load.layers * kept // settings.every
        yield Change(f"memory.host_layers={load.layers} memory.host_bytes={host}", here * kept // settings.every)
    weights, moments = BYTES[states.weights], BYTES[states.moments]
    held = load.parameters * (2 * weights + 2 * moments) // load.gpus
    if states.states_on == "device":
        yield Change("memory.states_on=host", held)
    if settings.keep == "attention":
        yield Change("memory.keep=layer", here * (kept - load.kept("layer")) // settings.every)
    if settings.keep == "layer" and here:
        yield Change(f"memory.every={2 * settings.every}", here * kept // (2 * settings.every))
    on_device = held if states.states_on == "device" else 0
    yield Change(f"{2 * load.gpus} GPUs instead of {load.gpus}", (here * kept // settings.every + on_device) // 2)


def _tiled(key: str, tile: int | None, tokens: int, each: int) -> Iterator[Change]:
    """Arguments:
    each: bytes of a token.
    """
    now = tokens if tile is None else min(tile, tokens)
    smaller = TILE if now > TILE else max(now // 2, LEAST_TILE)
    if smaller < now:
        yield Change(f"memory.{key}={smaller}", (now - smaller) * each)

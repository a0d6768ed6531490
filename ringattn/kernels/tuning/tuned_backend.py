"""Which backend does a call fastest at the lengths of a batch: `registry.choose`, corrected by measurement.

"auto" asks backends in a fixed order. Which is fastest depends on the shape too: at head dim 64, or with many short
documents, the order may be another one on this device. FlexAttention also gets the tile sizes that were measured.
"""

from collections.abc import Sequence
from functools import cache

import torch.distributed as dist

from ringattn.environment import BACKEND
from ringattn.kernels.backends.flex import FlexAttention
from ringattn.kernels.registry import backends, choose, refusal
from ringattn.kernels.selftest import failure
from ringattn.kernels.spec import Backend, CallSpec
from ringattn.kernels.tuning.measured import MeasuredCall
from ringattn.kernels.tuning.tiles import Tile, tiles_here
from ringattn.kernels.tuning.tuner import Choice, Problem, Tuner


@cache
def tuner() -> Tuner:
    """The one of this process, with the environment's policy and folder."""
    return Tuner()


def tuned_backend(
    spec: CallSpec, lengths: Sequence[int], name: str = "auto", group: dist.ProcessGroup | None = None
) -> Backend:
    """The backend for a call over documents of these lengths; one that is named, here or by RINGATTN_BACKEND, stays.

    Arguments:
        lengths: of the documents of the whole batch, the same on every rank.
        group: ranks that must take the same backend; the first call for a shape is then collective.

    Raises what `registry.choose` raises, before any communication.
    """
    chosen = choose(spec, name)
    if name == "auto" and BACKEND.read() == "auto":
        chosen = backends()[tuner().select(backend_problem(spec, lengths), group=group)["backend"]]
    if isinstance(chosen, FlexAttention) and not chosen.eager:
        return _flex_of(tuner().select(flex_problem(spec, lengths), group=group)) or chosen
    return chosen


def backend_problem(spec: CallSpec, lengths: Sequence[int]) -> Problem:
    """The choice of a backend. The reference is only for calls that nothing else can do."""
    case = MeasuredCall(spec, lengths)

    def default() -> Choice:
        return {"backend": choose(spec).name}

    def candidates() -> list[Choice]:
        if default()["backend"] == "reference" or not case.tokens:
            return [default()]
        return [{"backend": name} for name in backends() if name != "reference"]

    def check(choice: Choice) -> str | None:
        backend = backends().get(str(choice.get("backend")))
        return refusal(backend, spec) if backend is not None else "there is no such backend"

    key = case.key("backend", backends=",".join(backends()))
    return Problem(key, candidates, default, check, lambda choice: case.run(backends()[choice["backend"]]), spec.device)


def flex_problem(spec: CallSpec, lengths: Sequence[int]) -> Problem:
    """The choice of FlexAttention's tile; the empty one is torch's own."""
    case = MeasuredCall(spec, lengths)
    own = FlexAttention()

    def candidates() -> list[Choice]:
        fitting = tiles_here(spec, case.longest) if case.tokens else []
        return [{}, *(tile.choice() for tile in fitting)]

    def check(choice: Choice) -> str | None:
        backend = _flex_of(choice) or own
        return refusal(own, spec) or failure(backend, spec)

    def run(choice: Choice) -> None:
        case.run(_flex_of(choice) or own)

    return Problem(case.key("flex"), candidates, lambda: {}, check, run, spec.device)


def _flex_of(choice: Choice) -> FlexAttention | None:
    """FlexAttention with a tile; None for torch's own choice."""
    return _with_tile(Tile(**choice)) if choice else None


@cache
def _with_tile(tile: Tile) -> FlexAttention:
    backend = FlexAttention(kernel_options=tile.kernel_options())
    backend.name = f"flex {tile}"  # its self-test is its own
    return backend

"""The tuner's choice of backends and tiles: only right ones are timed, and the fastest is used."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ringattn.kernels import registry
from ringattn.kernels.backends.cpu import CpuFlash
from ringattn.kernels.spec import CallSpec
from ringattn.kernels.tuning import tuned_backend
from ringattn.kernels.tuning.measured import MeasuredCall
from ringattn.kernels.tuning.store import Store
from ringattn.kernels.tuning.tiles import Tile
from ringattn.kernels.tuning.tuner import Event, Key, Tuner

SPEC = CallSpec("cpu", torch.float32, 16, 16, 4, 2)


class WrongBackward(CpuFlash):
    """Fast, and its value gradient is off by a factor."""

    name = "wrong"

    def backward(self, *args: Any) -> None:
        super().backward(*args)
        args[-1].dv.mul_(1.1)


class Twin(CpuFlash):
    name = "twin"


@pytest.fixture
def three_backends(monkeypatch: pytest.MonkeyPatch, fresh_caches: None, tmp_path: Path) -> Path:
    """Backends that run here, one of them wrong, and a tuner that measures."""
    found = {backend.name: backend for backend in (WrongBackward(), Twin(), CpuFlash(), registry.Reference())}
    for module in (registry, tuned_backend):
        monkeypatch.setattr(module, "backends", lambda: found)
    monkeypatch.setattr(tuned_backend, "choose", lambda spec, name="auto": found["cpu" if name == "auto" else name])
    monkeypatch.setattr(tuned_backend, "tuner", lambda: Tuner(Store(tmp_path), "on"))
    monkeypatch.delenv("RINGATTN_BACKEND", raising=False)
    return tmp_path


def test_a_backend_with_a_wrong_backward_is_not_measured(three_backends: Path) -> None:
    events: list[Event] = []
    tuner = Tuner(Store(three_backends), "on", [events.append])
    best = tuner.select(tuned_backend.backend_problem(SPEC, [64, 64]))
    kinds = {event.choice["backend"]: event for event in events if event.choice and event.kind in ("refused", "timed")}
    assert kinds["wrong"].kind == "refused"
    assert "dv" in kinds["wrong"].detail
    assert kinds["twin"].kind == kinds["cpu"].kind == "timed"
    assert best["backend"] in ("twin", "cpu")


def test_a_measured_backend_is_used_and_a_named_one_is_taken_as_it_is(three_backends: Path) -> None:
    key = str(tuned_backend.backend_problem(SPEC, [64, 64]).key)
    Store(three_backends).write(key, {"choice": {"backend": "twin"}})
    assert tuned_backend.tuned_backend(SPEC, [64, 64]).name == "twin"
    assert tuned_backend.tuned_backend(SPEC, [64, 64], name="cpu").name == "cpu"


@pytest.mark.parametrize("stored", [{"backend": "wrong"}, {"backend": "gone"}, {}, "twin"])
def test_what_the_disk_says_is_checked_too(three_backends: Path, stored: Any) -> None:
    store = Store(three_backends)
    store.write(str(tuned_backend.backend_problem(SPEC, [64]).key), {"choice": stored})
    assert Tuner(store, "off").select(tuned_backend.backend_problem(SPEC, [64])) == {"backend": "cpu"}


def test_empty_documents_take_the_default(three_backends: Path) -> None:
    assert tuned_backend.tuned_backend(SPEC, [0, 0]).name == "cpu"
    assert tuned_backend.tuned_backend(SPEC, []).name == "cpu"


def test_keys_have_no_seed_and_no_value_that_changes_no_speed() -> None:
    def key(lengths: list[int], **changes: Any) -> Key:
        return tuned_backend.backend_problem(CallSpec(**SPEC.__dict__ | changes), lengths).key

    same = key([512, 300])
    assert key([513, 301]) == same
    torch.manual_seed(1)
    assert key([512, 300]) == same
    assert key([512, 300], softcap=20.0, dropout_p=0.1) == key([512, 300], softcap=30.0, dropout_p=0.2) != same
    others = [key([512, 300], **change) for change in ({"head_dim": 32}, {"dtype": torch.bfloat16}, {"window": True})]
    assert len({same, key([64] * 13), key([64]), *others}) == 6
    assert {"device", "torch", "schema"} <= {name for name, _ in same.facts}


def cost(options: dict[str, int], quick: Tile) -> float:
    return 1.0 if options == quick.kernel_options() else 2.0


class TiledFlex(CpuFlash):
    """Stands for FlexAttention where it cannot run: tiles of three stages are wrong, one is quick."""

    eager = False

    def __init__(self, kernel_options: dict[str, int] | None = None) -> None:
        self.name, self.options = "flex", kernel_options or {}

    def forward(self, *args: Any) -> torch.Tensor:
        lse = super().forward(*args)
        return lse + (self.options.get("num_stages") == 3)


def test_a_tile_with_wrong_numbers_is_not_taken(monkeypatch: pytest.MonkeyPatch, fresh_caches: None) -> None:
    """The others are timed, and the quickest becomes the backend's."""
    quick = Tile(64, 64, 2, 4)
    monkeypatch.setattr(tuned_backend, "FlexAttention", TiledFlex)
    monkeypatch.setattr(
        tuned_backend, "tiles_here", lambda spec, longest: [Tile(128, 64, 3, 4), quick, Tile(64, 64, 1, 4)]
    )
    monkeypatch.setattr(tuned_backend, "choose", lambda spec, name: TiledFlex())
    ran: list[dict[str, int]] = []
    monkeypatch.setattr(MeasuredCall, "run", lambda self, backend: ran.append(backend.options))
    events: list[Event] = []
    tuner = Tuner(None, "on", [events.append], lambda run, device: run() or cost(ran[-1], quick))
    monkeypatch.setattr(tuned_backend, "tuner", lambda: tuner)
    spec = CallSpec("cpu", torch.float32, 16, 16, 4, 2)
    backend: Any = tuned_backend.tuned_backend(spec, [64], name="flex")
    assert backend.options == quick.kernel_options()
    assert [event.kind for event in events] == ["timed", "refused", "timed", "timed", "measured"]
    assert ran[0] == {}  # torch's own choice is a candidate

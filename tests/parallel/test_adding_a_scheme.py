"""The scheme of docs/adding-a-scheme.md, taken from the page: two files make it planned, priced, drawn and exact."""

import importlib.util
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from ringattn import Documents, Layout, Mask, MeshShape
from ringattn.cli import main
from ringattn.drawing import mask_image
from ringattn.parallel.machine.shipped import SHIPPED
from ringattn.parallel.plan.shape import Shape
from ringattn.parallel.planning.all_ranks import plan_group
from ringattn.parallel.planning.planner import plan_attention
from ringattn.parallel.pricing.memory import buffer_bytes
from ringattn.parallel.pricing.plan_cost import plan_cost
from ringattn.parallel.pricing.pricer import Pricer
from ringattn.parallel.pricing.setting import PriceInputs
from ringattn.parallel.schedules import candidates
from ringattn.parallel.simulation.simulate import simulate
from ringattn.settings import AttentionOptions
from tests.dense import Case
from tests.parallel.execution.test_executor import assert_close
from tests.parallel.ranks import attend
from tests.pool import Pools
from tests.strategies import MASKS

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-scheme.md"
H200, SHAPE = SHIPPED["H200"], Shape(32, 8, 128, 128)
PARITY = AttentionOptions(scheme="parity", keep_keys=False)


def blocks() -> list[str]:
    """The code of the page: the planner's file, the list of candidates, and what tests it without a GPU."""
    return re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


@contextmanager
def added(folder: Path) -> Iterator[type]:
    """The scheme, in a file of its own and in the list of candidates."""
    path = folder / "parity.py"
    path.write_text(blocks()[0])
    spec = importlib.util.spec_from_file_location("ringattn.parallel.schedules.parity", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    before, names = list(candidates.SCHEDULES), {**vars(candidates), "Parity": module.Parity}
    exec(blocks()[1], names)
    candidates.SCHEDULES[:] = names["SCHEDULES"]
    try:
        assert [*before, module.Parity] == candidates.SCHEDULES
        yield module.Parity
    finally:
        candidates.SCHEDULES[:] = before
        del sys.modules[spec.name]


@pytest.fixture
def parity(tmp_path: Path) -> Iterator[type]:
    with added(tmp_path) as scheme:
        yield scheme


def test_it_is_short() -> None:
    assert len(blocks()[0].splitlines()) < 60


@pytest.mark.usefixtures("parity")
def test_the_page_tests_it(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    for block in blocks()[2:]:
        exec(block, names)
    printed = capsys.readouterr().out
    assert "parity on ring position 1 of 4" in printed
    assert "stage 2" in printed


def test_it_is_priced_drawn_and_simulated(parity: Any) -> None:
    (placement,) = Layout(Documents([9000, 700, 4000]), MeshShape(1, 4)).parts
    inputs = PriceInputs(H200, SHAPE, keep_keys=False)
    plans = plan_group(placement, SHAPE, PARITY, H200)
    assert {(plan.schedule, len(plan.stages)) for plan in plans} == {("parity", 3)}
    assert all(message.peer % 2 != plan.ring_rank % 2 for plan in plans for message in plan.stages[1].receives)
    cost = plan_cost(H200, plans, SHAPE)
    forward, backward = Pricer.of(placement, Mask(), inputs).price(parity())
    assert forward.seconds == pytest.approx(cost.forward.seconds, rel=1e-12)
    assert backward.seconds == pytest.approx(cost.backward.seconds, rel=1e-12)
    for rank, plan in enumerate(plans):
        assert buffer_bytes(plan, SHAPE) == max(forward.bytes[rank], backward.bytes[rank])
    owner, when = mask_image(plans, (0, 600), 600)
    assert set(when[owner >= 0].ravel()) <= {0, 1, 2}
    assert (owner >= 0).sum() == 600 * 601 // 2
    for done in (simulate(H200, plans, SHAPE, backward) for backward in (False, True)):
        assert done.seconds > 0
        assert {span.stage for span in done.spans if span.kind == "cast"} == {1, 2}


@pytest.mark.usefixtures("parity")
def test_it_may_be_named_and_is_chosen_from(capsys: pytest.CaptureFixture[str]) -> None:
    layout = Layout(Documents([65_536]), MeshShape(1, 8))
    assert "parity" in plan_attention(layout, SHAPE).reason
    assert plan_attention(layout, SHAPE, PARITY).schedule == "parity"
    with pytest.raises(ValueError, match='scheme="parity" moves keys on the ring axis and needs ring > 1'):
        plan_attention(Layout(Documents([64]), MeshShape(1, 1, 2)), SHAPE, PARITY)
    assert main(["plan", "--scheme", "parity", "--ring", "4", "--tokens", "65536"]) == 0
    assert "parity forward, parity backward" in capsys.readouterr().out


def test_without_its_row_it_is_refused() -> None:
    words = r"scheme must be one of auto, ring, ulysses, hybrid, gather, joint, got 'parity'"
    with pytest.raises(ValueError, match=words):
        plan_attention(Layout(Documents([64]), MeshShape(1, 2)), SHAPE, PARITY)


def attend_by_parity(folder: str, case: Case, ring: int, ulysses: int) -> dict[str, torch.Tensor]:
    """In a worker, which has a list of candidates of its own."""
    own = Path(folder) / str(torch.distributed.get_rank())
    own.mkdir(exist_ok=True)
    with added(own):
        return attend(case, ring, ulysses, "auto", "parity")


@pytest.mark.parametrize(("ring", "ulysses"), [(4, 1), (2, 2)])
@pytest.mark.parametrize("mask", MASKS[:5], ids=str)
def test_it_is_exact_on_processes(pool: Pools, tmp_path: Path, ring: int, ulysses: int, mask: Mask) -> None:
    case = Case(Documents([150, 3, 0, 61], total=230), mask, (4, 2))
    assert_close(pool(4).run(attend_by_parity, str(tmp_path), case, ring, ulysses), case)

"""A step that is computed twice changes nothing, and tells where the two differ."""

from pathlib import Path

import pytest

pytest.importorskip("transformers")

from ringattn.training.checks.recomputing import FirstTime, SilentFault, check_same
from ringattn.training.engines.deepspeed import available as deepspeed_available
from ringattn.training.loss import Brought
from ringattn.training.report.records import read_metrics
from tests.training import fault_rows
from tests.training.checks.test_bad_numbers import SMALL
from tests.training.recipe import prepared


def test_what_differs_by_more_than_rounding_is_told(tmp_path):
    then = Brought(2.0, 1.0, False)
    same, other = "on the same ranks", "on another replica"
    check_same(tmp_path, 3, FirstTime(2.0, 1.0, same), then, True)
    check_same(tmp_path, 3, FirstTime(2.0 + 1e-6, 1.0001, other), then, True)  # added up in another order
    check_same(tmp_path, 3, FirstTime(2.0, None, same), then, True)
    nan = float("nan")
    check_same(tmp_path, 3, FirstTime(nan, nan, same), Brought(nan, nan, False), True)


def told(output: Path, first: FirstTime, exact: bool) -> str:
    with pytest.raises(SilentFault) as caught:
        check_same(output, 3, first, Brought(2.0, 1.0, False), exact)
    return str(caught.value)


def test_more_is_refused(pool, tmp_path):
    same, other = "on the same ranks", "on another replica"
    assert "its loss is 2.000001 the first time" in pool(1).run(told, tmp_path, FirstTime(2.000001, 1.0, same), True)[0]
    assert "its gradient norm is 1.1" in pool(1).run(told, tmp_path, FirstTime(2.0, 1.1, other), True)[0]
    assert "its loss is nan" in pool(1).run(told, tmp_path, FirstTime(float("nan"), 1.0, other), False)[0]


def losses(output, *overrides: str) -> list[tuple[float, float]]:
    from ringattn.training.loop import Trainer

    trainer = Trainer(prepared(f"run.output={output}", *SMALL, *overrides, ranks=2))
    with trainer._batches() as stream:
        return [trainer._train_step(next(stream))[:2] for _ in range(4)]


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param((), marks=pytest.mark.slow),
        ("parallel.data=2",),
        pytest.param(
            ("engine=deepspeed", "engine.zero_stage=1"),
            marks=[pytest.mark.slow, pytest.mark.skipif(not deepspeed_available(), reason="no deepspeed")],
        ),
        pytest.param(
            ("engine=deepspeed", "engine.zero_stage=3", "parallel.data=2"),
            marks=[pytest.mark.slow, pytest.mark.skipif(not deepspeed_available(), reason="no deepspeed")],
        ),
    ],
    ids=" ".join,
)
def test_the_curve_is_the_same(pool, tmp_path, overrides):
    plain = pool(2).run(losses, tmp_path, *overrides)
    assert pool(2).run(losses, tmp_path, *overrides, "run.recompute_every=2") == plain


@pytest.mark.slow
@pytest.mark.parametrize(("data", "where"), [(1, "on the same ranks"), (2, "on another replica")])
def test_a_silent_fault_is_found(data, where, tmp_path):
    found = fault_rows.silent_fault(tmp_path, f"parallel.data={data}")
    assert set(found.codes) == {1}
    assert "step 6 was computed twice and its loss is" in found.said
    assert where in found.said
    assert found.seconds < 20
    assert found.steps_lost == 1
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 5

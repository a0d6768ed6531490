"""Losses that jump are seen against the median before them, and a run can go back and pass them over."""

import json

import pytest

pytest.importorskip("transformers")

from ringattn.training.checks.bad_numbers import BadNumbers
from ringattn.training.checks.spikes import FEWEST, Spikes
from ringattn.training.health.incidents import read_incidents
from ringattn.training.report.records import read_metrics
from tests.training import fault_rows


def test_a_spike_is_seen_against_the_median_before_it():
    spikes = Spikes(2.0)
    for step in range(FEWEST):
        assert spikes.median_before(step, 100.0 if step == 0 else 3.0) is None
    assert spikes.median_before(20, 5.9) is None
    assert spikes.median_before(21, 6.1) == 3.0
    assert spikes.median_before(22, 6.1) == 3.0  # the spike before it is not what is usual
    assert Spikes(0.0).median_before(1, 1e9) is None


def test_a_run_that_went_on_judges_as_if_it_had_not_stopped():
    records = [{"step": step, "loss": 3.0} for step in range(1, 20)] + [{"step": 20, "loss": None}]
    assert Spikes(2.0, records).median_before(21, 7.0) == 3.0
    spikes = Spikes(2.0, records)
    spikes.back_to(FEWEST - 1, 1)
    assert spikes.median_before(FEWEST, 7.0) is None  # too few are left to judge by
    with pytest.raises(BadNumbers, match="went 1 times back to step 7"):
        spikes.back_to(FEWEST - 1, 1)


@pytest.mark.slow
def test_a_run_goes_back_and_passes_a_spike_over(tmp_path):
    common = ["run.save_every=4", "run.steps=16", "run.spike=1.5", "run.on_spike=skip"]
    codes, _, said = fault_rows.run_with(tmp_path / "run", common, faults=dict.fromkeys(range(2), raise_a_loss))
    assert codes == [0, 0], said
    (incident,) = read_incidents(tmp_path / "run")
    assert (incident["kind"], incident["step"]) == ("loss-spike", 11)
    assert "back to step 8, and on with the data after step 11" in incident["message"]
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 17))
    assert max(record["loss"] for record in records) < 6
    marker = json.loads((tmp_path / "run" / "checkpoints" / "step-00000016" / "complete.json").read_text())
    # Three batches more than its steps need are used up: 19 of two packs.
    assert marker["tokens"] == 16 * 2 * 384
    assert records[-1]["epoch"] == pytest.approx(records[7]["epoch"] * 19 / 8, rel=1e-6)


def raise_a_loss() -> None:
    """The loss of the first try of step 11 is three times what it is."""
    from ringattn.training.loop import Trainer

    right, seen = Trainer._forward, set()

    def forward(self: Trainer, local, targets):
        loss = right(self, local, targets)
        if self.step == 10 and (len(seen) < 2 or id(local) in seen):
            seen.add(id(local))
            return loss * 3
        return loss

    Trainer._forward = forward  # type: ignore[method-assign]

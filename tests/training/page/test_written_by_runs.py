"""What a run writes for the page: started as users start it, killed, and started again."""

import json

import pytest

pytest.importorskip("transformers")

from ringattn.training.page.folder import RunFolder
from ringattn.training.page.write import page_text
from ringattn.training.report.traces import read_trace
from tests.training.recipe import started

SMALL = ["model.config.hidden_size=32", "model.config.intermediate_size=48", "model.config.num_attention_heads=4"]
SMALL += ["data.seq_len=128", "run.save_every=2", "run.log_every=1"]


@pytest.mark.slow
def test_a_run_writes_its_page_and_the_trace_it_was_asked_for(tmp_path):
    """In two goes: the second one adds its start, and a window that lies before it records nothing."""
    output = tmp_path / "run"
    asked = [*SMALL, f"run.output={output}", "run.steps=4", "run.report=true", "run.trackers=[tensorboard]"]
    code, out, err = started(tmp_path, *asked, "run.profile=[2,3]")
    assert code == 0, out + err
    assert f"report: {output / 'report.html'}" in out
    assert '<span class="state done">done</span>' in (output / "report.html").read_text()
    names = {event.get("name") for event in read_trace(output / "profile" / "trace-rank0.json.gz")}
    assert {"step 2", "step 3"} <= names
    assert not {"step 1", "step 4"} & names
    assert RunFolder(output).state.word == "done"
    code, out, err = started(tmp_path, *asked[:-3], "run.steps=6", "run.resume=force", "run.profile=[1,4]")
    assert code == 0, out + err
    record = json.loads((output / "run.json").read_text())
    assert [start["step"] for start in record["starts"]] == [0, 4]
    assert sum(record["attention"]["lengths"]) == 128
    text = page_text(RunFolder(output))
    for part in ("6 of 6", "data 1 × ring 1 × ulysses 1", "profile/trace-rank0.json.gz"):
        assert part in text
    assert sorted(path.name for path in (output / "profile").iterdir()) == ["summary-rank0.json", "trace-rank0.json.gz"]

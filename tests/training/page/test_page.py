"""The page of a run: whole, half, without numbers, with broken lines; without secrets; and as Chromium shows it."""

import errno
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ringattn import Documents, Layout, MeshShape
from ringattn.cli import main
from ringattn.training.data.corpus import corpus_of
from ringattn.training.health.incidents import Ending, record_incident, write_ending
from ringattn.training.page.charts import Axis, Curve, bars, chart, thinned
from ringattn.training.page.folder import RunFolder
from ringattn.training.page.record import _heads, data_numbers, versions, write_record
from ringattn.training.page.write import page_text, write_page
from tests.training.recipe import prepared

SECRET = "hf_abcdefghijklmnopqrstuvwx"
# The smallest PNG that there is: one pixel.
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c63606060000000040001f61738550000"
    "000049454e44ae426082"
)


def lines(count: int, **more: Any) -> list[dict[str, Any]]:
    return [
        {
            "step": step, "loss": 5.0 / step, "grad_norm": 1.0, "lr": 1e-3, "tokens_per_second": 1e4 + step, "mfu": 0.4,
            "peak_memory_gib": 2.5, "seconds": 0.5, "waited": 0.1, "tokens": 100 * step, "warmup": step == 1,
        } | more
        for step in range(1, count + 1)
    ]  # fmt: skip


def run_folder(folder: Path, steps: int = 20, total: int = 20, drawn: bool = False) -> Path:
    """A run with something of everything; the plan of its attention, which takes a second, only where it is `drawn`."""
    records = lines(steps)
    records[-1]["validation"] = {"books": 2.125, "<b>code</b>": 1.5}
    records[min(3, steps - 1)] |= {"skipped": True, "loss": None}
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    (folder / "config.yaml").write_text(f"run: {{steps: {total}}}\ndata: {{hf_token: {SECRET}}}\n")
    behind = {"rank": 1, "host": "node-7", "what": "own time", "seconds": 0.4, "median": 0.3, "percent": 33}
    (folder / "stragglers.jsonl").write_text(json.dumps({"step": 10, "behind": [behind]}) + "\n")
    record_incident(folder, "failed-save", "No space left <on> device", 0, token=SECRET)
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "needle.png").write_bytes(PIXEL)
    (folder / "evaluation" / "needle.json").write_text(json.dumps({"accuracy": [[1.0, 0.25]], "api_key": SECRET}))
    attention = {
        "lengths": [40, 24], "data": 1, "ring": 2, "ulysses": 1, "policy": "auto", "scheme": "auto", "query_heads": 4,
        "key_heads": 2, "head_dim": 8,
    }  # fmt: skip
    record = {
        "title": "tiny on books", "command": f"train.py token={SECRET}", "steps": total, "ranks": 2,
        "starts": [{"time": "2026-01-01T00:00:00+00:00", "step": 0, "ranks": 2}],
        "memory": {"items": {"weights": 2**30, "hidden states": 2**20}, "at": "layer 1", "room": 2**33, "host": {}},
        "data": data_numbers(corpus_of([np.zeros(n, np.uint8) for n in (1, 5, 6, 900)], 256)),
        "versions": {"torch": "2.99"}, "hardware": {"host": "node-0", "memory": 2**35},
        "attention": attention if drawn else {},
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def test_the_page_has_everything_and_needs_nothing_else(tmp_path):
    run = run_folder(tmp_path / "run", drawn=True)
    write_ending(run, Ending("done", False, "all 20 steps are done", 20))
    text = write_page(run).read_text()
    for part in (
        "tiny on books", "all 20 steps are done", "20 of 20", "2.1250", "0.4000", "node-7", "33 %", "failed-save",
        "No space left &lt;on&gt; device", "&lt;b&gt;code&lt;/b&gt;", "2.99", "1.00 GiB", "1.0 MiB", "layer 1", "0.25",
        "ring 2 × ulysses 1", "1 step was left out", "2026-01-01T00:00:00+00:00", "documents by length",
    ):  # fmt: skip
        assert part in text, part
    for title in ("Loss, nats", "Gradient norm", "Learning rate", "Tokens a second", "MFU", "Waiting for data"):
        assert f"<h3>{title}" in text, title
    assert "<b>code" not in text
    assert SECRET not in text
    assert text.count("data:image/png;base64,") == 4  # the evaluation and the plan, each shown and to be saved
    for target in re.findall(r'(?:src|href)="([^"]*)"', text):
        assert target.startswith(("data:", "#")), target
    assert not re.search(r"url\(|@import|<script", text)


def test_a_run_that_was_started_again_is_not_what_its_old_ending_says(tmp_path):
    run = run_folder(tmp_path / "run", steps=5)
    write_ending(run, Ending("failed", True, "rank 1 was killed", 2, time="2025-12-31T00:00:00+00:00"))
    state = RunFolder(run).state
    assert state.word == "open"
    assert "it runs or was killed" in state.why
    write_ending(run, Ending("failed", True, "rank 1 was killed", 4, time="2026-01-02T00:00:00+00:00"))
    assert RunFolder(run).state.word == "failed"
    assert "rank 1 was killed" in page_text(RunFolder(run))


def test_all_steps_without_an_ending_are_done(tmp_path):
    assert RunFolder(run_folder(tmp_path / "run")).state.word == "done"


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_run_that_has_hardly_begun_has_a_page(tmp_path, steps):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines(steps)))
    text = page_text(RunFolder(tmp_path))
    assert ("has no step yet" in text) == (steps == 0)
    assert "the run did not record its first pack" in text
    assert "Nothing was recorded" in text


def test_lines_that_are_none_are_counted_and_the_others_shown(tmp_path):
    run = run_folder(tmp_path / "run")
    good = (run / "metrics.jsonl").read_text()
    bad = '[1]\n{"step": 21, "lo\n{"step": 22, "loss": NaN, "lr": "x", "grad_norm": true, "validation": [1]}\n\0\n'
    (run / "metrics.jsonl").write_text(bad + good)
    folder = RunFolder(run)
    assert folder.broken == 3
    assert len(folder.steps) == 21
    assert [step for step, _ in folder.series("loss")] == [step for step in range(1, 21) if step != 4]
    assert "3 lines of metrics.jsonl" in page_text(folder)


def test_models_without_heads_of_one_kind_are_recorded_without():
    assert _heads(SimpleNamespace(num_attention_heads=8, num_key_value_heads=None, hidden_size=64)) == {
        "query_heads": 8, "key_heads": 8, "head_dim": 8,
    }  # fmt: skip
    for text in (
        SimpleNamespace(),
        SimpleNamespace(num_attention_heads=[4, 8]),
        SimpleNamespace(num_attention_heads=0),
    ):
        assert _heads(text) == {}


@pytest.mark.parametrize(
    ("name", "contents"),
    [
        ("run.json", "[]"),
        ("run.json", '{"memory": 5, "data": {"histogram": [3, [1, 2]]}, "starts": {}, "hardware": null, "steps": "x"}'),
        ("run.json", '{"starts": [7], "attention": {"lengths": [5], "ring": 0}, "memory": {"items": {"a": "b"}}}'),
        ("config.yaml", "run: [\n"),
        ("exit.json", '{"state": "burnt"}'),
        ("metrics.jsonl", '{"step": 1, "loss": 1' + "0" * 400 + ', "lr": 1e308}\n{"step": 1' + "0" * 400 + "}\n"),
        ("metrics.jsonl", '{"step": 1, "loss": -1e199, "seconds": 0}\n{"step": 2, "loss": 1e199, "seconds": -1}\n'),
        ("stragglers.jsonl", '{"behind": [5, {}], "step": null}\n'),
        ("profile/summary-rank0.json", '{"steps": 5}'),
        ("evaluation/needle.png", "no picture"),
        ("evaluation/needle.json", "{"),
        ("incidents/x.json", '{"message": [1]}'),
    ],
)
def test_files_of_any_contents_leave_a_page(tmp_path, name, contents):
    run = run_folder(tmp_path / "run")
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).write_text(contents)
    assert "</html>" in page_text(RunFolder(run))


def test_the_command_refuses_what_is_no_run(tmp_path, capsys):
    for folder, why in ((tmp_path, "is not the folder of a run"), (tmp_path / "x", "which is no folder")):
        with pytest.raises(SystemExit) as ended:
            main(["report", str(folder)])
        assert ended.value.code == 2
        assert why in capsys.readouterr().err
    run = run_folder(tmp_path / "run")
    assert main(["report", str(run), "-o", str(tmp_path / "new" / "page.html")]) == 0
    assert (tmp_path / "new" / "page.html").read_text().endswith("</html>")
    assert not (run / "report.html").exists()


def test_a_full_disk_is_told_with_the_file_and_leaves_nothing(tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("{}")
    own = Path.write_text

    def full(path, text, **more):
        own(path, text[:100], **more)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as write does, without a name

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=r"No space left on device: .*report\.html"):
        write_page(run)
    assert [path.name for path in run.iterdir()] == ["config.yaml"]


def test_what_a_run_records_at_its_start(tmp_path):
    job = prepared(f"run.output={tmp_path / 'run'}", "data.seq_len=256")
    write_record(job, 0, 1234, Layout(Documents([200, 56]), MeshShape()))
    write_record(job, 7, 1234, Layout(Documents([256]), MeshShape()))
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [start["step"] for start in record["starts"]] == [0, 7]
    assert record["attention"]["lengths"] == [256]
    assert record["memory"]["items"] == job.plan.items
    assert record["data"]["documents"] == len(job.corpus)
    assert record["data"]["tokens"] == sum(row[3] for row in record["data"]["histogram"])
    assert record["versions"]["torch"] == versions()["torch"]
    assert "</html>" in page_text(RunFolder(tmp_path / "run"))


def test_lengths_are_counted_by_powers_of_two():
    numbers = data_numbers(corpus_of([np.zeros(n, np.uint8) for n in (0, 4, 7, 8, 33)], 256))
    assert numbers["histogram"] == [[4, 7, 2, 11], [8, 15, 1, 8], [16, 31, 0, 0], [32, 63, 1, 33]]
    assert (numbers["documents"], numbers["empty"], numbers["longest"]) == (5, 1, 33)
    assert data_numbers(corpus_of([], 256))["histogram"] == []


def test_thinned_curves_keep_every_spike():
    points = [(float(step), 100.0 if step == 3_333 else -5.0 if step == 7_000 else 1.0) for step in range(10_000)]
    few = thinned(points, 100)
    assert len(few) <= 100
    assert {100.0, -5.0} <= {y for _, y in few}
    assert [x for x, _ in few] == sorted(x for x, _ in few)


@pytest.mark.parametrize("values", [[1.0], [2.0, 2.0], [0.0, 0.0], [1e-9, 1e9], [-3.0, 4.0], [5e8, 5e8 + 1]])
def test_charts_of_any_values_stay_in_their_frame(values):
    svg = chart([Curve("x", list(enumerate(values)))], "step", str)
    for x, y in re.findall(r"([-\d.]+),([-\d.]+)", "".join(re.findall(r'points="([^"]*)"', svg))):
        assert 0 <= float(x) <= 440
        assert 0 <= float(y) <= 250
    assert "nan" not in svg
    assert 1 <= len(Axis(min(values), max(values), 0, 1, min(values) > 0).ticks(5)) <= 12


def test_pictures_of_nothing_are_none():
    assert chart([Curve("x", [])], "step", str) == bars([], "n", str) == bars([("a", 0, "")], "n", str) == ""


@pytest.mark.slow
@pytest.mark.parametrize("width", [500, 1400])
def test_chromium_shows_it_without_a_complaint_and_nothing_sticks_out(tmp_path, width):
    """What is wider than the page scrolls inside of itself, and no text of a picture runs out of it."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium")
    text = write_page(run_folder(tmp_path / "run", drawn=True)).read_text()
    script = """<script>
        const out = [...document.querySelectorAll('svg text')].filter(text => {
            const own = text.getBoundingClientRect(), all = text.closest('svg').getBoundingClientRect();
            return own.left < all.left - 1 || own.right > all.right + 1 || own.bottom > all.bottom + 1;
        }).map(text => text.textContent);
        const root = document.documentElement;
        document.body.innerHTML = JSON.stringify([root.scrollWidth - root.clientWidth, out, root.clientWidth]);
    </script>"""
    page = tmp_path / "looked-at.html"
    page.write_text(text.replace("</body>", script + "</body>"))
    found = []
    for file in (tmp_path / "run" / "report.html", page):
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        options += [f"--window-size={width},900", "--enable-logging=stderr", "--dump-dom"]
        done = subprocess.run([browser, *options, f"file://{file}"], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert "CONSOLE" not in done.stderr
        found.append(done.stdout)
    assert "What went wrong" in found[0]
    answer = re.search(r"<body>(\[.*\])", found[1])
    assert answer, found[1][-300:]
    more, outside, seen = json.loads(answer[1])
    assert seen <= width
    assert more <= 0
    assert outside == []


def test_evaluations_come_by_step_and_summaries_do_not_repeat_them(tmp_path):
    """`after` stands before `before` in the alphabet. A summary stays where a task has no file of its own."""
    for name, step in (("after", 40), ("before", None), ("later", 100)):
        folder = tmp_path / "evaluation" / name
        folder.mkdir(parents=True)
        for task in ("needle", "position"):
            (folder / f"{task}.json").write_text(json.dumps({"step": step, "right": [1.0]}))
        told = {"needle": {"step": step}, "position": {"step": step}} | ({"lost": {}} if name == "later" else {})
        (folder / "evaluation.json").write_text(json.dumps({"tasks": told}))
    names = [one.name for one in RunFolder(tmp_path).evaluations]
    of_steps = ["after/needle", "after/position", "later/needle", "later/position"]
    assert names == ["before/needle", "before/position", "later/evaluation", *of_steps]

"""metrics.jsonl over a killed run, FLOPs by hand, a picture."""

import json
import re
import sys
from dataclasses import replace
from typing import Any

import pytest

from ringattn.mask import Mask
from ringattn.parallel.machine.peak_flops import peak_flops
from ringattn.training.model.flops import StepFlops
from ringattn.training.report.metrics import MetricsFile, Progress, StepMetrics, StepSeconds
from ringattn.training.report.plot import plot_loss, smoothed
from ringattn.training.report.records import read_metrics


def metrics(step: int) -> StepMetrics:
    return StepMetrics(step, 1.0 / step, 0.5, 1e-3, 100.0, 50.0, None, 0.25, 0.1, 10 * step, 9)


def test_going_on_drops_what_will_come_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    for step in range(1, 8):
        file.write(metrics(step))
    file.close()
    with open(path, "a") as torn:
        torn.write('{"step": 8, "lo')  # a process killed while it wrote
    assert [record["step"] for record in read_metrics(path)] == list(range(1, 8))
    file = MetricsFile(path, 5)
    file.write(metrics(6))
    file.close()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert set(records[0]) >= {
        "loss", "grad_norm", "lr", "tokens_per_second", "tokens_per_second_per_gpu", "mfu", "peak_memory_gib",
        "seconds", "tokens",
    }  # fmt: skip


class FullDisk:
    """Takes a few bytes of the first line, and no more until it has room."""

    def __init__(self, file: Any) -> None:
        self.file, self.left = file, 10

    def write(self, data: bytes) -> int:
        if not self.left:
            raise OSError(28, "No space left on device")
        count = self.file.write(data[: self.left])
        self.left -= count
        return count


def test_lines_wait_while_a_disk_is_full(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    disk = file._file = FullDisk(file._file)
    for step in (1, 2):
        file.write(metrics(step))
    assert read_metrics(path) == []
    assert capsys.readouterr().err == f"warning: {path} cannot be written now: No space left on device\n"
    disk.left = 10**6
    file.write(metrics(3))
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]


def test_a_new_run_starts_an_empty_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    MetricsFile(path, 0).close()
    assert read_metrics(path) == []


@pytest.mark.parametrize("line", ["5", "[]", '{"loss": 1}', '{"step": "1"}', "{"])
def test_what_is_no_record_ends_the_records(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    assert read_metrics(path) == [{"step": 1}]


def test_the_line_for_people_has_the_numbers():
    line = metrics(2).line(120)
    assert "step   2/120" in line
    assert "loss 0.5000" in line
    assert metrics(2).line(120, 3725).endswith("1:02:05 left")


def test_a_step_without_a_target_has_no_loss_and_is_warned_of_once(capsys):
    """As of a pack that holds the middle of a long question: a loss of 0 would look like a success."""
    progress, none = Progress(0, 4, 1), replace(metrics(2), loss=None, targets=0)
    for one in (metrics(1), none, replace(none, step=3), metrics(4)):
        progress.update(one)
    out, warned = capsys.readouterr()
    assert [line.partition("loss ")[2].split("  ")[0] for line in out.splitlines()] == [
        "1.0000", "of no target", "of no target", "0.2500"
    ]  # fmt: skip
    assert warned.count("warning: step 2 has no token to learn") == 1
    assert "step 3" not in warned


def test_a_warm_up_step_has_seconds_and_no_rates(tmp_path, capsys):
    """What it took to compile is told, and is part neither of a rate nor of the time that is left."""
    first = StepSeconds(30.0, 0.5, warmup=True).rates(1000, 2, 0.1)
    assert first == {
        "seconds": 30.0, "waited": 0.5, "warmup": True, "tokens_per_second": None, "tokens_per_second_per_gpu": None,
        "mfu": None,
    }  # fmt: skip
    later = StepSeconds(2.0, 0.0, warmup=False)
    assert later.rates(1000, 2, 0.5) == {
        "seconds": 2.0, "waited": 0.0, "warmup": False, "tokens_per_second": 500.0, "tokens_per_second_per_gpu": 250.0,
        "mfu": 0.25,
    }  # fmt: skip
    assert later.rates(1000, 2, None)["mfu"] is None
    steps = [replace(metrics(1), **first), replace(metrics(2), **later.rates(1000, 2, None))]
    progress = Progress(0, 10, every=1)
    for one in steps:
        progress.update(one)
    lines = capsys.readouterr().out.splitlines()
    assert "warm-up" in lines[0]
    assert "30.00 s" in lines[0]
    assert "left" not in lines[0]
    assert "500 tokens/s" in lines[1]
    assert lines[1].endswith("0:00:16 left")  # 8 steps of 2 seconds
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    for one in steps:
        file.write(one)
    file.close()
    assert [record["warmup"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [True, False]


def test_the_bar_shows_rates_and_the_newest_validation_losses(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "300")
    progress = Progress(0, 4, every=1)
    progress.update(replace(metrics(1), validation={"books": 2.25}))
    progress.update(replace(metrics(2), loss=0.0, mfu=0.4125, waited=0.03))
    progress.close()  # which draws what came last
    shown = capsys.readouterr().err
    assert "loss 0.000, books 2.250, 100 tokens/s, mfu 41.2% (30% waiting for data)]" in shown
    assert re.search(r"2/4 \[\d\d:\d\d<\d\d:\d\d", shown)  # what it took, and what is left
    assert "(30% waiting for data)" in replace(metrics(2), waited=0.03).line(4)
    assert replace(metrics(2), validation={"books": 2.25}).line(4).endswith("books 2.2500")


def test_the_operations_of_a_step_are_those_counted_by_hand():
    transformers = pytest.importorskip("transformers")
    from ringattn.training.model.models import empty_model

    config = transformers.LlamaConfig(
        vocab_size=10, hidden_size=8, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    flops = StepFlops.of(empty_model(config), config)
    layer = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16 + 2 * 8
    assert flops.parameters == 3 * layer + 8 + 10 * 8
    area = 5 * 6 // 2 + 3 * 4 // 2
    assert flops(8, [5, 3, 0]) == 6 * flops.parameters * 8 + 3 * (4 * 8) * area * 3


def test_windows_count_their_own_area():
    flops = StepFlops(0, ((Mask(), 4), (Mask(window=(1, 0)), 4)))
    assert flops(4, [4]) == 3 * 4 * (10 + 7)


def test_the_peak_of_a_device_is_found_by_its_name():
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("abacus") is None


def test_smoothing_has_no_bias_at_the_start():
    assert smoothed([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])


def test_a_loss_curve_is_drawn_even_of_no_step(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "loss.png"
    plot_loss([{"step": i, "loss": 5.0 / i} for i in range(1, 30)], path, "tiny on stdlib")
    assert path.read_bytes().startswith(b"\x89PNG")
    plot_loss([], path, "no step yet")

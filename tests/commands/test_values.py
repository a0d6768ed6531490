"""Absurd values of every option of the console script, and files that cannot be: one error, at once."""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from ringattn.cli import main, make_parser
from ringattn.commands import _call, check, doctor
from ringattn.commands._files import check_target
from ringattn.parallel.machine.shipped import SHIPPED
from ringattn.workloads import HISTOGRAMS
from tests.test_import import ROOT

BASES = {
    "doctor": ["--device", "cpu"],
    "tune": ["--device", "cpu", "--length", "32", "--heads", "2/1", "--head-dim", "8"],
    "plan": ["--machine", "H200", "--tokens", "4096"],
    "simulate": ["--machine", "H200", "--gpus", "8", "--tokens-per-gpu", "512"],
    "bench": ["--calibrate", "--device", "cpu"],
    "check": ["--model", "llama", "--device", "cpu"],
}
ABSURD = ("", "x", "nan", "inf", "-1", "1e9", "1.5", "999999999999999999999")
# Options that take any of these without harm: text, a folder's name, a seed.
FREE = {"--seed": ("-1", "999999999999999999999"), "--softcap": ("1e9", "1.5", "999999999999999999999")}
NUMBERS = {  # what every parser has, so that a new option of numbers is not forgotten
    "doctor": {"--heads", "--head-dim", "--value-dim", "--window", "--softcap", "--dropout", "--recurrent-heads",
               "--recurrent-dim"},
    "tune": {"--heads", "--head-dim", "--value-dim", "--window", "--softcap", "--dropout", "--length", "--documents"},
    "plan": {"--tokens", "--ring", "--ulysses", "--sequence", "--stages", "--memory", "--head-chunks", "--longest",
             "--seed", "--window", "--chunk", "--heads", "--head-dim", "--recurrent-heads", "--recurrent-dim",
             "--recurrent-layers"},
    "simulate": {"--gpus", "--tokens-per-gpu", "--ulysses", "--packs", "--groups", "--straggler", "--slow-link",
                 "--longest", "--seed", "--window", "--chunk", "--heads", "--head-dim"},
    "bench": {"--heads", "--head-dim", "--seconds"},
    "check": {"--ring", "--ulysses", "--tolerance"},
}  # fmt: skip
FILES = {
    "plan": {"--lengths", "--draw", "--parents", "--blocks"},
    "simulate": {"--lengths", "--draw"},
    "bench": {"--out"},
}
TEXTS = {"--machine", "--model", "--backend"}


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The last line of a command that ends with wrong arguments, which is the only one beside the usage."""
    with pytest.raises(SystemExit) as caught:
        main(list(argv))
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    *usage, last = captured.err.splitlines()
    assert all(line.startswith(("usage: ", " ")) for line in usage)
    assert last.startswith(f"ringattn {argv[0]}: error: ")
    return last


def options_of(command: str) -> dict[str, Any]:
    actions = make_parser()._subparsers._group_actions[0].choices[command]._actions  # type: ignore[union-attr]
    return {action.option_strings[-1]: action for action in actions if action.option_strings}


@pytest.mark.parametrize("command", BASES)
def test_every_option_is_looked_at_here(command: str) -> None:
    taking = {name for name, action in options_of(command).items() if action.nargs != 0 and action.choices is None}
    assert taking - TEXTS == NUMBERS[command] | FILES.get(command, set())


@pytest.mark.parametrize("command", BASES)
def test_absurd_numbers_are_one_error_that_names_the_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    for option in sorted(NUMBERS[command]):
        for value in ABSURD:
            if value in FREE.get(option, ()) or (option, value) == ("--tolerance", "1e9"):
                continue
            if option == "--tolerance" and value in ("1.5", "999999999999999999999"):
                continue
            last = refused(capsys, command, *BASES[command], f"{option}={value}")
            assert f"argument {option}: " in last
            assert repr(value) in last


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["doctor", "--device", "cpu", "--head-dim", "1025"], "expected an integer from 1 to 1024, got '1025'"),
        (["doctor", "--device", "cpu", "--heads", "1025/1"], "at most 1024, got '1025/1'"),
        (["doctor", "--device", "cpu", "--heads", "1024/1", "--value-dim", "129"], "got 132096"),
        (["tune", "--device", "cpu", "--heads", "1024/1", "--head-dim", "256"], "got 262144"),
        (["plan", "--machine", "H200", "--tokens", "2147483649"], "got '2147483649'"),
        (["plan", "--machine", "H200", "--tokens", "4096", "--ring", "128", "--ulysses", "64"], "at most 4096 ranks"),
        (["plan", "--machine", "H200", "--tokens", "300000", "--chunk", "1"], "at most 262144 documents and chunks"),
        (["plan", "--machine", "H200", "--tokens", "300000", "--longest", "9"], "it needs --histogram"),
        (["plan", "--machine", "H200", "--tokens", "300000", "--histogram", "chatqa", "--longest", "1"], "262144"),
        (["simulate", "--machine", "H200", "--gpus", "4096", "--tokens-per-gpu", "2147483648"], "at most 2147483648"),
        (["simulate", "--machine", "H200", "--gpus", "8", "--packs", "2"], "it needs --histogram"),
        (["simulate", "--machine", "H200", "--groups", "4000,97"], "at most 4096 GPUs together, got 4097"),
        (["simulate", "--machine", "H200", "--groups", "2,2", "--gpus", "8"], "--gpus is of one sequence group"),
        (["simulate", "--machine", "H200", "--groups", "2,2", "--straggler", "1:2"], "--straggler is of one"),
        (["simulate", "--machine", "H200", "--groups", "2,2", "--slow-link", "1:node:2"], "--slow-link is of one"),
        (["simulate", "--machine", "H200", "--gpus", "8", "--straggler", "0:1e300"], "a factor from 1 to 1e+06"),
        (["bench", "--calibrate", "--device", "cpu", "--backend", "nope"], "--backend must be one of auto, "),
        (["check", "--model", "llama", "--device", "cpu", "--backend", "nope"], "--backend must be one of auto, "),
        (["check", "--model", "llama", "--device", "cpu", "--ring", "8", "--ulysses", "9"], "at most 64 processes"),
    ],
)
def test_what_would_run_for_hours_or_say_nothing(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if argv[0] == "check":
        pytest.importorskip("transformers")
    assert words in refused(capsys, *argv)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for devices that are not there")
@pytest.mark.parametrize("command", ["bench", "tune", "check"])
def test_devices_that_are_not_there(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*BASES[command], "--device", "cuda", *(["--ring", "2"] if command == "check" else [])]
    if command == "check":
        pytest.importorskip("transformers")
    count = 2 if command == "check" else 1
    assert f"--device cuda needs {count} CUDA devices, found 0" in refused(capsys, command, *argv)


def test_the_largest_call_of_doctor_is_tested_at_small_sizes() -> None:
    """What its self-test computes with is bounded by the same product that is refused."""
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    args = parser.parse_args(["--device", "cpu", "--heads", "1024/8", "--head-dim", "1024"])
    assert _call.call_spec(args).query_heads == 1024
    assert _call.SELF_TEST == 1024 // 8 * 1024


PLACES = ["/dev/null/sub/file.png", "/proc/file.png", "/proc/no/file.png"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("command", ["plan", "simulate", "bench"])
def test_places_that_cannot_be_written_are_refused_before_the_work(
    command: str, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    option = "--out" if command == "bench" else "--draw"
    pytest.importorskip("matplotlib")
    with mock.patch("ringattn.commands.plan.plan"), mock.patch("ringattn.commands.simulate.examine"):
        last = refused(capsys, command, *BASES[command], option, place)
    assert f"{option} {place} cannot be written: " in last


def test_missing_folders_are_made_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "plan.png"
    check_target("--draw", target)
    assert list(target.parent.iterdir()) == []
    target.write_text("before")
    check_target("--draw", target)
    assert target.read_text() == "before"
    with pytest.raises(ValueError, match="cannot be written: Is a directory"):
        check_target("--draw", tmp_path / "a")


@pytest.mark.parametrize("command", ["plan", "simulate"])
def test_pictures_go_to_new_folders(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main([command, *BASES[command], "--draw=~/new/picture.SVG"]) == 0
    assert (tmp_path / "new" / "picture.SVG").stat().st_size > 1000


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x00\xff", "is not text: byte 1 is no UTF-8"),
        (b"1 2 x", "line 1: a document length must be an integer >= 0, got 'x'"),
        (b"", "holds no document with tokens"),
        (None, "cannot be read: No such file or directory"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "simulate"])
def test_files_that_hold_no_lengths_are_refused_by_name(
    command: str, content: bytes | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "lengths"
    if content is not None:
        path.write_bytes(content)
    base = ["--machine", "H200"] if command == "plan" else BASES["simulate"]
    last = refused(capsys, command, *base, "--lengths", str(path))
    assert str(path) in last
    assert words in last


def test_lengths_of_more_tokens_than_areas_can_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "lengths"
    path.write_text(f"{1 << 31} 1")
    assert "has 2147483649 tokens, expected at most" in refused(capsys, "plan", "--lengths", str(path))
    assert main(["plan", "--machine", "H200", "--lengths", str(path), "--tokens", "4096"]) == 0  # cut to them


@pytest.mark.parametrize("content", [b"\xff", b"{}", b"[]", b"10 20"])
def test_files_that_hold_no_machine_are_refused_by_name(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "machine.json"
    path.write_bytes(content)
    for command in ("plan", "simulate"):
        last = refused(capsys, command, *BASES[command], "--machine", str(path))
        assert f"--machine {path}: " in last
    with mock.patch.dict(os.environ, RINGATTN_MACHINE=str(path)):
        argv = [word for word in BASES["plan"] if word not in ("--machine", "H200")]
        assert f"RINGATTN_MACHINE={path} cannot be read: " in refused(capsys, "plan", *argv)


def test_a_calibration_that_cannot_be_measured_or_kept(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    argv = ["bench", *BASES["bench"], "--head-dim", "8"]
    monkeypatch.setenv("RINGATTN_CACHE_DIR", "/proc/cache")
    assert "RINGATTN_CACHE_DIR: /proc/cache/machine-" in refused(capsys, *argv)
    monkeypatch.delenv("RINGATTN_CACHE_DIR")
    with mock.patch(
        "ringattn.parallel.machine.calibrate.Calibration.run", side_effect=RuntimeError("out of memory\nmore")
    ):
        assert main([*argv, "--out", os.devnull]) == 1
    assert capsys.readouterr().err == "ringattn bench: error: this cannot be measured: out of memory\n"


@pytest.mark.parametrize("command", BASES)
def test_wrong_values_of_the_environment(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every attention would raise them, so no command says that all is well."""
    for name in ("RINGATTN_AUTOTUNE", "RINGATTN_LOG", "RINGATTN_DETERMINISTIC", "RINGATTN_CHECK_PLANS"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "wrong")
            assert f"{name} must be one of off, " in refused(capsys, command, *BASES[command])
    if command == "bench":
        for name in ("RINGATTN_MACHINE", "RINGATTN_BACKEND"):
            with monkeypatch.context() as patch:
                patch.setenv(name, "wrong")
                assert f"{name} must be " in refused(capsys, command, *BASES[command])


def test_packs_of_too_many_documents() -> None:
    assert len(HISTOGRAMS["chatqa"].pack(1000, 0, 10, 200)) <= 200
    with pytest.raises(ValueError, match="at most 99 documents, and there are more in 1000 tokens"):
        HISTOGRAMS["chatqa"].pack(1000, 0, 10, 99)


@pytest.mark.parametrize(("target", "told"), [("| true", ""), ("> /dev/full", "No space left on device")])
def test_output_that_nobody_takes(target: str, told: str) -> None:
    command = f"set -o pipefail; {sys.executable} -m ringattn plan --machine H200 --tokens 4096 --ring 64 --json"
    done = subprocess.run(
        ["bash", "-c", f"{command} {target}"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    assert told in done.stderr
    assert len(done.stderr.splitlines()) <= 1
    assert "Traceback" not in done.stderr


def test_what_a_plan_says_of_traffic_is_computed_once(capsys: pytest.CaptureFixture[str]) -> None:
    """It is of all ranks: once for each would be cubic in their number."""
    from ringattn.commands import _plan_report

    with mock.patch("ringattn.commands._plan_report.Traffic", wraps=_plan_report.Traffic) as computed:
        assert main(["plan", "--machine", "H200", "--tokens", "4096", "--ring", "8", "--json"]) == 0
    assert computed.call_count == 1


def test_the_first_line_of_what_a_process_raised() -> None:
    trace = (
        "\n\n-- Process 0 terminated with the following error:\nTraceback (most recent call last):\n"
        '  File "a.py", line 1, in work\n    run()\n  File "b.py", line 2, in run\n    raise ValueError(\n'
        "ValueError: Unrecognized: one\nof many: a, b, c\n  and more.\n"
    )
    assert check.raised(trace) == "ValueError: Unrecognized: one"
    assert check.raised("process 1 terminated with signal SIGKILL") == "process 1 terminated with signal SIGKILL"


def test_shipped_machines_are_whole() -> None:
    for machine in SHIPPED.values():
        machine._check()

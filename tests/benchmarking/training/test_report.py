"""Options, tables and profiles."""

import json
from pathlib import Path

import pytest

from benchmarks.training.attempts import judged
from benchmarks.training.longest import Attempt, Longest
from benchmarks.training.measuring import Result
from benchmarks.training.options import checked, lengths, parser, words_of
from benchmarks.training.profiling import OTHER, Event, busy_time, group_of, profile_table
from benchmarks.training.report import COLUMNS, longest_table, markdown, table_of, write_json

FACTS = {
    "date": "today",
    "hardware": "1 × CPU",
    "versions": {"torch": "2"},
    "kernel": "cpu",
    "model": "tiny",
    "command": "x",
}


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("--rows ours,theirs", "--rows must be of ours, hf, alst, alst-unsharded, got 'theirs'"),
        ("--seq-len 0", "--seq-len must be numbers of tokens"),
        ("--seq-len 12q", "got '12q'"),
        ("--steps -1", "--steps must be at least 0, got -1"),
        ("--gpus 2", "--gpus=2 is for --longest"),
        ("--longest --precision 0", "--precision must be a share"),
    ],
)
def test_options_that_cannot_be_are_refused(words: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        checked(parser().parse_args(words.split()))


def test_lengths_are_measured_from_the_shortest() -> None:
    assert lengths(parser().parse_args(["--seq-len", "1m,32k,1000"])) == [1000, 32768, 2**20]


def test_options_become_words_again() -> None:
    words = "--rows ours --seq-len 64k --loss-tile none --keep layer --longest --gpus 2 --room 80 --moments none"
    options = parser().parse_args(words.split())
    assert parser().parse_args(words_of(options, ())) == options
    assert "--gpus" not in words_of(options, ("gpus",))


def test_a_line_for_each_result() -> None:
    done = Result("ours", 65536, 1, 1, "weights bfloat16", allocated=12.345, reserved=13.0, seconds=2.0, mfu=0.4321)
    failed = Result("hf", 65536, 1, 1, "weights bfloat16", failure="out of memory")
    lines = table_of([done, failed])
    assert all(line.count("|") == len(COLUMNS) + 1 for line in lines)
    assert "12.35 / 13.00" in lines[2]
    assert "43.2%" in lines[2]
    assert "| out of memory |" in lines[3]


def test_all_is_written(tmp_path: Path) -> None:
    found = {"ours": Longest([Attempt(1024, 1.5, 2.0, 3.0), Attempt(2048, None, 2.0, 1.0, "out of memory")], True)}
    write_json(tmp_path / "a.json", FACTS, [Result("ours", 1, 1, 1, "")], found)
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["results"][0]["row"] == "ours"
    assert content["longest"]["ours"]["best"] == 1024
    text = markdown(FACTS, [], found)
    assert longest_table(found)[-1] in text
    assert "| ours | 1,024 | 1.50 | 2,048 | out of memory |" in text
    found["ours"].proved = False
    assert "1,024 at least" in longest_table(found)[-1]


def test_more_than_there_is_did_not_fit() -> None:
    assert judged(Attempt(1024, 1.5, 2.0, 1.0)).peak == 1.5
    assert judged(Attempt(1024, 2.5, 2.0, 1.0)).peak is None


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<...>>>", "attention"),
        ("kernel_cutlass_kernel_flash_attncuteflash_bwd_sm90FlashAttentionBackwardSm90_object_at", "attention"),
        ("nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_TNT", "matmul"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matmul"),
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "communication"),
        ("Memcpy PtoP (Device -> Device)", "communication"),
        ("Memcpy DtoH (Device -> Pinned)", "copies"),
        ("void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda>", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4, silu_kernel>", OTHER),
    ],
)
def test_groups_of_kernels(name: str, group: str) -> None:
    assert group_of(name) == group


def test_time_in_which_nothing_ran() -> None:
    """Two kernels at once are busy once, and one inside of another not at all."""
    events = [Event("gemm", 0, 4000), Event("nccl", 3000, 6000), Event("copy_", 3500, 3600), Event("gemm", 8000, 9000)]
    assert busy_time(events) == 7000
    table = profile_table("step", events, 10.0)
    assert "| matmul | 5.00 | 50.0% | 2 |" in table
    assert "| no kernel ran | 3.00 | 30.0% | |" in table
    assert "| matmul: `gemm` | 5.00 | 50.0% | 2 |" in table

"""`ringattn plan`: figures that can be checked by hand, for people and for programs."""

import json
import re
from dataclasses import replace

import pytest

from ringattn import Documents, Layout, Mask, MeshShape
from ringattn.cli import main
from ringattn.drawing import WIRE
from ringattn.parallel.machine.shipped import SHIPPED
from ringattn.parallel.plan.shape import Shape
from ringattn.parallel.planning.planner import plan_attention, plan_parts
from ringattn.parallel.pricing.plan_cost import rank_cost

SMALL = ["plan", "--heads", "8/2", "--head-dim", "64", "--machine", "H200"]


def report(capsys, *argv):
    assert main([*SMALL, *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_table_holds_what_the_plans_say(capsys, tmp_path):
    lengths = [5000, 300, 0, 900, 1992]
    path = tmp_path / "lengths"
    path.write_text(" ".join(map(str, lengths)))
    found = report(capsys, "--lengths", str(path), "--ring", "4")
    assert found["documents"] == {"count": 5, "tokens": 8192, "longest": 5000}
    assert sum(rank["tokens"] for rank in found["ranks"]) == 8192
    assert sum(rank["area"] for rank in found["ranks"]) == sum(n * (n + 1) // 2 for n in lengths)
    areas = [rank["area"] for rank in found["ranks"]]
    assert found["balance"] == pytest.approx(max(areas) * 4 / sum(areas))
    for rank in found["ranks"]:
        layout = Layout(Documents(lengths), MeshShape(1, 4, 1, rank["rank"], machine=SHIPPED["H200"]))
        plan = plan_attention(layout, Shape(8, 2, 64, 64))
        assert plan.reason == found["reason"]
        row = 2 * (64 + 64) * 2  # bytes: key heads, dims of keys and values, bfloat16
        assert (rank["received_bytes"], rank["sent_bytes"]) == (plan.received_rows * row, plan.sent_rows * row)
        assert rank["stages"] == len(plan.stages)
        for name in ("forward", "backward"):
            one = rank[name]
            cost = getattr(rank_cost(SHIPPED["H200"], plan, Shape(8, 2, 64, 64)), name)
            assert (one["compute"], one["wire"], one["exposed"]) == (cost.compute, cost.wire, cost.exposed)
            assert 0 < one["simulated"] <= found["seconds"][name]
    chosen = {one["schedule"]: one for one in found["alternatives"]}
    assert found["schedule"]["forward"] in chosen


def test_trees_and_blocks_are_planned(capsys, tmp_path):
    files = {"lengths": "40 20, 20", "parents": "-1 0 0  # two completions", "blocks": "5 15"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    options = [word for name in files for word in (f"--{name}", str(tmp_path / name))]
    found = report(capsys, *options, "--ring", "2")
    docs = Documents.from_tree([40, 20, 20], [-1, 0, 0], blocks=[(5, 15)])
    assert found["documents"] == {"count": 1, "tokens": 80, "longest": 80}
    assert sum(rank["area"] for rank in found["ranks"]) == int(docs.dense(Mask()).sum())


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("parents", "-1 0", "parents must have one entry for each of the 3 lengths, got 2"),
        ("parents", "-1 0 x", "--parents .* must hold integers"),
        ("blocks", "5 15 20", "--blocks .* must hold two numbers for each block, got 3"),
        ("blocks", "35 45", r"blocks\[0\] = \(35, 45\) must lie in one document"),
    ],
)
def test_wrong_trees_and_blocks_are_refused(capsys, tmp_path, name, text, words):
    (tmp_path / "lengths").write_text("40 20 20")
    (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit):
        main([*SMALL, "--lengths", str(tmp_path / "lengths"), f"--{name}", str(tmp_path / name), "--ring", "2"])
    assert re.search(words, capsys.readouterr().err.replace("\n", " "))


def test_other_meshes_and_heads(capsys):
    found = report(capsys, "--tokens", "4096", "--ring", "2", "--ulysses", "2")
    assert [(one["ring"], one["ulysses"]) for one in found["meshes"]] == [(4, 1), (2, 2), (1, 4)]
    assert sum(rank["area"] for rank in found["ranks"]) == pytest.approx(4096 * 4097 / 2)
    assert len({rank["area"] for rank in found["ranks"][:2]}) == 1  # a position's ranks share its heads equally


def test_chunks_of_heads_are_planned_and_priced_everywhere(capsys):
    whole, parted = (report(capsys, "--tokens", "65536", "--ring", "4", *more) for more in ([], ["--head-chunks", "2"]))
    for found, chunks in ((whole, 1), (parted, 2)):
        assert {rank["head_chunks"] for rank in found["ranks"]} == {chunks}
        name = found["schedule"]["forward"]
        (mine,) = [one for one in found["alternatives"] if one["schedule"] == name]
        (here,) = [one for one in found["meshes"] if (one["ring"], one["ulysses"]) == (4, 1)]
        assert here["forward"] == mine["forward"]
    assert sum(rank["received_bytes"] for rank in parted["ranks"]) == sum(
        rank["received_bytes"] for rank in whole["ranks"]
    )
    most = [max(rank["buffer_bytes"] for rank in found["ranks"]) for found in (whole, parted)]
    assert most[1] < 0.6 * most[0]
    limited = report(capsys, "--tokens", "65536", "--ring", "4", "--memory", str(int(most[1] * 1.1) >> 20))
    assert {rank["head_chunks"] for rank in limited["ranks"]} == {2}


def test_people_can_read_it(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "plan.png"
    argv = ["--histogram", "chatqa", "--tokens", "65536", "--ring", "4", "--ulysses", "2", "--draw", str(picture)]
    assert main([*SMALL, *argv, "--longest", "9000", "--seed", "3", "--window", "2047,0"]) == 0
    text = capsys.readouterr().out
    assert max(len(line) for line in text.splitlines()) <= 120
    assert "heads 8/2, head dim 64" in text
    assert "ring 4 × ulysses 2, balanced layout; predicted for H200 (shipped)" in text
    assert "* chosen" in text
    assert picture.stat().st_size > 10_000
    assert main([*SMALL, "--tokens", "6500", "--ring", "65"]) == 0
    text = capsys.readouterr().out
    assert "the 64 slowest of 65 ranks; --json has all" in text


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "--tokens is needed"),
        (["--lengths", "/no/such/file"], "/no/such/file"),
        (["--tokens", "64", "--machine", "TPU"], "'TPU'"),
        (["--tokens", "64", "--draw", "x.gif"], "'x.gif'"),
        (["--tokens", "64", "--scheme", "hybrid", "--ring", "2"], 'scheme="hybrid"'),
        (["--tokens", "64", "--ring", "2", "--stages", "3"], "stages=3"),
        (["--tokens", "0"], "'0'"),
        (["--tokens", "64", "--ring", "2", "--sequence", "2"], "--sequence 2"),
        (["--tokens", "65536", "--ring", "2", "--memory", "1"], "memory_limit"),
    ],
)
def test_one_error_names_the_argument(argv, words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["plan", "--machine", "H200", *argv])
    assert caught.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("ringattn plan: error: ")
    assert words in last


def test_degrees_that_the_documents_choose(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    lengths = [65536, 30000, *[700] * 144]
    path = tmp_path / "lengths"
    path.write_text(" ".join(map(str, lengths)))
    argv = ["--lengths", str(path), "--sequence", "8", "--heads", "32/8", "--head-dim", "128"]
    found = report(capsys, *argv)
    assert [part["mesh"] for part in found["parts"]] == [{"ring": 1, "ulysses": 8}, {"ring": 8, "ulysses": 1}]
    assert [part["documents"]["count"] for part in found["parts"]] == [2, 144]
    assert [part["documents"]["tokens"] for part in found["parts"]] == [95536, 100800]
    assert sum(rank["area"] for part in found["parts"] for rank in part["ranks"]) == pytest.approx(
        sum(n * (n + 1) / 2 for n in lengths)
    )
    layout = Layout(Documents(lengths), layout_mesh())
    assert found["reason"] == layout.reason
    plans = plan_parts(layout, Shape(32, 8, 128, 128))
    assert [part["reason"] for part in found["parts"]] == [plan.reason for _, plan in plans.parts]
    assert main([*SMALL, *argv, "--draw", str(tmp_path / "plan.svg")]) == 0
    text = capsys.readouterr().out
    assert "degrees" in text
    assert max(len(line) for line in text.splitlines()) <= 120
    assert (tmp_path / "plan-1.svg").exists()
    assert (tmp_path / "plan-2.svg").exists()


def layout_mesh():
    every = tuple(MeshShape(1, *pair, machine=SHIPPED["H200"]) for pair in MeshShape(1, 8).parted())
    return replace(every[0], alternatives=every)


def test_one_kind_of_documents_has_no_parts(capsys):
    found = report(capsys, "--tokens", "65536", "--sequence", "4")
    assert found["mesh"]["ring"] * found["mesh"]["ulysses"] == 4


def test_copy_engines_are_another_machine(capsys):
    argv = ["--tokens", "65536", "--ring", "4", "--ulysses", "2"]
    slow, fast = (report(capsys, *argv, "--machine", machine) for machine in ("H200", "H200+copy"))
    assert "H200, copy engines" in fast["reason"]
    waiting = [sum(rank["forward"]["wire"] for rank in found["ranks"]) for found in (slow, fast)]
    assert waiting[1] < waiting[0]


def test_copy_engines_move_what_stays_in_a_node(capsys):
    argv = ["--tokens", "65536", "--machine", "H200+copy"]
    inside, across = (report(capsys, *argv, "--ring", ring, "--ulysses", "4")["reason"] for ring in ("2", "4"))
    assert "predicted for H200, copy engines (" in inside
    assert "predicted for H200, copy engines on the ulysses axis (" in across
    assert "predicted for H200 (" in report(capsys, *argv, "--ring", "16")["reason"]


def test_captured_steps_do_not_wait_for_the_host(capsys, tmp_path):
    (tmp_path / "lengths").write_text(" ".join(["100"] * 80))
    argv = ["--lengths", str(tmp_path / "lengths"), "--ring", "8"]
    eager, captured = (report(capsys, *argv, "--machine", name) for name in ("H200+copy", "H200+copy+graph"))
    assert "H200, captured, copy engines (" in captured["reason"]
    waiting = [max(rank["forward"]["exposed"] for rank in found["ranks"]) for found in (eager, captured)]
    assert waiting[0] > 2e-4 > waiting[1]


@pytest.mark.parametrize("suffix", ["", "+copy", "+graph"])
@pytest.mark.parametrize("name", list(SHIPPED))
def test_names_of_machines_are_taken_in_any_case(capsys, name, suffix):
    argv = ["--tokens", "4096", "--ring", "2", "--machine"]
    found = [report(capsys, *argv, f"{one}{suffix}") for one in (name, name.lower(), name.capitalize())]
    assert found[0] == found[1] == found[2]


def test_a_file_of_a_machine_may_have_any_name(capsys, tmp_path):
    path = tmp_path / "all+copying+graphs.json"
    path.write_text(replace(SHIPPED["H200"], name="mine").to_json())
    for suffix, told in (("", "mine ("), ("+copy", "mine, copy engines ("), ("+graph", "mine, captured (")):
        assert told in report(capsys, "--tokens", "4096", "--ring", "2", "--machine", f"{path}{suffix}")["reason"]


def test_the_picture_has_passes_of_a_layer_with_a_state(tmp_path):
    pytest.importorskip("matplotlib")
    argv = [*SMALL, "--tokens", "4096", "--ring", "2"]
    paths = [tmp_path / "plain.svg", tmp_path / "states.svg"]
    assert main([*argv, "--draw", str(paths[0])]) == 0
    assert main([*argv, "--recurrent", "delta", "--draw", str(paths[1])]) == 0
    green = [path.read_text().count(WIRE["states"]) for path in paths]
    assert green[0] == 0
    assert green[1] >= 4  # a gather of each rank in both passes


def test_a_layer_with_a_state_is_planned_too(capsys):
    found = report(capsys, "--tokens", "4096", "--ring", "4", "--policy", "zigzag", "--recurrent", "mamba2")[
        "recurrent"
    ]
    assert found["cut_documents"] == 1
    # Rank 3 holds the two slices in the middle, which are one piece.
    assert [rank["cut"] for rank in found["ranks"]] == [2, 2, 2, 1]
    assert [rank["composed"] for rank in found["ranks"]] == [6, 6, 6, 3]
    assert {rank["cut_tokens"] for rank in found["ranks"]} == {1024}
    # Of 7 pieces rank 0 has the last one, which takes 6 states (128 × 128 a head) and the maps of all but the first (a
    # number a head); so it is in the backward pass.
    assert found["routes"]["scan"]["rounds"] == 1
    assert found["routes"]["scan"]["sent_bytes"] == 2 * 4 * 32 * (5 + 6 * 128 * 128)
    assert found["route"] == min(found["routes"], key=lambda name: found["routes"][name]["seconds"])
    for name in ("forward", "backward"):
        times = [rank[name] for rank in found["ranks"]]
        assert found["seconds"][name] == max(one["simulated"] for one in times)
        assert all(0 < one["compute"] <= one["simulated"] for one in times)
        assert all(one["wire"] > 0 for one in times)
    assert main([*SMALL, "--tokens", "4096", "--ring", "4", "--recurrent", "delta"]) == 0
    text = capsys.readouterr().out
    assert "Layer with a state: delta, heads 32/16, dim 128; 1 documents are cut" in text
    assert "one layer, all ranks together: forward" in text
    assert max(len(line) for line in text.splitlines()) <= 120
    with pytest.raises(SystemExit):
        main([*SMALL, "--tokens", "4096", "--recurrent", "delta", "--recurrent-dim", "0"])
    assert "argument --recurrent-dim: " in capsys.readouterr().err


def test_degrees_are_weighed_with_the_states(capsys, tmp_path):
    """As a model with such layers is laid out; with another policy as before."""
    argv = ["plan", "--tokens", "262144", "--sequence", "8", "--machine", "H200"]
    argv += ["--heads", "16/4", "--head-dim", "256"]
    assert main(argv) == 0
    assert "ring 1 × ulysses 8, contiguous layout" in capsys.readouterr().out
    assert main([*argv, "--recurrent", "delta", "--recurrent-layers", "3"]) == 0
    weighed = " ".join(capsys.readouterr().out.split())
    assert "degrees balanced on ring 2 × ulysses 4 of balanced on ring 2 × ulysses 4" in weighed
    assert "1 attention and 3 recurrent layers" in weighed
    assert "ring 2 × ulysses 4, balanced layout" in weighed
    lengths = tmp_path / "lengths.txt"
    lengths.write_text(" ".join(map(str, [30_000] * 2 + [5000] * 30)))
    few = ["--lengths", str(lengths), "--ring", "8", "--recurrent", "delta"]
    for layers, policy in (("1", "balanced"), ("1024", "contiguous")):
        assert report(capsys, *few, "--recurrent-layers", layers)["policy"] == policy
    assert report(capsys, *few, "--recurrent-layers", "1024", "--policy", "zigzag")["policy"] == "zigzag"


def test_states_of_trees_are_refused_in_words(capsys, tmp_path):
    for name, text in (("lengths", "40 20 20"), ("parents", "-1 0 0")):
        (tmp_path / name).write_text(text)
    files = ["--lengths", str(tmp_path / "lengths"), "--parents", str(tmp_path / "parents")]
    with pytest.raises(SystemExit):
        main([*SMALL, *files, "--ring", "2", "--recurrent", "delta"])
    assert "layout holds trees" in " ".join(capsys.readouterr().err.split())

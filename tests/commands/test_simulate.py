"""`ringattn simulate`: its figures against the parts they are made of."""

import json

import pytest

from ringattn import Documents, Layout, MeshShape
from ringattn.cli import main
from ringattn.commands._scaling import largest_divisor
from ringattn.kernels.spec import Block, Call
from ringattn.parallel.machine.machine import call_seconds
from ringattn.parallel.machine.shipped import SHIPPED
from ringattn.parallel.plan.shape import Shape
from ringattn.parallel.planning.all_ranks import plan_group
from ringattn.parallel.simulation.simulate import simulate

H200 = SHIPPED["H200"]


def report(capsys, *argv):
    assert main(["simulate", "--machine", "H200", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_point_is_the_simulation_of_its_plans(capsys):
    (point,) = report(capsys, "--gpus", "16", "--tokens-per-gpu", "512", "--heads", "8/2")["points"]
    shape, tokens = Shape(8, 2, 128, 128), 16 * 512
    layout = Layout(Documents([tokens]), MeshShape(1, 2, 8, machine=H200))
    plans = plan_group(layout.parts[0], shape)
    times = [simulate(H200, plans, shape, backward).seconds for backward in (False, True)]
    assert [point["seconds"][name] for name in ("forward", "backward")] == times
    whole = Call((Block((0, tokens), (0, tokens), -1, 0),), -1, 0)
    ideal = [call_seconds(H200, whole, shape, backward) / 16 for backward in (False, True)]
    assert point["efficiency"]["both"] == pytest.approx(sum(ideal) / sum(times))
    area = tokens * (tokens + 1) // 2
    assert point["tflops"]["forward"] == pytest.approx(4 * 8 * 128 * area / 16 / times[0] / 1e12)
    assert point["mesh"] == "2×8"


def test_packs_are_averaged_and_slow_parts_cost_time(capsys):
    argv = ["--gpus", "16", "--histogram", "chatqa", "--tokens-per-gpu", "2048", "--packs"]
    (normal,) = report(capsys, *argv, "2")["points"]
    one = [report(capsys, *argv, "1", "--seed", seed)["points"][0] for seed in "01"]
    for name in ("forward", "backward"):
        assert normal["seconds"][name] == pytest.approx(sum(point["seconds"][name] for point in one) / 2)
    (slow,) = report(capsys, *argv, "2", "--straggler", "3:2")["points"]
    assert slow["seconds"]["forward"] > normal["seconds"]["forward"]
    (link,) = report(capsys, *argv, "2", "--slow-link", "3:node:3")["points"]
    assert link["seconds"]["forward"] > normal["seconds"]["forward"]
    assert link["efficiency"]["both"] < normal["efficiency"]["both"]


def test_groups_of_any_sizes_share_a_step(capsys):
    found = report(capsys, "--groups", "2,2,4", "--histogram", "chatqa", "--tokens-per-gpu", "4096", "--seed", "2")
    (point,) = found["points"]
    assert [group["gpus"] for group in point["groups"]] == [2, 2, 4]
    for name in ("forward", "backward"):
        assert point["seconds"][name] == max(group[name] for group in point["groups"])
    assert 0 < point["efficiency"]["both"] < 1


def test_a_thousand_gpus_end_to_end(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "scaling.svg"
    argv = ["simulate", "--machine", "H200", "--gpus", "8,1024", "--tokens-per-gpu", "512"]
    assert main([*argv, "--histogram", "chatqa", "--longest", "8192", "--draw", str(picture)]) == 0
    text = capsys.readouterr().out
    assert max(len(line) for line in text.splitlines()) <= 120
    assert "128×8" in text
    assert picture.stat().st_size > 5_000


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--gpus", "8,x"], "'x'"),
        (["--straggler", "3"], "'3'"),
        (["--straggler", "x:2"], "'x:2'"),
        (["--straggler", "3:0.5"], "'3:0.5'"),
        (["--slow-link", "3:rail:2"], "'3:rail:2'"),
        (["--gpus", "8", "--straggler", "8:2"], "--straggler names rank 8, and there are 8 GPUs"),
        (["--machine", "TPU"], "'TPU'"),
        (["--draw", "x.gif"], "'x.gif'"),
    ],
)
def test_one_error_names_the_argument(argv, words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["simulate", *argv])
    assert caught.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_the_ulysses_degree_divides_the_gpus():
    assert [largest_divisor(number, 8) for number in (8, 12, 7, 64, 11)] == [8, 6, 7, 8, 1]

"""`launch/local.sh`: how many ranks it starts, and what it hands on."""

from tests.launch.checkout import Checkout


def test_local_help(checkout: Checkout) -> None:
    done = checkout.run("launch/local.sh", "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: bash launch/local.sh [options] [hydra overrides]")
    assert checkout.calls == []


def test_local_passes_options_overrides_and_exit_code(checkout: Checkout) -> None:
    arguments = ["--nproc", "3", "run.steps=3", "data.files=[a b,c]"]
    done = checkout.run("launch/local.sh", *arguments, SATISFIED="0", TRAIN_EXIT="7")
    assert done.returncode == 7
    assert checkout.calls == ["train --nproc 3 run.steps=3 data.files=[a b,c]"]


def test_local_is_this_machine_alone(checkout: Checkout) -> None:
    done = checkout.run("launch/local.sh", SATISFIED="0", NNODES="2")
    assert done.returncode == 0, done.stderr
    assert checkout.machines[0].startswith("NNODES= ")

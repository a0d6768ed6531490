"""`launch/local.sh`: how many ranks it starts, and what it hands on."""

import pytest

from tests.launch.checkout import Checkout


def test_local_help(checkout: Checkout) -> None:
    done = checkout.run("launch/local.sh", "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: bash launch/local.sh [hydra overrides]")
    assert checkout.calls == []


def test_local_passes_overrides_and_exit_code(checkout: Checkout) -> None:
    overrides = ["run.steps=3", "data.files=[a b,c]"]
    done = checkout.run("launch/local.sh", *overrides, SATISFIED="0", TORCHRUN_EXIT="7", NPROC="3", OMP_NUM_THREADS="5")
    assert done.returncode == 7
    assert checkout.calls == [
        "torchrun --standalone --nproc-per-node 3 recipes/train.py run.steps=3 data.files=[a b,c] OMP=5"
    ]


def test_local_takes_every_gpu_that_torch_sees(checkout: Checkout) -> None:
    checkout.program("nvidia-smi", "#!/bin/sh\n")
    done = checkout.run("launch/local.sh", SATISFIED="0", GPUS="4")
    assert "4 GPUs: 4 ranks" in done.stderr
    assert "--nproc-per-node 4 " in checkout.calls[0]
    done = checkout.run("launch/local.sh", SATISFIED="0", GPUS="0")  # a driver, and a torch without CUDA
    assert "0 GPUs: 2 ranks" in done.stderr


@pytest.mark.parametrize("wrong", ["0", "two", "-1"])
def test_local_refuses_a_wrong_number_of_ranks(checkout: Checkout, wrong: str) -> None:
    done = checkout.run("launch/local.sh", SATISFIED="0", NPROC=wrong)
    assert done.returncode == 2
    assert f"the number of ranks must be an integer >= 1, got '{wrong}'" in done.stderr

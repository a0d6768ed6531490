"""Setting up: what is installed where, what an environment lacks, and how that fails."""

import subprocess
import sys

import pytest

from tests.launch.checkout import PYTHON, ROOT, Checkout

SCRIPTS = [
    "launch/setup.sh",
    "launch/local.sh",
    "launch/test.sh",
    "launch/torchrun.sh",
    "launch/preflight.sh",
    "launch/kubernetes/start.sh",
    "launch/slurm.sbatch",
    ".ci/run",
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_valid_bash(script: str) -> None:
    subprocess.run(["bash", "-n", ROOT / script], check=True, timeout=20)


def test_fresh_machine_gets_a_venv_with_torch_first(checkout: Checkout) -> None:
    done = checkout.run("launch/local.sh", SATISFIED="1")
    assert done.returncode == 0, done.stderr
    made, torch, package, launched = checkout.calls
    assert made == "venv"
    assert "-c launch/constraints.txt torch " in torch
    assert package.endswith("-c launch/constraints.txt -e .[train]")
    assert launched.split() == ["train"]
    assert "installing torch: done in" in done.stderr


def test_second_call_installs_nothing_until_a_requirement_changes(checkout: Checkout) -> None:
    checkout.run("launch/local.sh", SATISFIED="1")
    checkout.run("launch/local.sh", SATISFIED="1")
    assert [call.split()[0] for call in checkout.calls] == ["train"]
    with (checkout.root / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    checkout.run("launch/local.sh", SATISFIED="1")
    assert [call.split()[0] for call in checkout.calls] == ["pip", "pip", "train"]


def test_tests_add_their_extras_to_the_same_venv(checkout: Checkout) -> None:
    checkout.run("launch/local.sh", SATISFIED="1")
    done = checkout.run("launch/test.sh", "-k", "two words", SATISFIED="1")
    assert done.returncode == 0
    assert checkout.calls[1].endswith("-e .[dev,hf,memory]")
    assert checkout.calls[2].endswith("--no-build-isolation -e .[deepspeed]")
    assert checkout.calls[3] == "pytest -n 2 --dist loadfile -k two words"
    checkout.run("launch/test.sh", "-m", "gpu", SATISFIED="1")
    assert checkout.calls[-1] == "pytest -n 0 --dist loadfile -m gpu"  # they would share one


def test_failing_install_shows_its_output_and_stops(checkout: Checkout) -> None:
    done = checkout.run("launch/local.sh", SATISFIED="1", PIP_FAILS_ON=".[train]")
    assert done.returncode == 1
    assert "pip: no such thing" in done.stderr
    assert "installing ringattn[train]: failed with exit code 1" in done.stderr
    assert not any(call.startswith("train") for call in checkout.calls)
    checkout.run("launch/local.sh", SATISFIED="1")  # nothing was stamped: it is tried again
    assert sum(call.startswith("pip") for call in checkout.calls) == 2


def test_tests_run_without_deepspeed_but_its_engine_does_not(checkout: Checkout) -> None:
    done = checkout.run("launch/test.sh", SATISFIED="1", PIP_FAILS_ON=".[deepspeed]")
    assert done.returncode == 0
    assert "going on without deepspeed" in done.stderr
    assert checkout.calls[-1].startswith("pytest")
    checkout.run("launch/test.sh", SATISFIED="1")
    assert len(checkout.calls) == 1  # not tried at every call
    done = checkout.run("launch/local.sh", "engine=deepspeed", SATISFIED="1", PIP_FAILS_ON=".[deepspeed]")
    assert done.returncode == 1
    assert not any(call.startswith("train") for call in checkout.calls)


def test_active_environment_is_used_when_it_has_everything(checkout: Checkout) -> None:
    done = checkout.run("launch/local.sh", SATISFIED="0")
    assert done.returncode == 0, done.stderr
    assert [call.split()[0] for call in checkout.calls] == ["train"]
    assert not (checkout.root / ".venv").exists()


def test_active_environment_that_lacks_something_is_named_and_left_alone(checkout: Checkout) -> None:
    checkout.program("python3", PYTHON.replace('exec {sys.executable} "$@" ;;', "exit 1 ;;"))
    (checkout.root / "launch/satisfied.py").write_text("print('einops>=0.8'); raise SystemExit(1)")
    done = checkout.run("launch/local.sh", VIRTUAL_ENV="/somewhere")
    assert "the active environment lacks einops>=0.8: using .venv" in done.stderr
    assert checkout.calls[0] == "venv"


def test_unknown_extra_is_refused(checkout: Checkout) -> None:
    done = checkout.run("launch/local.sh", EXTRAS="fa9")
    assert done.returncode == 2
    assert "there is no extra 'fa9' in pyproject.toml, only train, " in done.stderr
    assert checkout.calls == []


def test_old_python_is_refused(checkout: Checkout) -> None:
    checkout.program("oldpython", "#!/bin/sh\ncase $1 in --version) echo Python 3.8.1 ;; *) exit 1 ;; esac\n")
    done = checkout.run("launch/local.sh", PYTHON="oldpython")
    assert done.returncode == 1
    assert "Python 3.11 or newer is needed, found oldpython: Python 3.8.1" in done.stderr


def test_real_check_agrees_with_this_environment() -> None:
    check = [sys.executable, "launch/satisfied.py"]
    done = subprocess.run(check, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_real_check_names_what_is_missing(checkout: Checkout) -> None:
    (checkout.root / "pyproject.toml").write_text(
        '[project]\ndependencies = ["pytest>=8", "absent-thing; python_version < \'3\'"]\n'
        '[project.optional-dependencies]\nnew = ["pytest>=9999"]\nnone = ["ringattn-absent-thing>=2"]\n'
    )
    found = {}
    for extras in ([], ["new"], ["none"]):
        command = [sys.executable, "launch/satisfied.py", *extras]
        found[" ".join(extras)] = subprocess.run(command, cwd=checkout.root, capture_output=True, text=True).stdout
    assert found[""] == ""
    assert found["new"].startswith("pytest>=9999 (found ")
    assert found["none"] == "ringattn-absent-thing>=2\n"

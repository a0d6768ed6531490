"""A wheel is built, installed into an environment of its own and trained with, where the checkout is out of reach."""

import shutil
import signal
import subprocess
import sys
import time
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.test_import import ROOT

pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (find_spec("pip") and find_spec("setuptools")), reason="building needs pip and setuptools"),
]

SMALL = [
    "model.config.hidden_size=32",
    "model.config.intermediate_size=48",
    "model.config.num_attention_heads=4",
    "model.config.num_key_value_heads=2",
    "data.seq_len=384",
]
LIMIT = 300  # seconds after which a run hangs


class Environment(NamedTuple):
    """An environment with the package, and an empty folder to work in."""

    folder: Path
    work: Path

    def start(self, *command: str) -> "subprocess.Popen[str]":
        programs = self.folder / "bin"
        variables = {"PATH": f"{programs}:/usr/bin:/bin", "HOME": str(self.work), "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.Popen(
            [str(programs / command[0]), *command[1:]],
            cwd=self.work,
            env=variables,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def run(self, *command: str) -> str:
        process = self.start(*command)
        try:
            text, _ = process.communicate(timeout=LIMIT)
        finally:
            process.kill()
        assert process.returncode == 0, text
        return text

    @property
    def output(self) -> Path:
        return self.work / "outputs" / "tiny-stdlib"

    def steps(self) -> int:
        return len((self.output / "metrics.jsonl").read_text().splitlines())

    def checkpoints(self) -> set[str]:
        return {path.name for path in (self.output / "checkpoints").iterdir()}


def pip(python: Path | str, *arguments: str) -> None:
    # Nothing is fetched: what the package needs is there already.
    command = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", "--quiet"]
    done = subprocess.run(
        [*command, *arguments, "--no-deps", "--no-index", "--no-build-isolation"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def environment(folder: Path) -> Environment:
    """Has what this one has, but for this one's own ringattn: links to checkouts stand in files that are not read."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site / "others.pth").write_text("\n".join(others))
    (folder / "work").mkdir()
    return Environment(folder / "venv", folder / "work")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy: building leaves files behind, and would take up those of an earlier build."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("ringattn", "recipes", "configs", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip(sys.executable, "wheel", "--wheel-dir", str(folder), str(checkout))
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    made = environment(tmp_path_factory.mktemp("installed"))
    pip(made.folder / "bin" / "python", "install", str(wheel))
    return made


def test_a_wheel_holds_package_recipes_and_configurations_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = archive.read(next(name for name in archive.namelist() if name.endswith("/METADATA"))).decode()
    code = {str(path.relative_to(ROOT)) for path in (ROOT / "ringattn").rglob("*.py")}
    recipes = {f"ringattn/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.py")}
    configs = {f"ringattn/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert {"ringattn/recipes/train.py", "ringattn/configs/model/tiny.yaml"} <= recipes | configs
    assert names == {"ringattn/py.typed", "ringattn/training/page/page.html.jinja"} | code | recipes | configs
    assert "Requires-Dist: transformers" in metadata
    assert "License-File: LICENSE" in metadata


@pytest.fixture(scope="module")
def trained(installed: Environment) -> str:
    """What a run of two steps says; its folder is the default one."""
    return installed.run("ringattn", "train", *SMALL, "run.steps=2")


def test_an_installed_package_trains_outside_of_the_checkout(installed: Environment, trained: str) -> None:
    where = installed.run("python", "-c", "import ringattn; print(ringattn.__file__)")
    assert Path(where.strip()).is_relative_to(installed.folder)
    assert "ringattn: 0 GPUs: 2 ranks" in trained
    assert "2 ranks on cpu" in trained
    assert installed.steps() == 2
    assert installed.checkpoints() == {"step-00000002"}


@pytest.mark.nightly
def test_ones_own_configuration_goes_on_and_a_signal_saves(installed: Environment, trained: str) -> None:
    own = installed.work / "own"
    for group, name, shipped in (("optim", "adamw", "adamw"), ("run", "long", "default")):
        (own / group).mkdir(parents=True)
        text = (ROOT / "configs" / group / f"{shipped}.yaml").read_text()
        (own / group / f"{name}.yaml").write_text(text.replace("clip: 1.0", "clip: 0.25"))
    (own / "mine.yaml").write_text("defaults: [train, _self_]\nrun: {steps: 100000, save_every: 0, resume: force}\n")
    options = ("--nproc", "2", "--config-dir", "own", "--config-name", "mine", "run=long")
    process = installed.start("ringattn", "train", *options, *SMALL)
    try:
        deadline = time.monotonic() + LIMIT
        while installed.steps() < 4 and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        text, _ = process.communicate(timeout=LIMIT)
    finally:
        process.kill()
    assert "from step 2" in text
    assert "start again with the same command" in text
    assert f"step-{installed.steps():08d}" in installed.checkpoints()
    assert "clip: 0.25" in (installed.output / "config.yaml").read_text()


def test_the_benchmark_is_a_module_of_an_installed_package(installed: Environment) -> None:
    shown = installed.run("python", "-m", "ringattn.recipes.benchmark", "--cfg", "job")
    assert shown.startswith("workloads:\n")


def test_an_editable_installation_reads_the_files_of_its_checkout(checkout: Path, tmp_path: Path) -> None:
    made = environment(tmp_path)
    pip(made.folder / "bin" / "python", "install", "--editable", str(checkout))
    steps = checkout / "configs" / "run" / "default.yaml"
    steps.write_text(steps.read_text().replace("steps: 160", "steps: 7"))
    assert "\nrun:\n  steps: 7\n" in made.run("ringattn", "train", "--cfg", "job")

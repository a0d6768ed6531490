"""The README, CONTRIBUTING and the pages of docs/ are true: their blocks run, their links lead somewhere.

A block of Python runs in a process of its own names. A comment above a block says otherwise:

    <!-- run: 2 ranks -->                        on two gloo ranks, as under torchrun
    <!-- run: 2 ranks, given a saved model -->    the same, with `path`, `ids` and `lengths` given
    <!-- not run: REASON -->                      compiled only

Shell blocks are parsed, command by command: options exist, overrides compose, files are there. Commands that only plan
are run too.
"""

import argparse
import contextlib
import importlib.util
import os
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from hydra import compose, initialize_config_dir

from benchmarks.training.options import checked, parser
from ringattn.cli import join_negative, main, make_parser
from ringattn.environment import VARIABLES
from tests.pool import Pools

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"(?:<!-- (?P<marker>(?:not )?run: [^\n]*?) -->\n)?```(?P<language>python|bash)\n(?P<source>.*?)```", re.S
)
MARKERS = ("", "run: 2 ranks", "run: 2 ranks, given a saved model")
CHEAP = ("doctor", "plan", "simulate")
BASH_ITS_OWN = {"BASH_SOURCE", "PWD", "SECONDS", "PYTHONPATH"}


class Block(NamedTuple):
    page: Path
    line: int
    marker: str
    language: str
    source: str


def blocks(language: str) -> list[Any]:
    """Every block of a language, with the page and line as its name."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in BLOCK.finditer(text):
            if match["language"] == language:
                line = text.count("\n", 0, match.start("source")) + 1
                block = Block(page, line, match["marker"] or "", language, match["source"])
                found.append(pytest.param(block, id=f"{page.relative_to(ROOT)}:{line}"))
    return found


def test_blocks_are_found_and_few_are_not_run() -> None:
    """Every fence of the two languages is seen by the pattern, and what cannot run is rare."""
    fences = sum(len(re.findall(r"^```(?:python|bash)$", page.read_text(encoding="utf-8"), re.M)) for page in PAGES)
    found = [param.values[0] for language in ("python", "bash") for param in blocks(language)]
    assert len(found) == fences
    unrun = [block for block in found if block.marker.startswith("not run: ")]
    assert len(unrun) <= 2
    assert {block.marker for block in found if block not in unrun} == set(MARKERS)


def run_block(source: str, name: str, given: dict[str, Any]) -> None:
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # gloo ranks compute on CPUs, also beside devices
    try:
        exec(compile(source, name, "exec"), {"__name__": "__main__", **given})
    finally:
        if hidden is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = hidden


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A tiny Llama in a folder, and a batch of two documents for it."""
    transformers = pytest.importorskip("transformers")
    import torch

    folder = tmp_path_factory.mktemp("model")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return {"path": str(folder), "ids": torch.arange(48)[None] % 64, "lengths": [30, 18]}


@pytest.mark.parametrize("block", blocks("python"))
def test_python_runs(block: Block, pool: Pools, request: pytest.FixtureRequest) -> None:
    name = f"{block.page.name}:{block.line}"
    # The page about schemes goes together: tests/parallel/test_adding_a_scheme.py adds what it says, and runs it.
    if block.marker.startswith("not run: ") or block.page.name == "adding-a-scheme.md":
        compile(block.source, name, "exec")
        return
    given = request.getfixturevalue("saved_model") if "given a saved model" in block.marker else {}
    pool(2 if "2 ranks" in block.marker else 1).run(run_block, block.source, name, given)


@pytest.mark.parametrize("block", blocks("bash"))
def test_commands_exist(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").symlink_to(ROOT / "docs")  # commands name files below the root, and write where they run
    lines = block.source.replace("\\\n", " ").splitlines()
    for words in filter(None, (shlex.split(line, comments=True) for line in lines)):
        while re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        check(words)


def check(words: Sequence[str]) -> None:
    """Raises if a command could not be called like this."""
    program, *rest = words
    if program not in CHECKS:
        raise AssertionError(f"no test knows {program!r}: {' '.join(words)}")
    CHECKS[program](rest)


def check_script(rest: Sequence[str]) -> None:
    script, *arguments = rest
    assert (ROOT / script).is_file(), script
    if script in ("launch/local.sh", "launch/slurm.sbatch"):
        composes("train", arguments)
    elif script == "launch/torchrun.sh":
        usage = (ROOT / script).read_text(encoding="utf-8")
        options = [word for word in arguments if word.startswith("--")]
        assert all(f"  {option} " in usage for option in options), options
        composes("train", [word for word in arguments if "=" in word])


def check_torchrun(rest: Sequence[str]) -> None:
    assert rest[0] == "--nproc-per-node"
    assert rest[1].isdecimal()
    if rest[2] == "-m":
        check(rest[3:])
        return
    assert (ROOT / rest[2]).is_file()
    composes(Path(rest[2]).stem, rest[3:])


def check_ringattn(rest: Sequence[str]) -> None:
    if rest[0] in ("train", "data", "evaluate"):
        composes("evaluate" if rest[0] == "evaluate" else "train", rest[1:])
        return
    with contextlib.redirect_stderr(None):
        make_parser().parse_args(join_negative(list(rest)))
    if rest[0] in CHEAP:
        assert main(list(rest)) == 0


def check_python(rest: Sequence[str]) -> None:
    if rest[0] == "-c":
        exec(rest[1], {})
    elif rest[0] == "-m":
        made = ROOT.joinpath(*rest[1].split("."))
        ours = made.is_dir() or made.with_suffix(".py").is_file()
        assert ours or rest[1] in ("ruff", "mypy", "pytest", "zensical") or importlib.util.find_spec(rest[1]), rest
        if rest[1] in CHECKS:
            check(rest[1:])
    else:
        assert (ROOT / rest[0]).is_file(), rest[0]


def check_training_benchmark(rest: Sequence[str]) -> None:
    with contextlib.redirect_stderr(None):
        checked(parser().parse_args(rest))


def check_pip(rest: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("action", choices=["install"])
    for option in ("-e", "-c"):
        parser.add_argument(option)
    asked = parser.parse_args(list(rest))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    wanted = re.fullmatch(r"\.\[([a-z0-9,]+)\]", asked.e)
    assert wanted, asked.e
    assert set(wanted[1].split(",")) <= set(extras)
    assert asked.c is None or (ROOT / asked.c).is_file()


def check_file(rest: Sequence[str], *action: str) -> None:
    *before, file = rest
    assert before == list(action)
    assert (ROOT / file).is_file(), file


CHECKS: dict[str, Callable[[Sequence[str]], None]] = {
    "bash": check_script,
    "sbatch": check_script,
    "torchrun": check_torchrun,
    "ringattn": check_ringattn,
    "python": check_python,
    "benchmarks.training": check_training_benchmark,
    "pip": check_pip,
    "srun": lambda rest: check([word for word in rest if word != "--ntasks-per-node=1"]),
    "kubectl": lambda rest: check_file(rest, "apply", "-f"),
    "sky": lambda rest: check_file(rest, "jobs", "launch"),
}


def composes(name: str, overrides: Sequence[str]) -> None:
    """Raises for a key or an option that configs/ does not have."""
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        compose(name, overrides=list(overrides))


def test_links_of_files_outside_of_the_site_lead_somewhere() -> None:
    """Those between pages of docs/ are checked where the site is built."""
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "LOG.md"):
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#\s]+)", text):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readme_is_short_and_names_the_test_command() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 140
    assert "\nbash launch/test.sh " in text


def test_the_measured_table_is_that_of_its_file() -> None:
    """Time of the kernel over that of a system, forward and backward; "none" where the file has a reason instead."""
    contestants = ["auto:2", "plain-ulysses", "rfa-llama3", "rfa-zigzag", "usp:2x1", "torch-cp"]
    measured: dict[tuple[str, str], str] = {}
    kernel: dict[str, float] = {}
    for line in (ROOT / "benchmarks" / "results" / "peers-h100-x2.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 14 and cells[1] == "kernel alone":
            kernel[cells[0]] = float(cells[3])
        elif len(cells) == 14 and cells[1] in contestants:
            share = f"{kernel[cells[0]] / float(cells[3]):.2f}".lstrip("0") if cells[3] else "none"
            measured[cells[0], cells[1]] = share
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+64k|hist16k): [^|]*\|(.*)\|$", text, re.M)
    assert len(rows) == 6
    for workload, numbers in rows:
        shown = [cell.strip(" *") for cell in numbers.split("|")]
        assert shown == [measured[workload, contestant] for contestant in contestants], workload


def test_every_page_stands_in_the_navigation() -> None:
    def pages(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        for part in entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ():
            yield from pages(part)

    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    there = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert sorted(pages(site["nav"])) == sorted(there)


def test_the_log_has_one_form() -> None:
    """Every entry: date and title, then change, prediction, outcome and verdict."""
    text = (ROOT / "benchmarks" / "LOG.md").read_text(encoding="utf-8")
    entries = re.split(r"^## ", text, flags=re.M)[1:]
    assert len(entries) > 30
    for entry in entries:
        title = entry.partition("\n")[0]
        assert re.fullmatch(r"\d{4}-\d\d-\d\d · \S.*", title), title
        assert re.findall(r"^- \*\*(\w+)\.\*\* \S", entry, re.M) == ["Change", "Prediction", "Outcome", "Verdict"], (
            title
        )


def test_every_environment_variable_is_on_its_page() -> None:
    """The package's are listed as their records say; of the launch scripts, those that a person may set."""
    text = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    scripts = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / "launch" / "slurm.sbatch"]
    read = {
        name for file in scripts for name in re.findall(r"\$\{?([A-Z][A-Z0-9_]+)", file.read_text(encoding="utf-8"))
    }
    asked = {name for name in read - BASH_ITS_OWN if not name.startswith("SLURM_")}
    files = [ROOT / "ringattn" / "commands" / name for name in ("train.py", "_torchrun.py")]
    command = "".join(file.read_text(encoding="utf-8") for file in files)
    asked |= set(re.findall(r'environ(?:\.get\(|\[)"([A-Z][A-Z0-9_]+)"', command)) - BASH_ITS_OWN
    assert {"NPROC", "EXTRAS", "NODE_RANK"} <= asked
    missing = [name for name in [*asked, *VARIABLES] if f"`{name}`" not in text]
    assert not missing


def test_the_architecture_lists_the_rooms_that_there_are() -> None:
    """Every folder of the package, and every module beside them in ringattn/ and ringattn/parallel/; nothing else."""
    package = ROOT / "ringattn"
    folders = {path.parent for path in package.rglob("*.py")} - {package}
    modules = {path for room in (package, package / "parallel") for path in room.glob("*.py")}
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(ringattn/[^`]*)` \|", text, re.M)
    there = [f"{path.relative_to(ROOT)}/" for path in folders]
    there += [str(path.relative_to(ROOT)) for path in modules if not path.name.startswith("__")]
    assert sorted(listed) == sorted(there)

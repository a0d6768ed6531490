"""A copy of the launch scripts, with stand-ins for pip, SLURM and `ringattn train` that
write down how they are called."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


# Stands for python3 and, copied by `-m venv`, for .venv/bin/python: it writes down what is installed and launched, and
# leaves everything else to the real one. SATISFIED: exit code of the check of the active environment.
PYTHON = f"""#!/usr/bin/env bash
case "$*" in
    "launch/satisfied.py "*) [ -n "${{SATISFIED:-}}" ] && exit "$SATISFIED"; exec {sys.executable} "$@" ;;
    "-m venv"*) mkdir -p "${{@: -1}}/bin" && cp "$0" "${{@: -1}}/bin/python"; echo "venv" >>"$CALLS" ;;
    "-m pip"*) echo "pip ${{*:3}}" >>"$CALLS"
        case "$*" in *"${{PIP_FAILS_ON:-nothing}}"*) echo "pip: no such thing"; exit 1 ;; esac ;;
    "launch/ending.py "*) echo "${{ENDING:-unknown yes 0}}" ;;
    "-m ringattn preflight"*) echo "preflight ${{*:4}}" >>"$CALLS"; exit "${{PREFLIGHT_EXIT:-0}}" ;;
    "-m ringattn train --cfg"*) echo "output: /shared/run" ;;
    "-m ringattn train"*)
        echo "train ${{*:4}}" >>"$CALLS"
        echo "NNODES=${{NNODES:-}} NODE_RANK=${{NODE_RANK:-}} ENDPOINT=${{ENDPOINT:-}} JOB_ID=${{JOB_ID:-}}" \\
            >>"$CALLS.env"
        exit "${{TRAIN_EXIT:-0}}" ;;
    "-m pytest"*) echo "pytest ${{*:3}}" >>"$CALLS" ;;
    "-c import pip") [ "${{0##*/}}" = python ] ;;
    *) exec {sys.executable} "$@" ;;
esac
"""


class Checkout:
    """A copy of the scripts in a folder of its own, run with stand-ins on PATH."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls_file = root / "calls"
        self.bin = root / "bin"
        for name in ("launch", "bin"):
            (root / name).mkdir()
        for path in [*(ROOT / "launch").iterdir(), ROOT / "pyproject.toml"]:
            if path.is_file():
                (root / path.relative_to(ROOT)).write_bytes(path.read_bytes())
        self.program("python3", PYTHON)

    def program(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def environment(self, **variables: str) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("HOME", "TMPDIR", "LANG") if name in os.environ}
        path = f"{self.bin}:/usr/local/bin:/usr/bin:/bin"
        return {**kept, "PATH": path, "CALLS": str(self.calls_file), "CUDA_VISIBLE_DEVICES": "", **variables}

    def run(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        self.calls_file.write_text("")
        environment = self.environment(**variables)
        return subprocess.run(
            ["bash", *command], cwd=self.root, env=environment, capture_output=True, text=True, timeout=60, check=False
        )

    @property
    def calls(self) -> list[str]:
        return self.calls_file.read_text().splitlines()

    @property
    def machines(self) -> list[str]:
        """What the environment of each call of `ringattn train` says about machines."""
        return (self.root / "calls.env").read_text().splitlines()

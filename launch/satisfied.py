"""Exit 0 if the running interpreter has what pyproject.toml asks for, with the extras given as arguments.

`python launch/satisfied.py train dev`; else print the first unmet requirement and exit 1 (2 for an extra that does not
exist). It reads package metadata and imports nothing heavy, so it costs a fraction of a second.
"""

import sys
import tomllib
from importlib import import_module, metadata
from pathlib import Path

try:
    requirements = import_module("packaging.requirements")
except ImportError:  # a bare virtual environment has it only inside pip
    requirements = import_module("pip._vendor.packaging.requirements")


def unmet(lines: list[str]) -> str | None:
    """The first requirement that is not met, or None."""
    for line in lines:
        requirement = requirements.Requirement(line)
        if requirement.marker and not requirement.marker.evaluate():
            continue
        try:
            installed = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            return line
        if not requirement.specifier.contains(installed, prereleases=True):
            return f"{line} (found {installed})"
    return None


if __name__ == "__main__":
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    for extra in sys.argv[1:]:
        if extra not in optional:
            print(f"there is no extra '{extra}' in pyproject.toml, only {', '.join(optional)}")
            sys.exit(2)
    missing = unmet(project["dependencies"] + [line for extra in sys.argv[1:] for line in optional[extra]])
    if missing:
        print(missing)
    sys.exit(missing is not None)

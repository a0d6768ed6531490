"""The rooms: nothing imports a room that stands after its own or in a circle, and pure rooms stay pure."""

import ast
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ringattn"

# Each room imports only itself and rooms before it. A room is a file or a folder; a folder stands for all that is in it
# but for what has a line of its own. docs/architecture.md says what each is for.
ROOMS = (
    "first_failure", "numbered", "graph_break", "tracing", "whereabouts", "kept", "environment", "shipped", "integers",
    "segments", "mask", "boundaries", "documents", "names", "workloads", "settings",
    "kernels.call", "kernels.spec", "kernels.probing", "kernels.apart", "kernels.movement", "kernels.merge_triton",
    "kernels.merge", "kernels.backends", "kernels.selftest", "kernels.registry", "kernels.tuning", "kernels.support",
    "kernels",
    "parallel.geometry", "parallel.plan", "parallel.transport", "parallel.execution", "parallel.machine",
    "parallel.mesh", "parallel.placement", "parallel.schedules", "parallel.pricing", "parallel.choice",
    "parallel.simulation", "parallel.layout", "parallel.planning", "parallel",
    "recurrent.rounds", "recurrent.plan", "recurrent.halo_plan", "recurrent.price", "recurrent.wire",
    "recurrent.piles", "recurrent.kernels", "recurrent.exchange", "recurrent.walk", "recurrent.scan",
    "recurrent.convolution", "recurrent.recurrence", "recurrent",
    "trees", "preparation", "compiled", "attention", "drawing", "",
    "memory", "memory.planning", "hf", "training", "benchmarking", "preflight", "commands", "cli", "__main__",
)  # fmt: skip
# Integers only: they are computed alike on every rank, and tested without a device.
PURE = (
    "mask", "documents", "parallel.geometry", "parallel.plan", "parallel.placement", "parallel.schedules",
    "parallel.pricing", "parallel.choice", "parallel.simulation", "recurrent.rounds", "recurrent.plan",
    "recurrent.halo_plan", "recurrent.price", "memory.planning",
)  # fmt: skip


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its name without `ringattn.`; the package itself is ""."""
    paths = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    return {name.removesuffix("__init__").removesuffix("."): path for name, path in paths.items()}


@cache
def imports_of(name: str) -> frozenset[str]:
    """Modules of the package that one names in an import, wherever in the file and for whatever."""
    found: set[str] = set()
    tree = ast.parse(modules()[name].read_text())
    for node in ast.walk(tree):
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{name}: relative import in line {node.lineno}"
        if isinstance(node, ast.ImportFrom) and node.module:
            dotted = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {one if known(one) is not None else node.module for one in dotted}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return frozenset(own for one in found if (own := known(one)) is not None and own != name)


def known(dotted: str) -> str | None:
    """The name of a module of the package, or None."""
    top, _, rest = dotted.partition(".")
    return rest if top == "ringattn" and rest in modules() else None


def room_of(name: str) -> str:
    """The most particular room that a module stands in."""
    holding = [room for room in ROOMS if name == room or (room and name.startswith(f"{room}."))]
    assert holding, f"ringattn/{name.replace('.', '/')} stands in no room: give it one in the list"
    return max(holding, key=len)


@pytest.mark.parametrize("name", sorted(modules()))
def test_nothing_imports_a_later_room(name):
    place = ROOMS.index(room_of(name))
    later = sorted(one for one in imports_of(name) if ROOMS.index(room_of(one)) > place)
    assert not later, f"{room_of(name)} stands before what it imports: {', '.join(later)}"


def test_nothing_imports_in_a_circle():
    """Modules that import nothing of what is left are taken away until none is left; what remains goes in circles."""
    left = {name: imports_of(name) for name in modules()}
    while free := [name for name, needed in left.items() if not needed & left.keys()]:
        for name in free:
            del left[name]
    between = {name: sorted(needed & left.keys()) for name, needed in left.items()}
    assert not left, f"circles among {between}"


def test_every_room_is_there():
    assert not [room for room in ROOMS if room not in modules()]


@pytest.mark.parametrize("room", PURE)
def test_pure_rooms_know_no_process_group(room):
    for name, path in modules().items():
        if room_of(name) == room:
            assert "torch.distributed" not in path.read_text(), f"{path} knows of process groups"

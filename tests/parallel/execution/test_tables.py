"""Tables that were made ahead are all that the transfers and calls of an attention read."""

import pytest
import torch

from ringattn import Documents, Layout
from ringattn.kept import kept_keys
from ringattn.parallel.execution.key_transfers import _Moves
from ringattn.parallel.execution.tables import make_tables
from ringattn.parallel.planning.ahead import attentions_of, install, plan_ahead
from tests.dense import Case
from tests.parallel.ranks import attend_on, mesh_of
from tests.pool import Pools

CPU = torch.device("cpu")


def tables(layout: Layout) -> set[str]:
    """The tables that are there, by the place in the plans where they are kept."""
    found = set()
    for _, plans in plan_ahead(layout, ()):
        for part, (_, plan) in enumerate(plans.parts):
            for number, walked in enumerate(plan.passes):
                for at, stage in enumerate(walked.stages):
                    place = f"part {part}, pass {number}, stage {at}"
                    moves = _Moves.of(stage)
                    found |= {f"{place}: {key}" for key in kept_keys(moves)}
                    for call in stage.calls:
                        found |= {f"{place}, call {call.q}: {key}" for key in kept_keys(call) if "tensors" in key}
    return found


def made_and_used(case: Case, scheme: str) -> tuple[set[str], set[str]]:
    mesh = mesh_of(3, 1)
    used = Layout(case.docs, mesh)
    attend_on(used, case, scheme)
    made = Layout(case.docs, mesh)
    install(made, plan_ahead(made, attentions_of(used)))
    for _, plans in plan_ahead(made, ()):
        make_tables(plans, CPU)
    return tables(made), tables(used)


@pytest.mark.parametrize("scheme", ["gather", "ring", "joint"])
def test_nothing_is_left_to_make(pool: Pools, scheme: str) -> None:
    case = Case(Documents([700, 5, 301, 40, 90]), heads=(4, 2), options={"backend": "reference"})
    for made, used in pool(3).run(made_and_used, case, scheme):
        transfers = {name for name in used if "tensors" not in name}
        assert transfers, "an attention without transfers shows nothing"
        assert transfers <= made
        assert any("additions" in name for name in transfers)

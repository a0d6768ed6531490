"""The picture of a run's first pack: who computes what, and what each rank does when, as `ringattn plan` draws it."""

import base64
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

MOST_RANKS = 32  # of a sequence: more take a while to plan
MOST_DOCUMENTS = 20_000


def plan_picture(known: Mapping[str, Any]) -> tuple[str, str, str]:
    """The picture as a data URL, or nothing; what is to be said about it; why it is planned so.

    Arguments:
        known: `attention` of run.json.
    """
    try:
        lengths = [int(length) for length in known["lengths"]]
        mesh = int(known["ring"]), int(known["ulysses"])
        heads = [int(known[name]) for name in ("query_heads", "key_heads", "head_dim")]
        policy, scheme = str(known["policy"]), str(known["scheme"])
    except (KeyError, TypeError, ValueError):
        return "", "the run did not record its first pack", ""
    ranks = mesh[0] * mesh[1]
    if not lengths:
        return "", "the first pack holds no document", ""
    if ranks > MOST_RANKS or len(lengths) > MOST_DOCUMENTS:
        many = f"{len(lengths):,} documents on {ranks} ranks are too many for this page: `ringattn plan` draws them"
        return "", many, ""
    if find_spec("matplotlib") is None:
        return "", "matplotlib, which draws it, is not installed", ""
    try:
        return _drawn(lengths, mesh, heads, policy, scheme)
    except Exception as error:  # the page has more to say, whatever is wrong with the plan of an old run
        return "", f"it cannot be drawn: {type(error).__name__}: {error}", ""


def _drawn(
    lengths: list[int], mesh: tuple[int, int], heads: list[int], policy: str, scheme: str
) -> tuple[str, str, str]:
    from ringattn import Documents, Layout, MeshShape
    from ringattn.drawing import draw_plan
    from ringattn.parallel.machine.shipped import SHIPPED
    from ringattn.parallel.plan.shape import Shape
    from ringattn.parallel.planning.all_ranks import plan_group
    from ringattn.parallel.planning.planner import part_options
    from ringattn.parallel.pricing.setting import PriceInputs
    from ringattn.parallel.simulation.simulate import simulate
    from ringattn.parallel.simulation.spans import PASSES
    from ringattn.settings import AttentionOptions

    machine = SHIPPED["H200"]
    layout = Layout(Documents(lengths), MeshShape(1, *mesh, machine=machine), policy)
    placement, asked = layout.parts[0], AttentionOptions(scheme=scheme)
    shape = Shape(heads[0], heads[1], heads[2], heads[2])
    plans = plan_group(placement, shape, part_options(layout, placement, asked))
    shape = PriceInputs(machine, shape).on(placement).shape
    passes = {name: simulate(machine, plans, shape, backward) for name, backward in PASSES.items()}
    schedules = {name: plans[0].for_pass(backward).schedule_name for name, backward in PASSES.items()}
    title = f"ring {mesh[0]} × ulysses {mesh[1]}, {placement.policy} layout"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.png"
        draw_plan(plans, placement.docs.total, passes, schedules, title, str(path))
        picture = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    many = "" if len(lengths) == 1 else "s"
    parts = f", part 1 of {len(layout.parts)}" if len(layout.parts) > 1 else ""
    told = f"{len(lengths):,} document{many} of together {sum(lengths):,} tokens{parts}, causal"
    return picture, f"{told}, as planned for {machine.name}; times are predictions.", plans[0].reason

"""What every rank would do for a batch of documents, what that costs, and why it is done so.

Without --lengths or --histogram it is one document. Times are predicted for --machine; forward and
backward are planned apart. --draw writes a picture: the mask with every rank's blocks in its
colour, and what each rank does when, as the simulator plays it through.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ringattn.commands import _workload
from ringattn.commands._call import HEADS, RANKS, TOKENS, integer, ranks, tokens
from ringattn.commands._files import check_target, file, reason
from ringattn.commands._plan_states import (
    add_state_arguments,
    examine_states,
    layers_of,
    passes_of_states,
    render_states,
)
from ringattn.commands._text import note, row
from ringattn.parallel.planning.options import scheme_names
from ringattn.settings import AttentionOptions

if TYPE_CHECKING:
    from ringattn import Documents, Layout
    from ringattn.commands._plan_report import PlannedPart
    from ringattn.parallel.simulation.spans import Pass

MANY = 64  # ranks from which on planning takes a while


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=tokens, metavar="T", help="tokens of the packed stream, e.g. 262144")
    parser.add_argument("--ring", type=ranks, default=1, metavar="R", help="ranks that pass keys, default 1")
    parser.add_argument("--ulysses", type=ranks, default=1, metavar="U", help="ranks that exchange heads, default 1")
    parser.add_argument(
        "--sequence", type=ranks, metavar="N", help="ranks, in place of --ring and --ulysses, which are then chosen"
    )
    parser.add_argument("--scheme", choices=scheme_names(), default="auto", help="how keys or heads move, default auto")
    parser.add_argument("--stages", type=ranks, metavar="N", help="stages of --scheme ring, the local one included")
    parser.add_argument("--memory", type=integer(TOKENS), metavar="MIB", help="limit of a rank's buffers")
    parser.add_argument(
        "--head-chunks",
        type=integer(HEADS),
        metavar="N",
        help="chunks of heads, computed one after another; default: 1, or the fastest that keep --memory",
    )
    _workload.add_workload_arguments(parser)
    add_state_arguments(parser)
    parser.add_argument(
        "--recurrent-layers",
        type=integer(HEADS),
        default=1,
        metavar="N",
        help="how many of --recurrent a model has for each layer of attention, by which degrees and --policy auto are "
        "chosen; default 1",
    )
    segments = parser.add_argument_group("what tokens see beyond their mask")
    segments.add_argument(
        "--parents",
        type=file,
        metavar="FILE",
        help="text file with, for each of --lengths, the number of the one before it (from 0) that it follows on in a "
        "tree, or -1: completions of one prompt are 4096 1024 1024 with -1 0 0",
    )
    segments.add_argument(
        "--blocks",
        type=file,
        metavar="FILE",
        help="text file with two numbers for each block (an image, a prefix), its first token and the one after its "
        "last: its tokens see each other",
    )
    parser.add_argument(
        "--draw", type=file, metavar="FILE", help="write a picture: .png or .svg; missing folders are made"
    )
    parser.add_argument("--json", action="store_true", help="print the table as one JSON object")


def run(args: argparse.Namespace) -> int:
    from ringattn.commands._plan_report import examine
    from ringattn.commands._plan_text import render
    from ringattn.drawing import check_drawing

    try:
        if args.draw is not None:
            check_drawing(str(args.draw))
            check_target("--draw", args.draw)
        layout, parts = plan(args)
        states = examine_states(args, layout)
    except (ValueError, NotImplementedError) as error:
        args.parser.error(str(error))
    reports = [examine(part, args) for part in parts]
    if args.json:
        whole = {"reason": layout.reason, "parts": reports} if len(layout.parts) > 1 else reports[0]
        print(json.dumps(whole if states is None else whole | {"recurrent": states}, indent=2))
    else:
        last = [] if states is None else [render_states(states)]
        why = why_chosen(layout, "degrees" if args.sequence else "layout")
        print("\n\n".join([*why, *map(render, reports), *last]))
    for number, (part, report) in enumerate(zip(parts, reports, strict=True), 1):
        if args.draw is not None:
            path: Path = args.draw
            beside = ({}, {}) if states is None else passes_of_states(args, layout, states["route"])
            draw(part, report, str(path.with_stem(f"{path.stem}-{number}") if len(layout.parts) > 1 else path), *beside)
    return 0


def plan(args: argparse.Namespace) -> "tuple[Layout, list[PlannedPart]]":
    """The layout, and the plans that the report and the picture speak of: of each part, or of the whole."""
    from ringattn.commands._plan_report import PlannedPart
    from ringattn.parallel.planning.all_ranks import plan_group
    from ringattn.parallel.planning.planner import part_options
    from ringattn.parallel.pricing.memory import buffer_bytes

    layout, asked = layout_of(args), options_of(args)
    planned = []
    for placement in layout.parts:
        options, setting = part_options(layout, placement, asked), _workload.setting(args, placement)
        plans = plan_group(placement, setting.shape, options)
        setting = replace(setting, head_chunks=plans[0].head_chunks)
        planned.append(PlannedPart(placement, asked, setting, plans))
        if asked.memory_limit is not None:
            taken = max(buffer_bytes(plan, setting.shape) for plan in plans)
            asked = asked._replace(memory_limit=asked.memory_limit - taken)
    return layout, planned


def options_of(args: argparse.Namespace) -> AttentionOptions:
    """What is asked of the attention."""
    return AttentionOptions(
        _workload.mask(args),
        scheme=args.scheme,
        stages=args.stages,
        memory_limit=None if args.memory is None else args.memory << 20,
        head_chunks=args.head_chunks,
    )


def layout_of(args: argparse.Namespace) -> "Layout":
    """The documents on their ranks, checked: raises ValueError for what the options cannot have together."""
    from ringattn import Layout
    from ringattn.parallel.planning.options import check_scheme
    from ringattn.recurrent.weighing import weigh

    documents, mask = documents_of(args), _workload.mask(args)
    documents.check_mask(mask)
    if args.sequence is not None and (args.ring, args.ulysses) != (1, 1):
        raise ValueError(f"--sequence {args.sequence} leaves --ring and --ulysses to the documents")
    size = args.sequence or args.ring * args.ulysses
    if size > RANKS:
        raise ValueError(f"--ring × --ulysses must be at most {RANKS} ranks, got {size}")
    if size > MANY:
        note(f"{size} ranks are planned, priced on every mesh and played through: that takes a while")
    free = args.sequence is not None
    mesh = _workload.free_mesh(args, size) if free else _workload.mesh(args, args.ring, args.ulysses)
    layers = layers_of(args, mask)
    if layers is not None and args.policy == "auto":
        layout = weigh(documents, mesh, layers).layout
    elif free:
        layout = Layout(documents, mesh, args.policy, mask, heads=args.heads, head_dim=args.head_dim)
    else:
        layout = Layout(documents, mesh, args.policy, mask)
    check_scheme(options_of(args), layout.mesh, len(layout.parts))
    return layout


def documents_of(args: argparse.Namespace) -> "Documents":
    """The documents, with the trees and blocks that files name."""
    from ringattn import Documents

    lengths = _workload.lengths(args, args.tokens, args.seed)
    blocks = [] if args.blocks is None else _numbers("--blocks", args.blocks)
    if len(blocks) % 2:
        raise ValueError(f"--blocks {args.blocks} must hold two numbers for each block, got {len(blocks)} in all")
    pairs = list(zip(blocks[::2], blocks[1::2], strict=True))
    if args.parents is None:
        return Documents(lengths, blocks=pairs)
    if args.lengths is None:
        raise ValueError(f"--parents {args.parents} names the segments of a tree: it needs --lengths")
    return Documents.from_tree(lengths, _numbers("--parents", args.parents), pairs)


def _numbers(option: str, path: Path) -> list[int]:
    """The integers of a text file; what stands after a # is a comment."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [int(word) for line in lines for word in line.partition("#")[0].replace(",", " ").split()]
    except OSError as error:
        raise ValueError(f"{option} {path} cannot be read: {reason(error)}") from None
    except ValueError as error:
        raise ValueError(f"{option} {path} must hold integers: {error}") from None


def why_chosen(layout: "Layout", what: str) -> list[str]:
    """Why these degrees, or this policy, where they were chosen."""
    if not layout.reason:
        return []
    lines = row(what, layout.reason)
    if len(layout.parts) > 1:
        lines += row("parts", "each is described by itself; what one waits for travels while another computes")
    return ["\n".join(lines)]


def draw(
    part: "PlannedPart", report: dict[str, Any], path: str, passes: "dict[str, Pass]", told: dict[str, str]
) -> None:
    """A part's picture, and beside it passes of a layer with a state, of all parts together."""
    from ringattn.drawing import draw_plan

    documents, mesh = report["documents"], report["mesh"]
    title = (
        f"{documents['count']} document{'s' * (documents['count'] != 1)}, {documents['tokens']:,} tokens on ring "
        f"{mesh['ring']} × ulysses {mesh['ulysses']}, {report['policy']} layout"
    )
    schedules = {**report["schedule"], **told}
    draw_plan(part.plans, part.placement.docs.total, {**part.passes, **passes}, schedules, title, path)

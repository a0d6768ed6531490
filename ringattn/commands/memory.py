"""What a training run would hold on each rank and how long a step takes, and the fastest settings that fit.

    ringattn memory --model llama_8b --seq-len 1M --gpus 8 --gpu-memory 140 --host-memory 1500
    ringattn memory --seq-len 128K --gpus 2 --keep attention --loss-tile 2048
    ringattn memory --gpus 8 --longest

Settings that are not given are chosen: of all that fit, the fastest. Other degrees of the mesh than
the fastest, and several chunks of heads, are tried where nothing fits without. What changes the
numbers that a run computes (--weights, --moments, --reduce) is never chosen. Planned from the
shapes of the model, for packs of one document, which is the dearest; no GPU is needed. Exit code 2
if nothing fits, with what would make it fit.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ringattn.commands import _workload
from ringattn.commands._call import HEADS, TOKENS, integer, ranks
from ringattn.commands._files import check_target, file
from ringattn.memory.settings import CHOICES

if TYPE_CHECKING:
    from ringattn.memory.planning.choice import Choice
    from ringattn.memory.planning.limits import Limits
    from ringattn.memory.planning.shapes import ModelShape, RunShape
    from ringattn.parallel.machine.machine import Machine

AUTO = "auto"
SUFFIXES = {"K": 1 << 10, "M": 1 << 20}
TILES, COUNTS = ("loss_tile", "mlp_tile"), ("every", "host_layers", "prefetch")
WORDS = {"true": True, "false": False}
LARGEST = 1 << 20  # GiB
MARGIN = 0.05  # as in configs/memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default="llama_8b", metavar="NAME", help="file of configs/model, or the folder of a saved model"
    )
    parser.add_argument("--layers", type=integer(HEADS), metavar="N", help="layers, default all of the model")
    parser.add_argument("--seq-len", type=length, metavar="T", help="tokens of a pack, as 131072, 128K or 1M")
    parser.add_argument("--gpus", type=ranks, default=8, metavar="N", help="all GPUs, default 8")
    parser.add_argument("--data", type=ranks, default=1, metavar="D", help="groups with packs of their own, default 1")
    parser.add_argument("--ring", type=ranks, metavar="R", help="ranks that pass keys; default: the fastest that fit")
    parser.add_argument(
        "--ulysses", type=ranks, metavar="U", help="ranks that exchange heads; default: the fastest that fit"
    )
    parser.add_argument(
        "--head-chunks",
        type=integer(HEADS),
        metavar="N",
        help="as parallel.head_chunks: chunks of heads that attention is computed in; default: one, or the fastest "
        "that fit",
    )
    parser.add_argument("--micro-steps", type=integer(TOKENS), default=1, metavar="N", help="packs of a rank in a step")
    parser.add_argument("--engine", choices=("fsdp2", "deepspeed"), default="fsdp2", help="default fsdp2")
    parser.add_argument("--zero-stage", type=integer(3), default=3, metavar="N", help="of deepspeed, default 3")
    parser.add_argument(
        "--compile",
        choices=("elementwise", "none"),
        default="elementwise",
        help="as engine.compile; default elementwise, as the recipe does on GPUs",
    )
    parser.add_argument("--gpu-memory", type=gibibytes, default=140.0, metavar="GIB", help="of a GPU, default 140")
    parser.add_argument(
        "--host-memory", type=gibibytes, metavar="GIB", help="of a machine, for all its GPUs; default: no limit"
    )
    parser.add_argument(
        "--margin", type=share, default=MARGIN, metavar="SHARE", help=f"of either to leave free, default {MARGIN:g}"
    )
    parser.add_argument("--machine", metavar="NAME", help="whose speeds are used, as of `ringattn plan`")
    parser.add_argument("--longest", action="store_true", help="say how long a pack can be, and plan that")
    add_settings(parser)
    parser.add_argument(
        "--draw", type=file, metavar="FILE", help="write a picture: .png or .svg; missing folders are made"
    )
    parser.add_argument("--json", action="store_true", help="print it as one JSON object")


def add_settings(parser: argparse.ArgumentParser) -> None:
    """The fields of the settings, each "auto" by default."""
    group = parser.add_argument_group('settings, as of the recipe\'s group memory; default "auto"')
    for name in TILES:
        group.add_argument(option(name), type=tile, metavar="TOKENS", help="tokens of a tile, or none")
    for name, choices in CHOICES.items():
        also = (AUTO,) if name in ("keep", "states_on") else ()
        group.add_argument(option(name), choices=(*choices, *also), help=None if also else "default float32")
    for name in COUNTS:
        group.add_argument(option(name), type=count, metavar="LAYERS", help="a number of layers")
    group.add_argument("--reshard", choices=(*WORDS, AUTO), help="let gathered weights go after a layer's forward pass")


def option(name: str) -> str:
    """A field as an option."""
    return f"--{name.replace('_', '-')}"


def run(args: argparse.Namespace) -> int:
    from ringattn.drawing import check_drawing
    from ringattn.memory.planning.drawing import draw_memory
    from ringattn.memory.planning.items import ITEMS

    try:
        if args.draw is not None:
            check_drawing(str(args.draw))
            check_target("--draw", args.draw)
        choice = examine(args)
    except (ValueError, NotImplementedError) as error:
        args.parser.error(str(error))
    print(json.dumps(report(choice), indent=2) if args.json else choice.text())
    if args.draw is not None:
        plan = choice.plan
        there = {item for items in (plan.host, *(moment.items for moment in plan.peaks.values())) for item in items}
        bars = {
            name: {item: moment.items.get(item, 0) for item in ITEMS if item in there}
            for name, moment in plan.peaks.items()
        }
        what = f"{plan.model.name}, {plan.run.tokens:,} tokens on {plan.run.ranks} GPUs"
        title = f"{what}: memory of a rank, and a step's time"
        draw_memory(bars, plan.host, choice.limits.device_room, choice.time.items, title, str(args.draw))
    return 0


def examine(args: argparse.Namespace) -> "Choice":
    """The choice that is asked for. Raises ValueError for options that cannot go together, or where nothing fits."""
    from ringattn.memory.planning.choice import longest, plan_run
    from ringattn.memory.planning.ways import FreeShape

    machine = _workload.machine(args)
    model = shape_of_model(args)
    room = limits(args, machine)
    if args.longest == (args.seq_len is not None):
        raise ValueError("expected --seq-len, or --longest to find it")
    shape, wanted = run_shape(args, model), fixed(args)
    free = FreeShape(degrees=args.ring is None and args.ulysses is None, chunks=args.head_chunks is None)
    if args.longest:
        tokens = longest(model, shape, wanted, room, machine, free)
        if not tokens:
            raise ValueError(f"--longest: not even {shape.tokens} tokens of {model.name} fit {shape.ranks} GPUs")
        shape = replace(shape, tokens=tokens)
    return plan_run(model, shape, wanted, room, machine, free)


def fixed(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given."""
    given = {name: getattr(args, name) for name in (*TILES, *CHOICES, *COUNTS, "reshard")}
    found = {name: WORDS.get(value, value) if isinstance(value, str) else value for name, value in given.items()}
    return {name: None if value == "none" else value for name, value in found.items() if value not in (None, AUTO)}


def run_shape(args: argparse.Namespace, model: "ModelShape") -> "RunShape":
    """Tokens and ranks; of degrees that were left open the product counts.

    Raises ValueError for chunks into which the heads of no rank part.
    """
    from ringattn.memory.planning.shapes import RunShape
    from ringattn.parallel.mesh.shape import resolve_mesh

    try:
        mesh = resolve_mesh(args.gpus, args.data, args.ring, args.ulysses)
    except ValueError as error:
        raise ValueError(f"--gpus {args.gpus}: {error}") from None
    open_degrees = args.ring is None and args.ulysses is None
    least = 1 if open_degrees else mesh.ulysses
    if (chunks := args.head_chunks or 1) not in (possible := model.head_chunks(least)):
        told = ", ".join(map(str, possible))
        raise ValueError(
            f"--head-chunks {chunks} must divide the key heads of a rank; with ulysses {least} there may be {told}"
        )
    return RunShape(
        tokens=args.seq_len or 1024 * mesh.sequence_size,
        ring=mesh.ring,
        ulysses=mesh.ulysses,
        data=mesh.data,
        engine=args.engine,
        zero_stage=args.zero_stage,
        micro_steps=args.micro_steps,
        head_chunks=chunks,
        fused=args.compile == "elementwise",
    )


def limits(args: argparse.Namespace, machine: "Machine") -> "Limits":
    """What the machine has."""
    from ringattn.memory.planning.limits import GIB, Limits

    host = None if args.host_memory is None else args.host_memory * GIB
    return Limits(args.gpu_memory * GIB, host, machine.gpus_per_node, args.margin)


def shape_of_model(args: argparse.Namespace) -> "ModelShape":
    """The shape of a model by its name or folder. Raises ValueError if there is none."""
    from ringattn.shipped import CONFIGS

    try:
        import yaml

        from ringattn.hf.shape import model_shape
        from ringattn.training.model.models import empty_model, model_config
    except ImportError as error:
        raise ValueError(f"--model needs transformers: pip install 'ringattn[train]' ({error})") from None
    shipped = {path.stem: path for path in sorted((CONFIGS / "model").glob("*.yaml"))}
    if args.model in shipped:
        values = yaml.safe_load(shipped[args.model].read_text(encoding="utf-8"))
        config, name = model_config(values["family"], values["path"], values["config"]), args.model
    elif Path(args.model).expanduser().is_dir():
        config, name = model_config(None, args.model, {}), Path(args.model).expanduser().resolve().name
    else:
        raise ValueError(f"--model must be {', '.join(shipped)} or the folder of a saved model, got {args.model!r}")
    shape = model_shape(empty_model(config), config, name)
    return shape if args.layers is None else shape.with_layers(args.layers)


def report(choice: "Choice") -> dict[str, Any]:
    """Everything that the tables say, as plain values; bytes and seconds."""
    plan, time, run = choice.plan, choice.time, choice.plan.run
    return {
        "model": {"name": plan.model.name, "parameters": plan.model.total.count, "layers": len(plan.model.layers)},
        "run": {
            "tokens": run.tokens,
            "local_tokens": run.local_tokens,
            **{
                name: getattr(run, name) for name in ("ring", "ulysses", "data", "micro_steps", "head_chunks", "engine")
            },
        },
        "machine": {"name": choice.machine.name, **choice.machine.provenance},
        "limits": {"device": choice.limits.device_room, "host": finite(choice.limits.host_room(run.ranks))},
        "settings": choice.settled.values,
        "fixed": sorted([*choice.fixed, *([] if choice.free.chunks else ["head_chunks"])]),
        "memory": {
            phase: {"at": moment.name, "total": moment.total, "items": dict(moment.items)}
            for phase, moment in plan.peaks.items()
        },
        "host": plan.host,
        "outside": plan.outside,
        "seconds": time.items,
        "tokens_per_second_per_gpu": time.tokens_per_second,
        "mfu": time.mfu,
        "alternatives": [
            {
                "key": one.key,
                "value": one.value,
                "device": one.settled.alive.peak().total,
                "host": sum(one.settled.alive.host.values()),
                "seconds": one.settled.time.seconds,
                "reason": one.reason,
            }
            for one in choice.alternatives
        ],
    }


def finite(size: float) -> float | None:
    """A number that JSON has."""
    return size if size < float("inf") else None


def length(text: str) -> int:
    """`131072`, `128K` or `1M`."""
    number, factor = (text[:-1], SUFFIXES[text[-1]]) if text[-1:] in SUFFIXES else (text, 1)
    if not number.isdecimal() or not 1 <= int(number) * factor <= TOKENS:
        raise argparse.ArgumentTypeError(f"expected tokens from 1 to {TOKENS}, as 131072, 128K or 1M, got {text!r}")
    return int(number) * factor


def tile(text: str) -> int | str:
    """Tokens, `none` or `auto`."""
    return text if text in ("none", AUTO) else length(text)


def count(text: str) -> int | str:
    """A number from 0, or `auto`."""
    if text != AUTO and not (text.isdecimal() and int(text) <= HEADS):
        raise argparse.ArgumentTypeError(f"expected a number from 0 to {HEADS} or auto, got {text!r}")
    return text if text == AUTO else int(text)


def share(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 <= found < 1:
        raise argparse.ArgumentTypeError(f"expected a share, a number from 0 up to 1, got {text!r}")
    return found


def gibibytes(text: str) -> float:
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 0 < size <= LARGEST:
        raise argparse.ArgumentTypeError(f"expected GiB, a number above 0 and up to {LARGEST}, got {text!r}")
    return size

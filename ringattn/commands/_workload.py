"""The options that describe documents, ranks and a machine, shared by the commands that plan."""

import argparse
from pathlib import Path
from typing import Any

from ringattn.commands._call import TOKENS, head_dim, heads, window
from ringattn.commands._call import tokens as token_count
from ringattn.commands._files import file, reason
from ringattn.parallel.placement.placement import POLICIES

DOCUMENTS = 1 << 18  # planned within a minute
COPY, GRAPH = "+copy", "+graph"  # after the name of a machine, in this order


def add_workload_arguments(parser: argparse.ArgumentParser) -> None:
    from ringattn.workloads import HISTOGRAMS

    documents = parser.add_argument_group("the documents")
    source = documents.add_mutually_exclusive_group()
    source.add_argument(
        "--lengths", type=file, metavar="FILE", help="text file with the lengths of documents, in tokens"
    )
    source.add_argument(
        "--histogram", choices=sorted(HISTOGRAMS), help="draw documents from this published histogram of lengths"
    )
    documents.add_argument("--longest", type=token_count, metavar="N", help="cut drawn documents to at most N tokens")
    documents.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the drawn documents, default 0")
    documents.add_argument(
        "--window",
        type=window,
        default=(-1, -1),
        metavar="L,R",
        help="how many keys to the left and right of a query it sees; -1 is all of them",
    )
    documents.add_argument(
        "--chunk",
        type=token_count,
        metavar="C",
        help="tokens attend only inside of chunks of C tokens of their document",
    )
    documents.add_argument(
        "--bidirectional", action="store_true", help="a query sees the keys after it too; default: causal"
    )
    call = parser.add_argument_group("the attention and the machine")
    call.add_argument(
        "--heads", type=heads, default=(32, 8), metavar="H/K", help="numbers of query and key heads, default 32/8"
    )
    call.add_argument(
        "--head-dim", type=head_dim, default=128, metavar="D", help="head dim, default 128; the dtype is bfloat16"
    )
    call.add_argument("--policy", choices=POLICIES, default="auto", help="who holds which tokens, default auto")
    call.add_argument(
        "--machine",
        metavar="NAME",
        help="whose speeds are used: H200, H100, A100, CPU or a calibration file; default: the calibration of this "
        "machine, else H200. With +copy after it, as in H200+copy, ranks of a node read each other's memory by copy "
        "engines; with +graph at the end, steps are captured in CUDA graphs, so that the host takes no time",
    )


def mask(args: argparse.Namespace) -> Any:
    """The `Mask` of the options."""
    from ringattn import Mask

    return Mask(causal=not args.bidirectional, window=args.window, chunk=args.chunk)


def lengths(args: argparse.Namespace, tokens: int | None, seed: int) -> list[int]:
    """Lengths of the documents, together `tokens` (None: all of the file); one document if no source was named.

    Raises ValueError for a file that is wrong or too short, and for more tokens or documents than can be planned.
    """
    if args.longest is not None and args.histogram is None:
        raise ValueError(f"--longest {args.longest} cuts documents that are drawn: it needs --histogram")
    if tokens is not None and tokens > TOKENS:
        raise ValueError(f"expected a stream of at most {TOKENS} tokens, got {tokens}")
    found = _lengths(args, tokens, seed)
    if sum(found) > TOKENS:
        raise ValueError(f"--lengths {args.lengths} has {sum(found)} tokens, expected at most {TOKENS}")
    pieces = len(found) if args.chunk is None else sum(-(-size // args.chunk) for size in found)
    if pieces > DOCUMENTS:
        raise ValueError(f"expected at most {DOCUMENTS} documents and chunks of documents, got {pieces}")
    return found


def _lengths(args: argparse.Namespace, tokens: int | None, seed: int) -> list[int]:
    from ringattn.workloads import HISTOGRAMS, cut_to, read_lengths

    if args.lengths is not None:
        try:
            found = read_lengths(args.lengths)
        except OSError as error:
            raise ValueError(f"--lengths {args.lengths} cannot be read: {reason(error)}") from None
        return found if tokens is None else cut_to(found, tokens)
    if tokens is None:
        raise ValueError("--tokens is needed, unless --lengths names the documents")
    if args.histogram is not None:
        return HISTOGRAMS[args.histogram].pack(tokens, seed, args.longest, DOCUMENTS)
    return [tokens]


def machine(args: argparse.Namespace) -> Any:
    """The `Machine` to plan for. Raises ValueError for a name that is none and no file."""
    found, copying = _named(args.machine)
    return found.by_copy_engines() if copying else found


def _named(name: str | None) -> tuple[Any, bool]:
    """The `Machine` of a name, or the default, and whether the name asks for copy engines, which it is without."""
    plain, captured, copying = name, False, False
    if plain is not None:
        plain, captured = plain.removesuffix(GRAPH), plain.endswith(GRAPH)
        plain, copying = plain.removesuffix(COPY), plain.endswith(COPY)
    found = _plain(plain)
    return found.captured() if captured else found, copying


def _plain(name: str | None) -> Any:
    import torch

    from ringattn.environment import MACHINE
    from ringattn.parallel.machine.machine import Machine
    from ringattn.parallel.machine.shipped import SHIPPED, local_machine, shipped_as

    if name is None:
        if torch.cuda.is_available():
            return local_machine("cuda")
        return SHIPPED["H200"] if MACHINE.read() is None else local_machine("cpu")
    if (found := shipped_as(name)) is not None:
        return found
    path = Path(name).expanduser()
    if not path.is_file():
        raise ValueError(f"--machine must be {', '.join(SHIPPED)} or a calibration file, got {name!r}")
    try:
        return Machine.from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--machine {name} cannot be read: {reason(error)}") from None
    except ValueError as error:
        raise ValueError(f"--machine {name}: {error}") from None


def mesh(args: argparse.Namespace, ring: int, ulysses: int) -> Any:
    """The `MeshShape` of these degrees, with the machine that layouts and plans are made for.

    With +copy the axes whose groups are inside a node use copy engines, as those of a running mesh do.
    """
    from ringattn import MeshShape

    found, copying = _named(args.machine)
    if copying:
        inside = ring * ulysses <= found.gpus_per_node
        found = found.by_copy_engines(ring=inside, ulysses=inside or 1 < ulysses <= found.gpus_per_node)
    return MeshShape(1, ring, ulysses, machine=found)


def free_mesh(args: argparse.Namespace, ranks: int) -> Any:
    """The `MeshShape` of so many sequence ranks that leaves their degrees to layouts."""
    from dataclasses import replace

    from ringattn import MeshShape

    degrees = MeshShape(1, ranks).parted(machine(args).gpus_per_node)
    every = tuple(mesh(args, *pair) for pair in degrees)
    return replace(every[0], alternatives=every)


def setting(args: argparse.Namespace, placement: Any) -> Any:
    """The `PriceInputs` of the options for a placement on their mesh."""
    from ringattn.parallel.plan.shape import Shape
    from ringattn.parallel.pricing.setting import PriceInputs

    shape = Shape(args.heads[0], args.heads[1], args.head_dim, args.head_dim)
    return PriceInputs(placement.mesh.machine, shape).on(placement)

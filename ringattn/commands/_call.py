"""The options that describe an attention call, shared by the commands that ask about one."""

import argparse
import math
from collections.abc import Callable
from typing import Any

DTYPES = ("bfloat16", "float16", "float32", "float64")
# What the options take at most: whatever is larger would run for hours, fill the memory or overflow, without a word.
TOKENS = 1 << 31  # areas of masks are integers of 64 bits
HEADS, DIM = 1024, 1024
RANKS = 4096
SELF_TEST = 1 << 17  # query heads of a key head × head dim: self-tests take seconds


def add_call_arguments(parser: argparse.ArgumentParser) -> None:
    call = parser.add_argument_group("the attention call")
    call.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="of queries, keys and values, default bfloat16"
    )
    call.add_argument(
        "--heads", type=heads, default=(32, 8), metavar="H/K", help="numbers of query and key heads, default 32/8"
    )
    call.add_argument(
        "--head-dim", type=head_dim, default=128, metavar="D", help="head dim of queries and keys, default 128"
    )
    call.add_argument("--value-dim", type=head_dim, metavar="V", help="head dim of values, default that of keys")
    call.add_argument(
        "--window",
        type=window,
        default=(-1, -1),
        metavar="L,R",
        help="how many keys to the left and right of a query it sees; -1 is all of them",
    )
    call.add_argument(
        "--softcap",
        type=softcap,
        default=0.0,
        metavar="X",
        help="scores become X * tanh(score / X); 0, the default, is off",
    )
    call.add_argument(
        "--dropout",
        type=dropout,
        default=0.0,
        metavar="P",
        help="probability of attention dropout, in [0, 1); default 0",
    )
    call.add_argument(
        "--deterministic", action="store_true", help="ask for gradients that are bitwise equal from run to run"
    )
    call.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is a CUDA device, else cpu")


def call_spec(args: argparse.Namespace) -> Any:
    """The `CallSpec` of the options. Ends the program where backends could not be tested within seconds."""
    import torch

    from ringattn.kernels.spec import CallSpec

    group, dim = args.heads[0] // args.heads[1], max(args.head_dim, args.value_dim or 0)
    if group * dim > SELF_TEST:
        args.parser.error(
            f"--heads {args.heads[0]}/{args.heads[1]} with head dim {dim}: expected at most {SELF_TEST} query heads of "
            f"a key head × head dim, got {group * dim}"
        )
    return CallSpec(
        device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        dtype=getattr(torch, args.dtype),
        head_dim=args.head_dim,
        value_dim=args.value_dim or args.head_dim,
        query_heads=args.heads[0],
        key_heads=args.heads[1],
        window=args.window != (-1, -1),
        softcap=args.softcap,
        dropout_p=args.dropout,
        deterministic=args.deterministic,
    )


def check_device(args: argparse.Namespace, count: int = 1) -> None:
    """Ends the program if `--device cuda` asks for devices that are not there."""
    import torch

    if args.device == "cuda" and torch.cuda.device_count() < count:
        args.parser.error(f"--device cuda needs {count} CUDA devices, found {torch.cuda.device_count()}")


def check_backend(args: argparse.Namespace) -> None:
    """Ends the program if `--backend`, or RINGATTN_BACKEND in its place, names none."""
    from ringattn.environment import BACKEND
    from ringattn.kernels.registry import backends

    for source, name in (("--backend", args.backend), (BACKEND.name, BACKEND.read())):
        if name not in (names := ["auto", *backends()]):
            args.parser.error(f"{source} must be one of {', '.join(names)}, got {name!r}")


def describe(args: argparse.Namespace, device: str) -> str:
    """The call in words, for people."""
    dims = str(args.head_dim) if args.value_dim in (None, args.head_dim) else f"{args.head_dim}/{args.value_dim}"
    words = [f"{args.dtype} on {device}, heads {args.heads[0]}/{args.heads[1]}, head dim {dims}"]
    if args.window != (-1, -1):
        words.append(f"window {args.window[0]},{args.window[1]}")
    words += [f"{name} {value:g}" for name, value in (("softcap", args.softcap), ("dropout", args.dropout)) if value]
    if args.deterministic:
        words.append("deterministic")
    return ", ".join(words)


def integer(most: int) -> Callable[[str], int]:
    """The type of an option from 1 to `most`."""

    def parse(text: str) -> int:
        value = _integer(text)
        if value is None or not 1 <= value <= most:
            raise argparse.ArgumentTypeError(f"expected an integer from 1 to {most}, got {text!r}")
        return value

    return parse


tokens, ranks, head_dim = integer(TOKENS), integer(RANKS), integer(DIM)


def heads(text: str) -> tuple[int, int]:
    """`32/8`, or `32` for as many key heads."""
    query, _, key = text.partition("/")
    pair = _integer(query), _integer(key) if "/" in text else _integer(query)
    if pair[0] is None or pair[1] is None or not 1 <= pair[1] <= pair[0] <= HEADS or pair[0] % pair[1]:
        raise argparse.ArgumentTypeError(
            f"expected query/key heads, the first a multiple of the other and at most {HEADS}, got {text!r}"
        )
    return pair[0], pair[1]


def window(text: str) -> tuple[int, int]:
    pair = [_integer(part) for part in text.split(",")]
    left, right = pair if len(pair) == 2 else (None, None)
    if left is None or right is None or not (-1 <= left <= TOKENS and -1 <= right <= TOKENS):
        raise argparse.ArgumentTypeError(f"expected LEFT,RIGHT, integers from -1 (open) to {TOKENS}, got {text!r}")
    return left, right


def softcap(text: str) -> float:
    value = _number(text)
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"expected a number >= 0 (0 is off), got {text!r}")
    return value


def dropout(text: str) -> float:
    value = _number(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a probability in [0, 1), got {text!r}")
    return value


def _integer(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan

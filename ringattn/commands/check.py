"""Is a Hugging Face model exact here? Documents run alone against packed and sharded ones.

Starts the processes it needs on this machine. By default a tiny random model with the structure
of the configuration, in float32 on CPUs and bfloat16 on GPUs; --real takes sizes and weights of
the folder. Logits, loss and gradients are compared, also those of sequences whose common prefixes
are computed once; windows, chunks, softcap and sinks of every layer are left out in turn to see
that they count, and no document may see another. Exit code 0 if everything is right, 1 if
something is not, 2 for wrong arguments.
"""

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

from ringattn.commands._call import check_backend, check_device, integer
from ringattn.commands._text import first_line, row
from ringattn.parallel.planning.options import scheme_names

PROCESSES = 64  # of this machine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        metavar="PATH_OR_CONFIG",
        help="folder of a saved model, a config.json or a model type such as gpt_oss; of a multimodal model its text "
        "decoder is checked",
    )
    parser.add_argument(
        "--ring", type=integer(PROCESSES), default=1, metavar="N", help="ranks that pass keys, default 1"
    )
    parser.add_argument(
        "--ulysses", type=integer(PROCESSES), default=1, metavar="N", help="ranks that exchange heads, default 1"
    )
    parser.add_argument(
        "--real", action="store_true", help="check the model itself, with its sizes and weights, instead of a tiny one"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there are enough devices, else cpu")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on GPUs, float32 on CPUs"
    )
    parser.add_argument(
        "--policy",
        choices=("auto", "contiguous", "zigzag", "balanced"),
        default="contiguous",
        help="who holds which tokens, default contiguous",
    )
    parser.add_argument(
        "--scheme",
        choices=scheme_names(),
        default="auto",
        help="how attention communicates, default auto",
    )
    parser.add_argument("--backend", default="auto", metavar="NAME", help="attention kernel, default auto")
    parser.add_argument(
        "--tolerance", type=tolerance, metavar="X", help="largest relative error that passes; default: by dtype"
    )
    parser.add_argument("--json", action="store_true", help="print the findings as one JSON list")


def run(args: argparse.Namespace) -> int:
    try:
        from ringattn.hf.check import Request
        from ringattn.hf.support import check_decoder
        from ringattn.hf.tiny import read_config

        config = read_config(args.model)
    except ImportError as error:
        args.parser.error(f"this command needs transformers: {error}")
    except ValueError as error:
        args.parser.error(f"--model: {first_line(error)}")
    check_backend(args)
    check_device(args, args.ring * args.ulysses)
    if args.ring * args.ulysses > PROCESSES:
        args.parser.error(
            f"--ring × --ulysses must be at most {PROCESSES} processes of this machine, got {args.ring * args.ulysses}"
        )
    if args.real and not Path(args.model).expanduser().is_dir():
        args.parser.error(f"--real needs a folder with weights, got --model {args.model}")
    device = args.device or _device(args.ring * args.ulysses)
    request = Request(
        model=args.model,
        ring=args.ring,
        ulysses=args.ulysses,
        real=args.real,
        device=device,
        dtype=args.dtype or ("bfloat16" if device == "cuda" else "float32"),
        policy=args.policy,
        scheme=args.scheme,
        backend=args.backend,
        tolerance=args.tolerance,
    )
    try:
        check_decoder(config, whole=args.real)
        findings = launched(request)
    except NotImplementedError as refusal:
        findings = [{"name": "supported", "ok": False, "detail": str(refusal)}]
    print(json.dumps(findings, indent=2) if args.json else render(request, findings))
    return 0 if all(finding["ok"] for finding in findings) else 1


def launched(request: Any) -> list[dict[str, Any]]:
    """The findings of `request.ranks` processes on this machine."""
    import torch.distributed as dist
    import torch.multiprocessing as multiprocessing

    from ringattn.hf.check import work

    # The store binds a free port itself, so that none is picked that somebody else could take meanwhile.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="ringattn-check-") as folder:
        answer = Path(folder, "findings.json")
        try:
            multiprocessing.spawn(work, (request, store.port, str(answer)), nprocs=request.ranks)
        except (multiprocessing.ProcessRaisedException, multiprocessing.ProcessExitedException) as error:
            return [{"name": "runs", "ok": False, "detail": raised(str(error))}]
        return json.loads(answer.read_text())


def raised(trace: str) -> str:
    """The first line of what was raised, out of a traceback: messages may have many."""
    lines = trace.strip().splitlines()
    deepest = max((number for number, line in enumerate(lines) if line.startswith("  File ")), default=-1)
    return next((line for line in lines[deepest + 1 :] if line[:1].strip()), lines[-1])


def tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number > 0, got {text!r}")
    return value


def render(request: Any, findings: list[dict[str, Any]]) -> str:
    """The table for people."""
    size = "real" if request.real else "tiny"
    lines = [
        f"{request.model} ({size}, {request.dtype} on {request.ranks} × {request.device}), ring {request.ring} × "
        f"ulysses {request.ulysses}, {request.policy} layout",
        "",
    ]
    for finding in findings:
        mark = "✓" if finding["ok"] else "✗"
        lines += row(f"{mark} {finding['name']}", finding["detail"], pad=40)
    wrong = sum(not finding["ok"] for finding in findings)
    lines += ["", "This model is exact here." if not wrong else f"NOT exact: {wrong} of {len(findings)} findings."]
    return "\n".join(lines)


def _device(ranks: int) -> str:
    import torch

    return "cuda" if torch.cuda.device_count() >= ranks else "cpu"

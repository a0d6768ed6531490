"""What `ringattn doctor --recurrent` says: which kernels can do a layer that carries a state, and why others cannot."""

import argparse
from typing import Any

from ringattn.commands._plan_states import RULES
from ringattn.commands._text import row


def examine_kernels(args: argparse.Namespace, device: str) -> dict[str, Any] | None:
    """Each kernel: its name, whether it is accepted, and if not where it stops and why; None if nothing was asked."""
    import torch

    from ringattn.recurrent.kernels.contract import Signature
    from ringattn.recurrent.kernels.registry import KERNELS, refusal

    if args.recurrent is None:
        return None
    (H, K), dim, dtype = args.recurrent_heads, args.recurrent_dim, getattr(torch, args.dtype)
    delta, diagonal = RULES[args.recurrent]
    wide = torch.promote_types(dtype, torch.float32)
    dtypes = (dtype, dtype, wide, dtype if delta else None, wide if args.recurrent == "mamba2" else None)
    signature = Signature(device, dtypes, K, H, dim, dim, diagonal)
    found = []
    for name, kernel in KERNELS.items():
        if device == "cuda" and not torch.cuda.is_available() and kernel.refusal(signature) is None:
            stopped: tuple[str, str] | None = ("device", "needs a CUDA device for this call, and there is none")
        else:
            stopped = refusal(kernel, signature)
        stage, reason = stopped or (None, None)
        found.append({"name": name, "accepted": reason is None, "stage": stage, "reason": reason})
    return {"call": str(signature), "kernels": found}


def render_kernels(report: dict[str, Any]) -> list[str]:
    """The report for people."""
    lines = [f"Kernels for {report['call']}"]
    for one in report["kernels"]:
        mark = "accepted" if one["accepted"] else "refused"
        reason = "" if one["accepted"] else f"{one['stage']}: {one['reason']}"
        lines += row(f"{one['name']:<12}{mark}", reason, pad=22)
    return lines

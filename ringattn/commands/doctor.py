"""Which kernels can do an attention call here, and why the others cannot.

For every backend the first thing that is missing is told: the package, the device, the compute
capability, a feature of the call, or a passed numeric self-test. Exit code 0 if some backend
can train the call, else 1.
"""

import argparse
import json
import textwrap
from typing import Any

from ringattn.commands import _machine
from ringattn.commands._call import add_call_arguments, call_spec, describe
from ringattn.commands._plan_states import add_state_arguments
from ringattn.commands._state_kernels import examine_kernels, render_kernels
from ringattn.commands._text import WIDTH, row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_call_arguments(parser)
    add_state_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the same as one JSON object")


def run(args: argparse.Namespace) -> int:
    report = examine(args)
    print(json.dumps(report, indent=2) if args.json else render(report))
    return 0 if report["can_train"] else 1


def examine(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that the report says."""
    spec = call_spec(args)
    gpus = _machine.gpus()
    findings = backend_findings(spec)
    picked = pick(findings)
    return {
        "machine": _machine.machine(),
        "gpus": gpus,
        "links": _machine.links(len(gpus)),
        "call": describe(args, spec.device),
        "backends": findings,
        "recurrent": examine_kernels(args, spec.device),
        "auto": picked["auto"],
        "warnings": warnings_of(spec.device, picked),
        "can_train": picked["auto"] is not None,
        "problem": picked["problem"],
    }


def backend_findings(spec: Any) -> list[dict[str, Any]]:
    """Each backend: its name, whether it is accepted, and if not the rung it stops at and the reason."""
    from ringattn.kernels.registry import backends

    findings = []
    for name, backend in backends().items():
        rung, reason = diagnose(backend, spec) or (None, None)
        findings.append({"name": name, "accepted": reason is None, "stage": rung, "reason": reason})
    return findings


def diagnose(backend: Any, spec: Any) -> tuple[str, str] | None:
    """The rung of the ladder where a backend stops for `spec`, and why; None if it can do it."""
    import torch

    from ringattn.kernels.selftest import failure
    from ringattn.kernels.spec import Capability

    if reason := backend.missing():
        return "package", reason
    declared = backend.capability
    if declared.devices and spec.device not in declared.devices:
        return "device", declared.refusal(spec)
    if spec.device == "cuda" and not torch.cuda.is_available():
        return "device", "needs a CUDA device for this call, and there is none"
    architecture = Capability(
        compute_capability=declared.compute_capability, softcap=True, dropout=True, unequal_head_dims=True
    )
    if reason := architecture.refusal(spec):
        return "capability", reason
    if reason := declared.refusal(spec):
        return "call", reason
    if reason := failure(backend, spec):
        return "self-test", reason
    return None


def pick(findings: list[dict[str, Any]]) -> dict[str, Any]:
    """What `backend="auto"` takes: the first accepted, or the one that RINGATTN_BACKEND names if it is accepted."""
    from ringattn.environment import BACKEND

    forced = BACKEND.read()
    accepted = [finding["name"] for finding in findings if finding["accepted"]]
    if forced == "auto":
        return {"auto": accepted[0] if accepted else None, "forced": None, "problem": None}
    if forced not in [finding["name"] for finding in findings]:
        return {"auto": None, "forced": forced, "problem": f"{BACKEND.name}={forced} names no backend"}
    if forced not in accepted:
        return {"auto": None, "forced": forced, "problem": f"{BACKEND.name}={forced} cannot do this call"}
    return {"auto": forced, "forced": forced, "problem": None}


def warnings_of(device: str, picked: dict[str, Any]) -> list[str]:
    from ringattn.environment import complaint

    told = [text] if (text := complaint()) is not None else []
    if picked["forced"] is not None:
        told.append(f"RINGATTN_BACKEND={picked['forced']} replaces the automatic choice")
    if picked["auto"] == "reference" and device == "cuda":
        told.append("no flash kernel can do this call: plain torch is exact, but many times slower and larger")
    return told


def render(report: dict[str, Any]) -> str:
    """The report for people, in lines of at most `WIDTH` columns."""
    versions = report["machine"]
    stack = [f"{label} {versions[key]}" for key, label in STACK if versions[key]]
    lines = ["Machine", *row("", versions["os"], ""), *row("", ", ".join(stack), "")]
    lines += ["", "GPUs"]
    for gpu in report["gpus"]:
        capability = gpu["compute_capability"]
        lines += row(str(gpu["index"]), f"{gpu['name']}, {gpu['memory_gib']} GiB, compute capability {capability}")
    lines += [] if report["gpus"] else ["  none"]
    lines += [line for text in _machine.summary(report["links"]) for line in row("links", text)]
    lines += ["", f"Backends for {report['call']}"]
    for finding in report["backends"]:
        mark = "accepted" if finding["accepted"] else "refused"
        reason = "" if finding["accepted"] else f"{finding['stage']}: {finding['reason']}"
        lines += row(f"{finding['name']:<12}{mark}", reason, pad=22)
    lines += ["", *render_kernels(report["recurrent"])] if report["recurrent"] else []
    lines += [""]
    lines += [line for text in report["warnings"] for line in textwrap.wrap(f"warning: {text}", WIDTH)]
    lines.append(verdict(report))
    return "\n".join(lines)


STACK = (("python", "Python"), ("torch", "torch"), ("cuda", "CUDA"), ("driver", "driver"), ("nccl", "NCCL"))


def verdict(report: dict[str, Any]) -> str:
    if report["problem"]:
        return f"This call cannot be trained here: {report['problem']}."
    if not report["can_train"]:
        return "This call cannot be trained here: no backend does it exactly."
    return f"auto takes {report['auto']}: this call can be trained."

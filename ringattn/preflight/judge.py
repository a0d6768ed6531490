"""From what the nodes told to what is wrong, and with which node. Pure.

A check compares nodes with each other, and with numbers where some are known; what is only odd is a remark.
"""

from collections import Counter
from collections.abc import Sequence
from statistics import median
from typing import Any

from ringattn.parallel.machine.peak_flops import peak_flops
from ringattn.preflight.checks import GIB, Bounds, Check, Problem, common, label, usual
from ringattn.preflight.links import check_links

SKEW = 1.0
"""Seconds. Time stamps of logs, file times that caches go by and tickets of authentication (munge: 300 s) suffer."""
OPEN_FILES, FILES_PER_RANK = 1024, 4
SHARED_MEMORY = {"cuda": GIB, "cpu": 1 << 26}
LOCKED_MEMORY = 64 * GIB
LEAST_OF_PEAK = 0.4


def judge(reports: dict[int, Any], bounds: Bounds) -> list[Check]:
    """All checks, of the reports by node; a node without a report is missing."""
    checks = [check_presence(reports, bounds)]
    if reports:
        checks += [check_versions(reports), check_environment(reports), check_clocks(reports)]
        checks += [check_folders(reports, bounds), check_limits(reports, bounds), check_kernels(reports)]
        checks += [check_devices(reports), check_memory(reports), check_products(reports, bounds)]
        checks += [check_reach(reports), *check_links(reports, bounds)]
    return [check for check in checks if check.seen or check.problems or check.remarks]


def check_presence(reports: dict[int, Any], bounds: Bounds) -> Check:
    check = Check("nodes", f"{len(reports)} of {len(bounds.nodes)}")
    for node, name in enumerate(bounds.nodes):
        if node not in reports:
            called = f"node {node} ({name})" if name else f"node {node}"
            check.problems.append(Problem(f"{called} did not come, or stopped answering", (node,)))
    return check


def check_versions(reports: dict[int, Any]) -> Check:
    keys = next(iter(reports.values()))["versions"]
    most = {key: usual(report["versions"][key] for report in reports.values()) for key in keys}
    check = Check("versions", ", ".join(f"{key} {value}" for key, value in most.items() if value))
    for key, expected in most.items():
        for node, report in reports.items():
            if (found := report["versions"][key]) != expected:
                text = f"{label(reports, node)} has {key} {found or 'not at all'}, others have {expected or 'none'}"
                check.problems.append(Problem(text, (node,)))
    return check


def check_environment(reports: dict[int, Any]) -> Check:
    """Variables that differ may be meant so: ports of a network can have other names on other nodes."""
    check = Check("environment")
    for name in sorted({name for report in reports.values() for name in report["environment"]}):
        values = {node: report["environment"].get(name) for node, report in reports.items()}
        if len(set(values.values())) > 1:
            shown = ", ".join(f"{label(reports, node)}: {value or 'unset'}" for node, value in _few(values))
            check.remarks.append(f"{name} differs: {shown}")
    return check


def check_clocks(reports: dict[int, Any]) -> Check:
    if len(reports) < 2:
        return Check("clocks")
    known = {node: report["clock"] for node, report in reports.items() if report["clock"]}
    farthest = max(known, key=lambda node: abs(known[node]["ahead"]))
    ahead, error = known[farthest]["ahead"], known[farthest]["error"]
    check = Check("clocks", f"within {abs(ahead) * 1e3:.1f} ms of node 0's (measured to {error * 1e3:.1f} ms)")
    for node, clock in known.items():
        if abs(clock["ahead"]) - clock["error"] > SKEW:
            way = "ahead of" if clock["ahead"] > 0 else "behind"
            text = f"the clock of {label(reports, node)} is {abs(clock['ahead']):.1f} s {way} node 0's"
            check.problems.append(Problem(text, (node,)))
    return check


def check_folders(reports: dict[int, Any], bounds: Bounds) -> Check:
    frees = {key: min(report["folders"][key]["free"] for report in reports.values()) for key in ("output", "cache")}
    check = Check("folders", ", ".join(f"{free / GIB:.1f} GiB free for {key}" for key, free in frees.items()))
    for node, report in reports.items():
        for key, found in report["folders"].items():
            needs = bounds.free if key == "output" else GIB
            if found["error"]:
                text = f"{label(reports, node)}: {key} folder {found['path']}: {found['error']}"
                check.problems.append(Problem(text, (node,)))
            elif key == "output" and report["unsigned"]:
                text = f"{label(reports, node)}: nothing can be written in {found['path']}: {report['unsigned']}"
                check.problems.append(Problem(text, (node,)))
            elif found["free"] < needs:
                text = f"{label(reports, node)}: {key} folder {found['path']} has {found['free'] / GIB:.1f} GiB free, "
                check.problems.append(Problem(f"{text}{needs / GIB:.0f} GiB are asked for", (node,)))
        unseen = [other for other in report["unseen"] if other in reports]
        if unseen:
            path, others = report["folders"]["output"]["path"], ", ".join(label(reports, other) for other in unseen)
            text = f"{path} is not shared: {label(reports, node)} does not see what was written there by {others}"
            check.problems.append(Problem(text))
    return check


def check_limits(reports: dict[int, Any], bounds: Bounds) -> Check:
    ranks = sum(len(report["ranks"]) for report in reports.values())
    files = max(OPEN_FILES, FILES_PER_RANK * ranks)
    check = Check("limits")
    seen: set[str] = set()
    for node, report in reports.items():
        limits, where = report["limits"], label(reports, node)
        opened, locked, shared = limits["open_files"], limits["locked_memory"], limits["shared_memory"]
        seen.add(f"{opened or 'any number of'} open files, {shared / GIB:.1f} GiB shared memory")
        if opened is not None and opened < files:
            check.problems.append(Problem(f"{where}: {opened} open files (ulimit -n), {files} are needed", (node,)))
        if shared < SHARED_MEMORY[bounds.device]:
            text = f"{where}: /dev/shm has {shared / GIB:.2f} GiB free, NCCL and data loaders need "
            check.problems.append(Problem(f"{text}{SHARED_MEMORY[bounds.device] / GIB:.2g}", (node,)))
        if limits["infiniband"] and locked is not None and locked < LOCKED_MEMORY:
            text = f"{where}: {locked / GIB:.2f} GiB of locked memory (ulimit -l): InfiniBand needs it unlimited"
            check.problems.append(Problem(text, (node,)))
    check.seen = "; ".join(sorted(seen)[:2])
    return check


def check_kernels(reports: dict[int, Any]) -> Check:
    names = {node: report["kernels"]["auto"] for node, report in reports.items()}
    check = Check("attention", f"kernel {usual(names.values())}")
    for node, name in names.items():
        if name is None:
            why = reports[node]["kernels"]["problem"] or "no backend can train"
            check.problems.append(Problem(f"{label(reports, node)}: {why} (ringattn doctor)", (node,)))
        elif name != usual(names.values()):
            text = f"{label(reports, node)} takes the kernel {name}, others take {usual(names.values())}"
            check.problems.append(Problem(text, (node,)))
    return check


def check_devices(reports: dict[int, Any]) -> Check:
    """What ended or hung, in whatever a rank did."""
    check = Check("devices", " + ".join(f"{count} x {name}" for name, count in Counter(_names(reports)).items()))
    for node, report in reports.items():
        for rank in report["ranks"]:
            if rank["error"] and rank["product"] is None:
                text = f"{label(reports, node)}, device {rank['number']}: {rank['error']}"
                check.problems.append(Problem(text, (node,)))
    return check


def check_memory(reports: dict[int, Any]) -> Check:
    tested = [rank["memory"] for report in reports.values() for rank in report["ranks"] if rank["memory"]]
    least = min((memory["bytes"] for memory in tested), default=0)
    check = Check("memory", f"{least / GIB:.3g} GiB of each device written and read" if tested else "")
    for node, report in reports.items():
        for rank in report["ranks"]:
            if rank["memory"] and rank["memory"]["wrong"]:
                text = f"{rank['memory']['wrong']} words of memory came back wrong"
                check.problems.append(Problem(f"{label(reports, node)}, device {rank['number']}: {text}", (node,)))
    return check


def check_products(reports: dict[int, Any], bounds: Bounds) -> Check:
    """Devices of one name must give the same bits, and about as soon as the others."""
    check, speeds = Check("products"), {}
    ranks = [(node, rank) for node, report in reports.items() for rank in report["ranks"] if rank["product"]]
    for name in sorted({rank["device"] for _, rank in ranks}):
        alike = [(node, rank) for node, rank in ranks if rank["device"] == name]
        digest = usual(rank["product"]["digest"] for _, rank in alike)
        seconds = median(rank["product"]["seconds"] for _, rank in alike)
        peak = peak_flops(name) if bounds.device == "cuda" else None
        for node, rank in alike:
            product, where = rank["product"], f"{label(reports, node)}, device {rank['number']}"
            speeds[node, rank["number"]] = speed = product["flops"] / product["seconds"]
            if not product["same"]:
                check.problems.append(Problem(f"{where}: one product has different bits from time to time", (node,)))
            elif product["digest"] != digest:
                check.problems.append(Problem(f"{where}: a product has other bits than on most {name}", (node,)))
            if seconds < bounds.slow * product["seconds"]:
                text = f"{where}: {speed / 1e12:.3g} TFLOP/s, usual here are "
                check.problems.append(Problem(f"{text}{product['flops'] / seconds / 1e12:.3g}", (node,)))
            elif peak and speed < LEAST_OF_PEAK * peak:
                text = f"{where}: {speed / 1e12:.3g} TFLOP/s of {peak / 1e12:.3g} by data sheet"
                check.problems.append(Problem(text, (node,)))
    if speeds:
        low, high = (f"{bound / 1e12:.3g}" for bound in (min(speeds.values()), max(speeds.values())))
        check.seen = f"equal bits where devices are alike, {low} to {high} TFLOP/s"
    return check


def check_reach(reports: dict[int, Any]) -> Check:
    pairs = [(node, int(other), why) for node, report in reports.items() for other, why in report["unreached"].items()]
    check = Check("reach", "" if pairs or len(reports) < 2 else "every node reaches every other")
    if 0 in reports and reports[0]["wide"]:
        check.remarks.append("node 0 listened on all its interfaces: the endpoint's name means the loopback there")
    blamed = common(reports, [(a, b) for a, b, _ in pairs])
    for node in blamed:
        why = next(why for a, b, why in pairs if node in (a, b))
        text = f"{label(reports, node)} and other nodes do not reach each other ({why})"
        check.problems.append(Problem(text, (node,)))
    for a, b, why in pairs:
        if a not in blamed and b not in blamed:
            text = f"{label(reports, a)} does not reach {label(reports, b)} ({why})"
            check.problems.append(Problem(text))
    return check


def _names(reports: dict[int, Any]) -> list[str]:
    return [rank["device"] or "unknown" for report in reports.values() for rank in report["ranks"]]


def _few(values: dict[int, Any]) -> Sequence[tuple[int, Any]]:
    """One node for each value, and four at most."""
    first = {value: node for node, value in reversed(values.items())}
    return sorted((node, value) for value, node in first.items())[:4]

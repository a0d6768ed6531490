"""The tables of integers that kernels read on the device, made before the first attention asks for them.

Each is made when it is asked for, too, and kept with the plan: what is not made here (what a backend makes for itself,
the slots of an exchange, which are few) only comes later.
"""

import torch

from ringattn.parallel.execution.key_transfers import make_tables as make_transfer_tables
from ringattn.parallel.plan.plan import AttentionPlan, PartedPlan


def make_tables(plans: PartedPlan, device: torch.device) -> None:
    """Put the tables of both passes of all parts on `device`, on the current stream.

    They must be there before the first attention runs that reads them, and stay until the last one did.
    """
    for _, plan in plans.parts:
        for walked in {id(one): one for one in plan.passes}.values():
            bases = _first_rows(walked)
            for number, stage in enumerate(walked.stages):
                for call in stage.calls:
                    call.tensors(device)
                if number:
                    make_transfer_tables(stage, bases, device)


def _first_rows(plan: AttentionPlan) -> set[int]:
    """The rows with which sums of local keys' gradients may begin, to which those are added that come back."""
    if plan.single_parts:
        return {0}
    return {plan.shared_k[0], 0} if plan.sums_copies or plan.sums_groups else {plan.shared_k[0]}

"""What a model's layers ask a layout for, made ahead of the step: plans of attention, recurrences and convolutions, and
their tables on the device.

A first layer that makes them lets the device wait. Plans are integers, so a process without ranks and devices can make
them; tables are made from plans where the device is.
"""

from collections.abc import Iterable

import torch

from ringattn.kept import kept_keys
from ringattn.parallel.execution.tables import make_tables as make_attention_tables
from ringattn.parallel.layout import Layout
from ringattn.parallel.plan.plan import PartedPlan
from ringattn.parallel.planning.ahead import Attention, attentions_of, plan_ahead
from ringattn.parallel.planning.planner import PlansKey
from ringattn.recurrent.convolution import tables_of
from ringattn.recurrent.exchange import ExchangePlan, stream_order
from ringattn.recurrent.halo_plan import HaloKey, HaloPlan, plan_halo
from ringattn.recurrent.plan import RecurrencePlan
from ringattn.recurrent.recurrence import RecurrenceKey, plan_by_route
from ringattn.recurrent.scan import local_rows

Mixer = Attention | RecurrenceKey | HaloKey
"""What plans of any layout are made for: a way in which layers of a model mix tokens."""
MixerPlan = PartedPlan | RecurrencePlan | ExchangePlan | HaloPlan
MixerPlans = tuple[tuple[PlansKey | RecurrenceKey | HaloKey, MixerPlan], ...]


def mixers_of(layout: Layout) -> tuple[Mixer, ...]:
    """Those that were planned on a layout: all of a model, once it ran on it."""
    states = (key for key in kept_keys(layout) if isinstance(key, RecurrenceKey | HaloKey))
    return (*attentions_of(layout), *states)


def plan_mixers(layout: Layout, mixers: Iterable[Mixer]) -> MixerPlans:
    """The plans that they will ask for on this layout, for `ringattn.parallel.planning.ahead.install`.

    Raises ValueError where `parallel_attention` would for its options.
    """
    mixers = tuple(mixers)
    attentions = plan_ahead(layout, [one for one in mixers if isinstance(one, Attention)])
    return (*attentions, *((one, _plan(layout, one)) for one in mixers if not isinstance(one, Attention)))


def _plan(layout: Layout, key: RecurrenceKey | HaloKey) -> MixerPlan:
    return plan_by_route(layout, key) if isinstance(key, RecurrenceKey) else plan_halo(layout, *key)


def make_tables(plans: MixerPlans, device: torch.device) -> None:
    """Put the tables of plans on `device`, on the current stream.

    They must be there before the first layer runs that reads them, and stay until the last one did.
    """
    for _, plan in plans:
        match plan:
            case PartedPlan():
                make_attention_tables(plan, device)
            case RecurrencePlan():
                local_rows(plan, device)
            case ExchangePlan():
                stream_order(plan, device)
            case HaloPlan():
                tables_of(plan, device)

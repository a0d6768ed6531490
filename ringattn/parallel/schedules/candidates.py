"""The schedules that there are."""

from ringattn.parallel.schedules.gather import Gather, Joint
from ringattn.parallel.schedules.ring import Local, Ring
from ringattn.parallel.schedules.schedule import Schedule

# What `scheme=` may name, and what "auto" chooses from: the most accurate first, which is taken among equals.
SCHEDULES: list[type[Schedule]] = [Gather, Joint, Ring]


def schedule_names() -> list[str]:
    return [schedule.kind for schedule in SCHEDULES]


def candidates(ring: int, scheme: str, stages: int | None, segmented: bool = False) -> list[Schedule]:
    """What `scheme` leaves to choose from, the most accurate first.

    Arguments:
        segmented: of the schedules that plan documents with segments or blocks.

    Raises NotImplementedError for a scheme that does not plan them.
    """
    if ring == 1:
        return [Local()]
    named = [schedule.named(stages) for schedule in SCHEDULES if schedule.kind == scheme]
    if segmented and named and not named[0].segments:
        raise NotImplementedError(f'scheme="{scheme}" does not plan documents with segments or blocks')
    able = [schedule for schedule in SCHEDULES if schedule.segments or not segmented]
    return named or [one for schedule in able for one in schedule.considered(ring)]

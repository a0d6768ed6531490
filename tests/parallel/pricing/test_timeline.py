"""What of transfers is waited for, by hand."""

from ringattn.parallel.pricing.timeline import StageCost, backward_timeline, forward_timeline


def test_casts_hide_under_the_stage_before() -> None:
    stages = [StageCost(5.0), StageCost(3.0, cast=7.0), StageCost(4.0, cast=2.0), StageCost(1.0, cast=9.0)]
    assert forward_timeline(stages) == 2 + 0 + 5
    assert forward_timeline(stages[:1]) == 0
    assert forward_timeline(stages[:1], chunks=3) == 0


def test_the_casts_of_a_chunk_hide_under_the_chunk_before() -> None:
    # local 0-5, cast 0-7, stage 1 7-10, cast 7-14 under it and the next local 10-15: nothing else is waited for
    assert forward_timeline([StageCost(5.0), StageCost(3.0, cast=7.0)], chunks=3) == 2
    # local 0-1, cast 0-7, stage 1 7-10, cast 7-14, local 10-11, waits to 14
    assert forward_timeline([StageCost(1.0), StageCost(3.0, cast=7.0)], chunks=2) == 6 + 3
    # cast 0-2, stage 1 2-5, cast 2-4, reduce 5-9, local 5-11; stage 1 11-14, reduce 14-18, local 14-20
    assert backward_timeline([StageCost(6.0), StageCost(3.0, cast=2.0, reduce=4.0)], chunks=2) == 2
    # with a short local stage the reduces are waited for: 5-9 and 12-16 after 6 and 13
    assert backward_timeline([StageCost(1.0), StageCost(3.0, cast=2.0, reduce=4.0)], chunks=2) == 2 + 3 + 3


def test_reduces_hide_under_the_stages_after() -> None:
    # cast 2 | stage 1: 2-5 | reduce 5-9 under the local stage 5-11
    assert backward_timeline([StageCost(6.0), StageCost(3.0, cast=2.0, reduce=4.0)]) == 2
    # the same with a short local stage: the reduce ends at 9, the stage at 6
    assert backward_timeline([StageCost(1.0), StageCost(3.0, cast=2.0, reduce=4.0)]) == 2 + 3
    # cast 0-2, second cast 2-3, stage 1 2-5, reduce 5-9, stage 2 5-6, waits to 9, reduce 9-13, local 9-10
    stages = [StageCost(1.0), StageCost(3.0, cast=2.0, reduce=4.0), StageCost(1.0, cast=1.0, reduce=4.0)]
    assert backward_timeline(stages) == 2 + 3 + 3
    assert backward_timeline([StageCost(6.0)]) == 0

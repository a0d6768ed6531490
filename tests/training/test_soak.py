"""A short run through faults; `python -m tests.training.soak` is the long one."""

import sys

import pytest

pytest.importorskip("transformers")

from tests.training.soak import soak


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the state of other processes is in /proc")
def test_a_run_through_faults_ends_where_the_undisturbed_one_does(tmp_path):
    lines, samples, apart = soak(tmp_path, steps=40, every=20)
    assert len(lines) == 1
    assert max(apart) < 1e-5
    assert len(samples) > 5
    assert samples[-1].files <= samples[0].files
    assert samples[-1].threads <= samples[0].threads

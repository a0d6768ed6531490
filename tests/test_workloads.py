"""Packs of the published histograms, and files of lengths."""

from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringattn.workloads import HISTOGRAMS, cut_to, read_lengths


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(HISTOGRAMS)), st.integers(1, 30_000), st.integers(0, 9), st.integers(1, 40_000))
def test_packs_have_their_tokens_and_no_longer_document(name, tokens, seed, longest):
    lengths = HISTOGRAMS[name].pack(tokens, seed, longest)
    assert sum(lengths) == tokens
    assert min(lengths) >= 1
    assert max(lengths) <= min(longest, tokens, HISTOGRAMS[name].longest)
    assert lengths == HISTOGRAMS[name].pack(tokens, seed, longest)


def test_draws_follow_the_shares():
    histogram = HISTOGRAMS["chatqa"]
    random = Random(0)
    drawn = Counter(
        next(bin_ for bin_ in histogram.bins if bin_[0] <= length <= bin_[1])
        for length in (histogram.draw(random) for _ in range(10_000))
    )
    total = sum(weight for *_, weight in histogram.bins)
    for bin_ in histogram.bins:  # three standard deviations of the largest share
        assert drawn[bin_] / 10_000 == pytest.approx(bin_[2] / total, abs=0.015)


def test_lengths_are_read_from_files(tmp_path):
    path = tmp_path / "lengths.txt"
    path.write_text("# a pack\n70001, 512 0\n\n33  # the last\n")
    assert read_lengths(path) == [70001, 512, 0, 33]
    assert cut_to([70001, 512, 0, 33], 70100) == [70001, 99]
    for text, words in (("3 x", "line 1.*'x'"), ("1\n-2", "line 2.*'-2'"), ("0 0", "no document")):
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            read_lengths(path)
    with pytest.raises(ValueError, match="3 tokens, fewer than the 4"):
        cut_to([1, 2], 4)
    with pytest.raises(ValueError, match="tokens must be >= 1, got 0"):
        HISTOGRAMS["chatqa"].pack(0, 0)
    with pytest.raises(ValueError, match="longest must be >= 1, got 0"):
        HISTOGRAMS["chatqa"].pack(5, 0, 0)

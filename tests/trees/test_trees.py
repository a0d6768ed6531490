"""Trees of sequences: tokens, segments and targets, for any sequences that hypothesis thinks of."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ringattn.trees import Targets, Trees
from tests.trees.toy import families, weighted


@settings(max_examples=150, deadline=None)
@given(sequences=families(), min_shared=st.integers(1, 4))
def test_every_sequence_is_read_from_its_rows(sequences, min_shared):
    trees = Trees(sequences, min_shared=min_shared)
    assert len(trees) == len(sequences)
    assert sum(trees.lengths) == len(trees.tokens) == len(trees.positions)
    used = torch.zeros(len(trees.tokens), dtype=torch.bool)
    for number, sequence in enumerate(sequences):
        rows = trees.rows(number)
        assert trees.tokens[rows].tolist() == sequence
        assert trees.positions[rows].tolist() == list(range(len(sequence)))
        used[rows] = True
        own = trees.numbers(number)
        assert trees.targets.rows[own].tolist() == rows[:-1].tolist()
        assert trees.targets.labels[own].tolist() == sequence[1:]
    assert bool(used.all())  # nothing is held that no sequence has


@settings(max_examples=150, deadline=None)
@given(sequences=families(), min_shared=st.integers(1, 4))
def test_segments_are_depth_first_and_as_few_as_can_be(sequences, min_shared):
    trees = Trees(sequences, min_shared=min_shared)
    children = {}
    for number, (size, parent) in enumerate(zip(trees.lengths, trees.parents, strict=True)):
        assert size >= 1
        assert -1 <= parent < number
        children.setdefault(parent, []).append(number)
        above = number - 1  # depth first: the parent of each is the one before it, or above that
        while above != parent:
            assert above >= 0
            above = trees.parents[above]
    for parent, own in children.items():
        if parent >= 0:
            assert len(own) > 1  # a run that one other follows is one run with it
            assert trees.lengths[parent] >= min_shared
    if min_shared == 1:
        firsts = [(trees.parents[n], int(trees.tokens[first])) for n, first in enumerate(trees.firsts)]
        assert len(set(firsts)) == len(firsts)  # what two could share they share
        assert len(trees.tokens) == len({tuple(one[: n + 1]) for one in sequences for n in range(len(one))})


@settings(max_examples=150, deadline=None)
@given(case=weighted(), min_shared=st.integers(1, 4))
def test_weights_are_summed_over_the_sequences_that_share_a_target(case, min_shared):
    sequences, weights = case
    targets = Trees(sequences, weights, min_shared=min_shared).targets
    wanted: dict[tuple[int, ...], float] = {}
    for sequence, weight in zip(sequences, weights, strict=True):
        for n, one in enumerate(np.broadcast_to(weight, len(sequence))):
            if n:
                prefix = tuple(sequence[: n + 1])
                wanted[prefix] = wanted.get(prefix, 0.0) + float(one)
    assert targets.items == pytest.approx(sum(wanted.values()), abs=1e-12)
    if min_shared == 1:
        assert len(targets) == len(wanted)
        assert sorted(targets.weights.tolist()) == pytest.approx(sorted(wanted.values()), abs=1e-12)


def test_a_prompt_with_completions_in_words():
    prompt = [5, 6, 7]
    trees = Trees([[*prompt, 1, 2], [*prompt, 3], [*prompt, 1, 4], [9]], [1.0, [0, 0, 0, -2.0], 0.5, 8.0])
    assert trees.tokens.tolist() == [5, 6, 7, 1, 2, 4, 3, 9]
    assert trees.lengths == (3, 1, 1, 1, 1, 1)
    assert trees.parents == (-1, 0, 1, 1, 0, -1)
    found = list(
        zip(*(x.tolist() for x in (trees.targets.rows, trees.targets.labels, trees.targets.weights)), strict=True)
    )
    assert found == [(0, 6, 1.5), (1, 7, 1.5), (2, 1, 1.5), (3, 2, 1.0), (3, 4, 0.5), (2, 3, -2.0)]
    assert trees.targets.items == 4.0
    assert str(trees) == "4 sequences of 15 tokens in 2 trees of 8, 6 segments"
    apart = trees.split(torch.arange(6.0))
    assert [one.tolist() for one in apart] == [[0, 1, 2, 3], [0, 1, 5], [0, 1, 2, 4], []]


def test_short_runs_are_copied_in_front_of_what_follows():
    sequences = [[1, 2, 3, 4, 5], [1, 2, 3, 4, 6], [1, 7, 8], [1]]
    assert Trees(sequences).lengths == (1, 3, 1, 1, 2)
    trees = Trees(sequences, min_shared=2)
    assert (trees.lengths, trees.parents) == ((4, 1, 1, 3), (-1, 0, 0, -1))
    assert trees.tokens.tolist() == [1, 2, 3, 4, 5, 6, 1, 7, 8]
    assert Trees(sequences, min_shared=5).lengths == (5, 5, 3)
    assert Trees([[1, 2], [1, 2], [1]], min_shared=9).lengths == (2,)  # nobody follows: one run


@pytest.mark.parametrize("sequences", [[], [[]], [[], [3]], [[3], [3]], [[3, 4], [3]], [[3], [3, 4]], [[1], [2]]])
def test_small_and_equal_sequences(sequences):
    trees = Trees(sequences)
    assert [trees.tokens[trees.rows(n)].tolist() for n in range(len(trees))] == sequences
    assert all(a == -1 for a in trees.parents)
    assert [len(one) for one in trees.split(trees.targets.weights)] == [max(0, len(one) - 1) for one in sequences]


def test_deep_trees_need_no_recursion():
    sequences = [[0] * n + [1] for n in range(1, 1100)]
    trees = Trees(sequences)
    assert len(trees.lengths) == 2 * 1099 - 1
    assert trees.tokens[trees.rows(1098)].tolist() == sequences[-1]


def test_arrays_and_tensors_are_sequences_too():
    forms = [np.array([1, 2, 3], np.uint16), torch.tensor([1, 2, 3], dtype=torch.int32), (1, 2, 3), range(1, 4)]
    trees = Trees(forms, torch.tensor([1, 2, 3, 4]))
    assert trees.tokens.tolist() == [1, 2, 3]
    assert trees.targets.weights.tolist() == [10.0, 10.0]
    mask = Trees([[1, 2, 3]], [torch.tensor([True, True, False])])
    assert mask.targets.weights.tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (([[1, -2]],), r"sequences\[0\] must be token ids >= 0, got -2"),
        (([[1], [1.5]],), r"sequences\[1\] must be token ids in one row, got \[1.5\]"),
        (([[True]],), r"sequences\[0\] must be token ids in one row"),
        ((["ab"],), r"sequences\[0\] must be token ids in one row, got 'ab'"),
        ((["１２"],), r"sequences\[0\] must be token ids in one row"),
        (([3],), r"sequences\[0\] must be token ids in one row, got 3"),
        (([[[1], [2]]],), r"sequences\[0\] must be token ids in one row"),
        (([[2**63]],), r"sequences\[0\] must be token ids >= 0, got 9223372036854775808"),
        (([[2**70]],), r"sequences\[0\] must be token ids in one row"),
        (([torch.tensor([[1]])],), r"got \(1, 1\) of torch.int64"),
        (([[1, 2]], [1, 2]), r"weights must have one entry for each of 1 sequences, got 2"),
        (([[1, 2]], [[1.0]]), r"weights\[0\] must be a number or one for each of the sequence's 2 tokens, got \(1,\)"),
        (([[1, 2]], [float("nan")]), r"weights\[0\] must be finite numbers"),
        (([[1, 2]], [[1, float("inf")]]), r"weights\[0\] must be finite numbers"),
        (([[1, 2]], ["１"]), r"weights\[0\] must be finite numbers"),
        (([[1, 2]], [1j]), r"weights\[0\] must be finite numbers"),
        (([[1, 2]], [None]), r"weights\[0\] must be finite numbers"),
    ],
)  # fmt: skip
def test_what_is_no_sequence_or_weight_is_refused(arguments, told):
    with pytest.raises(ValueError, match=told):
        Trees(*arguments)


@pytest.mark.parametrize("wrong", [0, -1, 1.0, True, None])
def test_min_shared_is_a_number_of_tokens(wrong):
    with pytest.raises(ValueError, match="min_shared must be a number of tokens >= 1, got"):
        Trees([[1]], min_shared=wrong)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (([0, 2], [1, 1], [1, 1], 2), r"rows must be in \[0, 2\), the tokens that there are, got 0 to 2"),
        (([-1], [1], [1], 2), r"rows must be in \[0, 2\)"),
        (([0], [-100], [1], 2), "labels must be token ids >= 0, got -100; leave out what is no target"),
        (([0], [1, 2], [1], 2), r"one entry for each target, \(m,\), got rows \(1,\), labels \(2,\), weights \(1,\)"),
        ((0, 1, 1, 2), r"one entry for each target, \(m,\), got rows \(\)"),
        (([0.0], [1], [1], 2), "rows must be integers, got torch.float32"),
        (([0], [True], [1], 2), "labels must be integers, got torch.bool"),
        (([0], [1], [float("-inf")], 2), "weights must be finite numbers"),
        ((["a"], [1], [1], 2), "rows must be integers, got"),
    ],
)
def test_triples_are_checked(arguments, told):
    with pytest.raises(ValueError, match=told):
        Targets(*arguments)


def test_triples_may_stand_in_any_order():
    targets = Targets([3, 0, 3], [5, 6, 7], [1, 0.5, -1], 4)
    assert (len(targets), targets.items) == (3, 0.5)
    assert targets.labels_by_row.tolist()[:3] == [6, -100, -100]
    assert targets.labels_by_row[3] in (5, 7)
    assert Targets([], [], [], 0).items == 0.0
    assert all(a <= b for a, b in pairwise(targets.of_tokens(9).rows.sort().values.tolist()))

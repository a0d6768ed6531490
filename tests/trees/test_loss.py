"""The loss and log-probabilities of trees are those of separate sequences, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ringattn.memory.tiled_logprobs import tiled_logprobs
from ringattn.memory.tiled_loss import tiled_loss
from ringattn.trees import Targets, Trees
from tests.trees.toy import WORDS, Toy, hidden_of, log_probs_alone, loss_alone, weighted


def gradients(loss: Tensor, model: Toy) -> list[Tensor]:
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True) if loss.requires_grad else ()
    pairs = zip(found or [None] * len(list(model.parameters())), model.parameters(), strict=True)
    return [torch.zeros_like(one) if grad is None else grad for grad, one in pairs]


@settings(max_examples=25, deadline=None)
@given(case=weighted(), min_shared=st.integers(1, 3), tile=st.integers(1, 9), seed=st.integers(0, 3))
def test_loss_and_gradients_are_the_sum_over_separate_sequences(case, min_shared, tile, seed):
    sequences, weights = case
    model = Toy(seed)
    trees = Trees(sequences, weights, min_shared=min_shared)
    found = tiled_loss(hidden_of(model, trees), model.head.weight, trees.targets, bias=model.head.bias, tile=tile)
    wanted = loss_alone(model, sequences, weights)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    for one, other in zip(gradients(found * 1.5, model), gradients(wanted * 1.5, model), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(case=weighted(), tile=st.integers(1, 9), seed=st.integers(0, 3), capped=st.booleans())
def test_logprobs_and_any_objective_of_them_are_those_of_separate_sequences(case, tile, seed, capped):
    sequences, _ = case
    model = Toy(seed)
    trees = Trees(sequences)
    transform = (lambda x: 2 * torch.tanh(x / 2)) if capped else None
    hidden = hidden_of(model, trees)
    whole = tiled_logprobs(
        hidden, model.head.weight, trees.targets, bias=model.head.bias, transform=transform, tile=tile
    )
    head = model.head.forward
    if capped:
        model.head.forward = lambda x: transform(head(x))
    alone = [log_probs_alone(model, one) for one in sequences]
    for one, other in zip(trees.split(whole), alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)

    def clipped(parts: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
        """As policy gradients clip ratios: no weighted sum."""
        total = torch.zeros((), dtype=torch.float64)
        for number, one in enumerate(parts):
            total = total + (torch.exp(one + 2).clamp(max=1.2 + number) * (number - 2)).sum()
        return total

    for one, other in zip(gradients(clipped(trees.split(whole)), model), gradients(clipped(alone), model), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@settings(max_examples=60, deadline=None)
@given(
    triples=st.lists(
        st.tuples(st.integers(0, 9), st.integers(0, WORDS - 1), st.sampled_from([0.0, 1.0, -0.5, 2.25])), max_size=25
    ),
    tile=st.integers(1, 12),
    z_loss=st.sampled_from([0.0, 0.01]),
    capped=st.booleans(),
    scale=st.sampled_from([1.0, 0.125]),
)
def test_any_triples_have_the_loss_of_all_logits_at_once(triples, tile, z_loss, capped, scale):
    torch.manual_seed(0)
    hidden = torch.randn(10, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(WORDS, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(WORDS, dtype=torch.float64, requires_grad=True)
    rows, labels, weights = (list(x) for x in zip(*triples, strict=True)) if triples else ([], [], [])
    transform = (lambda x: 2 * torch.tanh(x / 2)) if capped else None
    options = {"bias": bias, "transform": transform, "z_loss": z_loss, "scale": scale, "tile": tile}
    found = tiled_loss(hidden, weight, Targets(rows, labels, weights, 10), **options)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = logits if transform is None else transform(logits)
    at, of, times = (
        torch.tensor(rows, dtype=torch.int64),
        torch.tensor(labels, dtype=torch.int64),
        torch.tensor(weights),
    )
    sums = logits.logsumexp(1)[at]
    wanted = ((sums - logits[at, of] + z_loss * sums**2) * times).sum() * scale
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad(found, (hidden, weight, bias)),
        torch.autograd.grad(wanted, (hidden, weight, bias)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_rows_without_a_target_that_counts_are_left_out():
    hidden = torch.full((3, 2), torch.nan, dtype=torch.float64)
    hidden[1] = 1.0
    weight = torch.ones(4, 2, dtype=torch.float64)
    targets = Targets([0, 1, 2], [1, 2, 3], [0.0, 3.0, 0.0], 3)
    torch.testing.assert_close(tiled_loss(hidden, weight, targets), 3 * torch.tensor(4.0, dtype=torch.float64).log())
    assert tiled_loss(hidden, weight, Targets([], [], [], 3)) == 0


def test_gradients_are_rounded_once_where_many_branch_off():
    """In bfloat16 a row with many targets must not be added up target by target."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(1, 8), torch.randn(64, 8)
    triples = Targets([0] * 64, list(range(64)), [1.0] * 64, 1)
    hidden, weight = (x.bfloat16().requires_grad_() for x in (hidden, weight))
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    found = torch.autograd.grad(tiled_loss(hidden, weight, triples), (hidden, weight))
    wanted = torch.autograd.grad(tiled_loss(*exact, triples), exact)
    for one, other in zip(found, wanted, strict=True):
        assert (one.double() - other).norm() <= 4e-3 * other.norm()


def test_what_does_not_fit_is_refused():
    hidden, weight = torch.randn(3, 2), torch.randn(4, 2)
    few = Targets([0], [1], [1.0], 2)
    for function in (tiled_loss, tiled_logprobs):
        with pytest.raises(ValueError, match="targets must be of the 3 rows of hidden, got triples of 2 tokens"):
            function(hidden, weight, few)
        with pytest.raises(ValueError, match="targets must have labels below 4, got 4"):
            function(hidden, weight, Targets([0], [4], [1.0], 3))
        with pytest.raises(ValueError, match="tile must be a number of tokens >= 1, got 0"):
            function(hidden, weight, few.of_tokens(3), tile=0)
    with pytest.raises(ValueError, match="count is of targets that are one integer a row, got 1"):
        tiled_loss(hidden, weight, few.of_tokens(3), count=1)
    with pytest.raises(ValueError, match="targets must be Targets, triples, got Tensor"):
        tiled_logprobs(hidden, weight, torch.zeros(3, dtype=torch.int64))
    whole = Trees([[1, 2, 3]])
    with pytest.raises(ValueError, match="values must have one row for each of 2 targets"):
        whole.split(torch.zeros(3))

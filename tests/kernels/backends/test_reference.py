"""The reference's dropout: which pairs are kept depends on nothing but the seed and their places."""

import pytest
import torch

from ringattn.kernels.backends.reference import kept_pairs


def test_dropout_drops_its_share_and_another_seed_drops_others() -> None:
    index = torch.arange(200)
    kept = kept_pairs(7, 0.3, index, index, 0, 4)
    # Four standard deviations of the share of 160,000 draws; those of a key's 200 draws are 0.032.
    assert kept.double().mean().item() == pytest.approx(0.7, abs=0.005)
    assert kept[0].double().mean(0).std() < 0.05
    assert not torch.equal(kept, kept_pairs(8, 0.3, index, index, 0, 4))
    assert torch.equal(kept[2:], kept_pairs(7, 0.3, index, index, 2, 2))
    assert torch.equal(kept[:, 50:, 90:], kept_pairs(7, 0.3, index[50:], index[90:], 0, 4))
    assert kept_pairs(7, 0.0, index, index, 0, 4).all()

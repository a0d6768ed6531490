"""Tensors that DeepSpeed cut into flat pieces are put together as they were, from any number of ranks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

pytest.importorskip("transformers")

from ringattn.training.checkpoint.marker import BadCheckpoint, read_marker, write_marker
from ringattn.training.checkpoint.saved_state import SavedState, write_part
from ringattn.training.checkpoint.snapshot import snapshot_of
from ringattn.training.export import export
from ringattn.training.export.flat import FlatPieces, flat_place
from tests.pool import Pools
from tests.training.export.small_runs import written

SHAPES = st.lists(st.lists(st.integers(1, 5), min_size=0, max_size=3), min_size=1, max_size=6)


class Model(nn.Module):
    """Tensors of some shapes; every third one is frozen, and the first has a second name."""

    def __init__(self, shapes: list[list[int]]) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        for number, shape in enumerate(shapes):
            one = nn.Parameter(torch.randn(shape, generator=draw), requires_grad=number % 3 != 2)
            self.register_parameter(f"p{number}", one)
        self.tied = self.p0


def pieces_of(model: Model, ranks: int, most: int) -> list[list[Tensor]]:
    """The flat tensors of each rank: matrices first, then the rest, cut where a tensor ends beyond `most` numbers."""
    trained = [p.detach() for p in model.parameters() if p.requires_grad]
    groups = [[p for p in trained if p.dim() >= 2], [p for p in trained if p.dim() < 2]]
    flat: list[list[Tensor]] = [[] for _ in range(ranks)]
    for group in (group for group in groups if group):
        open_ones: list[list[Tensor]] = [[] for _ in range(ranks)]
        for number, p in enumerate(group, 1):
            part = -(-p.numel() // ranks)
            filled = torch.cat([p.reshape(-1), torch.zeros(part * ranks - p.numel())])
            for rank in range(ranks):
                open_ones[rank].append(filled[rank * part : (rank + 1) * part])
            if number == len(group) or sum(map(len, open_ones[0])) >= most:
                for rank in range(ranks):
                    flat[rank].append(torch.cat(open_ones[rank]))
                open_ones = [[] for _ in range(ranks)]
    return flat


def saved(folder: Path, flat: list[list[Tensor]]) -> SavedState:
    for rank, tensors in enumerate(flat):
        tree: Any = tensors
        for key in reversed(flat_place(rank)):
            tree = {key: tree}
        write_part(folder, rank, snapshot_of(tree))
    return SavedState.of(folder, 0)


@settings(max_examples=40)
@given(SHAPES, st.integers(1, 4), st.integers(1, 40))
def test_what_was_cut_is_put_together(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[list[int]], ranks: int, most: int
) -> None:
    model = Model(shapes)
    found = FlatPieces(saved(tmp_path_factory.mktemp("flat"), pieces_of(model, ranks, most)), model, ranks)
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    assert found.names() == trained.keys()
    for name, expected in trained.items():
        assert torch.equal(found.whole(name), expected)


def test_pieces_of_another_model_or_of_fewer_ranks_are_named(tmp_path: Path) -> None:
    model = Model([[4, 3], [5]])
    state = saved(tmp_path, pieces_of(model, 2, 100))
    with pytest.raises(BadCheckpoint, match=r"holds 9 numbers, a rank's pieces of the model have 10"):
        FlatPieces(state, Model([[4, 3], [7]]), 2)
    with pytest.raises(BadCheckpoint, match=r"checkpoint of 3 ranks does not hold engine/zero_pp_rank_2_mp_rank_00"):
        FlatPieces(state, Model([[4, 5], [6]]), 3)


def test_an_unknown_stage_is_refused(pool: Pools, tmp_path: Path) -> None:
    written(pool, 1, tmp_path / "run")
    cfg, folder = tmp_path / "run" / "config.yaml", tmp_path / "run" / "checkpoints" / "step-00000002"
    cfg.write_text(cfg.read_text().replace("name: fsdp2", "name: deepspeed\n  zero_stage: 4"))
    found = read_marker(folder)
    write_marker(folder, replace(found, state=replace(found.state, engine="deepspeed")))
    with pytest.raises(ValueError, match=r"engine\.zero_stage=4; engine=fsdp2, and deepspeed with zero_stage 1, 2 and"):
        export(tmp_path / "run", tmp_path / "out")

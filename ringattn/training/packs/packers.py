"""The packer that a configuration asks for, and where a checkpoint says that it goes on."""

from collections.abc import Callable, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ringattn.training.data.corpus import Corpus
from ringattn.training.data.mixture import MixedCorpus
from ringattn.training.packs.best_fit import BestFitPacker, BestFitPosition
from ringattn.training.packs.curriculum import (
    Curriculum,
    CurriculumPacker,
    CurriculumPosition,
    curriculum_of,
    step_of,
)
from ringattn.training.packs.grouping import DocumentCost, GroupedPacker, GroupedPosition
from ringattn.training.packs.ordering import AnyCorpus, MixedPosition, Place, Position, place_of
from ringattn.training.packs.packing import Packer

ORDER, BEST_FIT = "order", "best_fit"
PACKING = (ORDER, BEST_FIT)
LOOKAHEAD = 256

AnyPacker = Packer | GroupedPacker | BestFitPacker | CurriculumPacker
Saved = Position | MixedPosition | GroupedPosition | BestFitPosition | CurriculumPosition


def lengths_of(data: DictConfig) -> Curriculum | None:
    """The curriculum of `data`, or None. Raises ValueError."""
    values = data.get("curriculum")
    return (
        None
        if values is None
        else curriculum_of(OmegaConf.to_container(values) if OmegaConf.is_list(values) else values)
    )


def make_packer(
    data: DictConfig, corpus: AnyCorpus, seed: int, state: Mapping[str, Any], cost: Callable[[], DocumentCost]
) -> AnyPacker:
    """The packer of `data`, which goes on at a state; `Position().state_dict()` is the beginning.

    Arguments:
        cost: of documents; asked for with data.delay only.

    Raises ValueError for a state that was saved with other rules.
    """
    if data.delay is not None:
        if isinstance(corpus, Corpus | MixedCorpus):
            position = GroupedPosition.from_state(state)
            return GroupedPacker(corpus, data.seq_len, seed, cost(), data.delay, position)
        raise ValueError(f"data.delay={data.delay} needs the lengths of all documents; use data.streaming=false")
    packer: Packer | BestFitPacker
    if data.get("packing") == BEST_FIT:
        lookahead = data.get("lookahead") or LOOKAHEAD
        position_of = BestFitPosition.from_state(state)
        packer = BestFitPacker(corpus, data.seq_len, seed, lookahead, data.pad, position_of)
    else:
        packer = Packer(corpus, data.seq_len, seed, data.pad, in_order(state))
    lengths = lengths_of(data)
    return packer if lengths is None else CurriculumPacker(packer, lengths, step_of(state))


def in_order(state: Mapping[str, Any]) -> Place:
    """The place in a state, where nobody may wait. Raises ValueError if somebody does."""
    Position.from_state(state)
    return place_of(state)


def check_state(data: DictConfig, state: Mapping[str, Any]) -> None:
    """Raises ValueError for a state of which documents would be dropped by the rules of `data`."""
    if data.delay is not None:
        GroupedPosition.from_state(state)
    elif data.get("packing") == BEST_FIT:
        BestFitPosition.from_state(state)
    else:
        in_order(state)

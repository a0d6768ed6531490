"""Trees of token sequences: common prefixes once, and targets with weights."""

from ringattn.trees.targets import Targets
from ringattn.trees.trees import Trees

__all__ = ["Targets", "Trees"]

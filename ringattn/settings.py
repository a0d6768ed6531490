"""The options of an attention as one record: what callers ask for, checked here and handed on whole.

A new option is a field of `AttentionOptions`, looked at in `check`, and a keyword of `parallel_attention`. Compiled
layers take it over by themselves: they hand on `to_constants()`.
"""

from collections.abc import Sequence
from dataclasses import fields
from math import isnan
from numbers import Real
from typing import Any, NamedTuple, get_type_hints

from ringattn.mask import Mask

_MASK_FIELDS = tuple(field.name for field in fields(Mask))


class AttentionOptions(NamedTuple):
    """The keywords of `parallel_attention`, but for the tensors; `parallel_attention` says what each means.

    A named tuple because it is made and hashed in every call, which a frozen dataclass does more slowly. For the same
    reason making one checks nothing: whoever settles a new kind of call or plan calls `check` once.
    """

    mask: Mask = Mask()
    softmax_scale: float | None = None
    softcap: float | None = 0.0
    dropout_p: float = 0.0
    dropout_seed: int | None = None
    deterministic: bool = False
    backend: str = "auto"
    scheme: str = "auto"
    stages: int | None = None
    keep_keys: bool | None = None
    wide_reduce: bool = True
    memory_limit: int | None = None
    head_groups: int | None = None
    head_chunks: int | None = None
    return_lse: bool = False

    def check(self) -> None:
        """Check all that can be said without tensors, mesh and the list of schedules, but for the seed of dropout,
        which `dropout` checks.

        Raises ValueError naming the argument, what came and what was expected.
        """
        self.check_kinds()
        self._check_numbers()
        self._check_schedule()
        self._check_heads()

    def check_kinds(self) -> None:
        """The part of `check` without which `to_constants` fails: a compiled graph leaves the rest to its operator,
        whose errors reach the caller as they are.
        """
        if not isinstance(self.mask, Mask):
            raise ValueError(f"mask must be a Mask, got {type(self.mask).__name__}")
        for name in ("softmax_scale", "softcap", "dropout_p"):
            value = getattr(self, name)
            if value is None and name != "dropout_p":
                continue
            # Kernels take them as host numbers: a tensor would be waited for at every call, and would get no gradient.
            if not isinstance(value, Real):
                raise ValueError(f"{name} must be a number, which has no gradient, got {type(value).__name__}")

    def _check_numbers(self) -> None:
        """Scale, cap and dropout of the scores."""
        if self.softmax_scale is not None and isnan(self.softmax_scale):
            raise ValueError(f"softmax_scale must be a number, got {self.softmax_scale}")
        if not 0.0 <= self.dropout_p < 1.0:
            raise ValueError(f"dropout_p must be in [0, 1), got {self.dropout_p}")
        if self.softcap is not None and not self.softcap >= 0.0:
            raise ValueError(f"softcap must be >= 0 (0 or None is off), got {self.softcap}")

    def _check_schedule(self) -> None:
        """How keys move, and the memory that this may take."""
        scheme, stages, limit = self.scheme, self.stages, self.memory_limit
        if stages is not None:
            if not isinstance(stages, int) or stages < 2:
                raise ValueError(
                    f"stages must be an integer >= 2 (the local one and at least one cast), got {stages!r}"
                )
            if scheme != "ring":
                raise ValueError(f'stages belongs to scheme="ring", got stages={stages} with scheme="{scheme}"')
        if limit is not None and (not isinstance(limit, int) or limit < 0):
            raise ValueError(f"memory_limit must be None or a number of bytes >= 0, got {limit!r}")

    def _check_heads(self) -> None:
        """In how many groups or chunks heads go."""
        groups, chunks = self.head_groups, self.head_chunks
        for name, value in (("head_groups", groups), ("head_chunks", chunks)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be None or an integer >= 1, got {value!r}")
        if min(groups or 1, chunks or 1) > 1:
            raise ValueError(f"head_groups and head_chunks must not both be above 1, got {groups} and {chunks}")

    def dropout(self) -> tuple[float, int] | None:
        """Probability and seed of dropout, None without. Raises ValueError for a seed that is none.

        The seed is another one at every call, so it is not among what is checked once.
        """
        if not self.dropout_p:
            return None
        seed = self.dropout_seed
        if not isinstance(seed, int) or seed < 0:
            raise ValueError(
                f"dropout_seed must be an integer >= 0 with dropout_p={self.dropout_p}, the same on every rank, got "
                f"{seed!r}"
            )
        return self.dropout_p, seed

    def for_planning(self) -> "AttentionOptions":
        """The same where plans depend on it, and the defaults elsewhere: equal for attentions that share a plan."""
        return AttentionOptions(
            mask=self.mask,
            scheme=self.scheme,
            stages=self.stages,
            keep_keys=self.keep_keys,
            wide_reduce=self.wide_reduce,
            memory_limit=self.memory_limit,
            head_groups=self.head_groups,
            head_chunks=self.head_chunks,
        )

    def to_constants(self) -> tuple[Any, ...]:
        """The same as plain values, named in `constant_types`: what an operator in a compiled graph can take."""
        mask, *others = self
        return (*[getattr(mask, name) for name in _MASK_FIELDS], *others)

    @classmethod
    def from_constants(cls, constants: Sequence[Any]) -> "AttentionOptions":
        """The inverse of `to_constants`; sequences may have become lists."""
        parts = len(_MASK_FIELDS)
        return cls(Mask(*constants[:parts]), *constants[parts:])

    @classmethod
    def constant_types(cls) -> dict[str, Any]:
        """Name and type of each value in `to_constants`."""
        types = get_type_hints(cls)
        del types["mask"]
        return get_type_hints(Mask) | types

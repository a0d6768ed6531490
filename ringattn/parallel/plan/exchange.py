"""The exchange of heads between the ranks of an ulysses axis: which heads go where."""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from ringattn.kernels.spec import Range


@dataclass(frozen=True)
class HeadShare:
    """Heads that one ulysses rank computes: query heads `[start, stop)`, and the key head of each of its local ones.

    Local query head j uses local key head `j // (queries / len(keys))`; a key head may stand more than once where the
    groups of a rank's query heads are uneven.
    """

    query: Range
    keys: tuple[int, ...]

    @property
    def queries(self) -> int:
        return self.query[1] - self.query[0]

    def group(self, number: int, groups: int) -> tuple[Range, Range]:
        """Local query heads of one of several equal groups, and the local key heads that they read."""
        queries, keys = self.queries, len(self.keys)
        first, last = number * queries // groups, (number + 1) * queries // groups
        return (first, last), (first * keys // max(queries, 1), -(-last * keys // max(queries, 1)))

    def parts_in(self, groups: int) -> bool:
        """Whether equal groups are calls of a kernel: whole key heads, or equal parts of one each."""
        keys = len(self.keys)
        return self.queries % groups == 0 and keys > 0 and (keys % groups == 0 or groups % keys == 0)

    def chunks_in(self, chunks: int) -> bool:
        """Whether so many equal chunks of heads have key heads of their own."""
        return self.queries % chunks == 0 and len(self.keys) % chunks == 0


@dataclass(frozen=True)
class Exchange:
    """The Ulysses all-to-all: each rank's run of a position's rows against each rank's share of the heads.

    The heads of a rank come and go in `groups`, so that one group travels while another is computed; all keys come with
    the first, and their gradients go with the last.
    """

    rows: tuple[Range, ...]
    heads: tuple[HeadShare, ...]
    rank: int
    groups: int = 1

    @property
    def share(self) -> HeadShare:
        """This rank's."""
        return self.heads[self.rank]

    @cached_property
    def split_keys(self) -> bool:
        """Whether a key head is read by several groups, so that its gradient is a sum."""
        return any(self.groups > len(share.keys) for share in self.heads)

    @cached_property
    def copied_keys(self) -> bool:
        """Whether some key head is computed in more than one place, so that its gradient is a sum."""
        keys = [head for share in self.heads for head in share.keys]
        return len(keys) > len(set(keys))

    @property
    def own_rows(self) -> int:
        return self.rows[self.rank][1] - self.rows[self.rank][0]

    @property
    def position_rows(self) -> int:
        return self.rows[-1][1]


def exchange_plan(rows: tuple[Range, ...], query_heads: int, key_heads: int, rank: int, groups: int = 1) -> Exchange:
    """Deal `query_heads` over the ranks as evenly as whole heads allow, each with the key heads that they read.

    Arguments:
        groups: at most so many groups of heads travel apart; fewer where heads do not part equally on every rank.
    """
    ranks = len(rows)
    bounds = [-(-index * query_heads // ranks) for index in range(ranks + 1)]
    heads = tuple(_share(bounds, query_heads // key_heads) for bounds in pairwise(bounds))
    fitting = (count for count in range(groups, 1, -1) if all(share.parts_in(count) for share in heads))
    return Exchange(rows, heads, rank, next(fitting, 1))


def _share(query: Range, group: int) -> HeadShare:
    """Key heads of the query heads `query`, each as few times as a kernel with equal groups can work with."""
    needed = [head // group for head in range(*query)]
    for size in range(len(needed), 0, -1):
        parts = [needed[start : start + size] for start in range(0, len(needed), size)]
        if len(needed) % size == 0 and all(len(set(part)) == 1 for part in parts):
            return HeadShare(query, tuple(part[0] for part in parts))
    return HeadShare(query, ())

"""What the kernels of recurrences hold, by whose they are: plain torch's, mamba-ssm's and flash-linear-attention's.

Those of the packages are counted by their source, which was not run on a GPU here.

Legend: H value heads, K key heads, D key dim, V value dim, C tokens of a chunk, b bytes of an element.
"""

from dataclasses import dataclass

from ringattn.memory.planning.parts import RecurrentPart
from ringattn.recurrent.kernels.chunked import CHUNK, CHUNK_OF_DIAGONALS
from ringattn.recurrent.kernels.mamba import CHUNK as MAMBA_CHUNK
from ringattn.recurrent.price import RecurrenceShape

WIDE = 4  # bytes of float32
FLA_CHUNK = 64


@dataclass(frozen=True)
class KernelBytes:
    """Bytes of a token in a kernel's hands beside its inputs: kept for the backward pass, and the most in each pass.

    Arguments:
        saved, forward, backward: for a document that is whole; `backward` beside `saved`.
        inputs: of its inputs those that are kept for a piece that is cut, whose forward pass is run again.
        mapped: as `forward`, where the map of a piece is computed too.
        dealt: of the rows of heads that were exchanged, what is kept beside `saved`.
        again: what a piece that is computed again keeps beside `saved`, since then all inputs have gradients.
    """

    saved: float
    forward: float
    backward: float
    inputs: float
    mapped: float
    dealt: float
    again: float = 0.0


def of_torch(part: RecurrentPart, rule: RecurrenceShape) -> KernelBytes:
    """`ringattn.recurrent.kernels.chunked`, in float32: for each chunk and head tables of C × C and a state."""
    if rule.diagonal:
        return _diagonal(rule)
    H, D, V, C = rule.heads, rule.key_dim, rule.value_dim, CHUNK
    states, again = D * V / C, 0

    def forward(V: int) -> float:
        if not rule.delta:
            return max(3 * C + 2 * D + V, C + 4 * D + V, C + 2 * D + 4 * V + states)
        return max(4 * C + 2 * D + V, 3 * C + 4 * D + V + 2 * (D + V), C + 3 * D + 4 * V)

    if rule.delta:
        saved, backward = 10 * D + 3 * V + 6 * C + states + 4, 3 * C + 3 * D + V
        inputs = rule.itemsize * 2 * rule.key_heads * D
    else:
        saved, backward, inputs = 6 * D + V + 3 * C + states + 3, 3 * C + 2 * D + V, 0
    if not part.channels:  # decays that nothing learns, and inputs that nothing else keeps
        saved, inputs, again = 4 * D + V + 2 * C + states + 2, rule.itemsize * H * (2 * D + V), 2 * D + C + 1
    dealt = 0 if rule.delta else rule.itemsize * H * V
    wide = WIDE * H
    mapped = forward(V + D) + D if rule.delta else forward(V)
    most = wide * forward(V)
    return KernelBytes(wide * saved, most, wide * backward, inputs + 2 * wide, wide * mapped, dealt, wide * again)


def _diagonal(rule: RecurrenceShape) -> KernelBytes:
    """The same with decays by key dim: tables of C × C × D."""
    H, D, V, C = rule.heads, rule.key_dim, rule.value_dim, CHUNK_OF_DIAGONALS
    wide, table = WIDE * H, C * D
    saved = 2 * table + 6 * D + V + C + D * (V + 1) / C
    forward = 3 * table + 5 * D + C + V
    inputs = wide * (D + V) + WIDE * 2 * rule.key_heads * D
    return KernelBytes(wide * saved, wide * forward, wide * 3 * table, inputs, wide * forward, wide * (3 * D + V))


def of_mamba(rule: RecurrenceShape) -> KernelBytes:
    """`mamba_chunk_scan_combined` of mamba-ssm: scores of a chunk by key head in float32, and states of chunks in
    float32 and once narrower."""
    H, K, D, V, b = rule.heads, rule.key_heads, rule.key_dim, rule.value_dim, rule.itemsize
    scores, states = WIDE * K * MAMBA_CHUNK, H * D * V / MAMBA_CHUNK * (WIDE + b)
    saved = H * (V * b + 2 * WIDE)
    forward = scores + states + saved
    backward = 2 * scores + 2 * states + b * H * V + WIDE * (2 * K * D + H)
    return KernelBytes(saved, forward, backward, 2 * WIDE * H, forward, b * H * (2 * D + V))


def of_fla(rule: RecurrenceShape) -> KernelBytes:
    """`chunk_gated_delta_rule` of flash-linear-attention, which keeps the solution of each chunk's system; without the
    delta rule `chunk_simple_gla`, which keeps its inputs. Both compute the states of chunks again in the backward
    pass."""
    if not rule.delta:
        return _simple_gla(rule)
    H, K, D, b = rule.heads, rule.key_heads, rule.key_dim, rule.itemsize
    keys = 2 * b * K * D
    saved = keys + b * H * rule.value_dim + H * (WIDE + b + b * FLA_CHUNK)
    backward = b * H * (5 * D + 5 * rule.value_dim + 2 * D * rule.value_dim / FLA_CHUNK)

    def forward(V: int) -> float:
        return saved + b * H * (D + 3 * V + D * V / FLA_CHUNK) + WIDE * H * FLA_CHUNK

    mapped = forward(rule.value_dim + D) + b * H * D
    return KernelBytes(saved, forward(rule.value_dim), backward, keys + 2 * WIDE * H, mapped, 2 * b * H * D)


def _simple_gla(rule: RecurrenceShape) -> KernelBytes:
    H, D, V, b = rule.heads, rule.key_dim, rule.value_dim, rule.itemsize
    inputs, states = b * H * (2 * D + V), H * D * V / FLA_CHUNK
    saved = inputs + WIDE * H
    forward = saved + b * (H * V + states)
    return KernelBytes(saved, forward, inputs + 2 * WIDE * (states + H), inputs + WIDE * H, forward, inputs)

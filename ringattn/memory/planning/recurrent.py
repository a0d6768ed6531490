"""What the part of a layer that carries a state holds, and how long it takes.

Counted are the tensors of transformers' layers around the recurrence, and of its kernel (`recurrent_kernels`) for the
rows that a layout gives to a rank.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

from ringattn.memory.planning.parts import RecurrentPart
from ringattn.memory.planning.recurrent_kernels import KernelBytes, of_fla, of_mamba, of_torch
from ringattn.memory.planning.shapes import ModelShape, RunShape, layout_of
from ringattn.parallel.layout import Layout
from ringattn.parallel.machine.machine import Machine
from ringattn.recurrent.kernels.chunked import CHUNK, CHUNK_OF_DIAGONALS
from ringattn.recurrent.plan import pieces_of, roles_of
from ringattn.recurrent.price import RecurrenceShape, kernel_seconds, prices, received

WIDE = 4  # bytes of float32
NAMES = {"mamba": "the kernels of mamba-ssm", "fla": "the kernels of flash-linear-attention", None: "plain torch"}


@dataclass(frozen=True)
class RecurrentUse:
    """One layer's part on the rank that needs most, in bytes beside the layer's input and its norm.

    Arguments:
        saved: what autograd keeps of it.
        narrow: of its products, what `keep="selective"` keeps.
        forward: the most that is there in the forward pass if nothing is kept.
        backward: the most in the backward pass, with what is kept until then.
        forward_seconds, backward_seconds: of the recurrences of all layers together, with what their routes add.
        told: the route, and whose kernel.
    """

    saved: int
    narrow: int
    forward: int
    backward: int
    forward_seconds: float
    backward_seconds: float
    told: str

    @classmethod
    def of(cls, model: ModelShape, run: RunShape, machine: Machine) -> "RecurrentUse | None":
        """For the documents of a run; None for a model without such layers."""
        part = model.recurrent
        if part is None:
            return None
        rows, size = run.local_tokens, run.itemsize
        around = _Around.of(part, size)
        narrow = rows * part.narrow * size
        if part.rule is None:
            saved = rows * around.saved
            return cls(saved, narrow, saved, saved + 2 * rows * part.channels * size, 0.0, 0.0, "convolutions")
        rule = replace(part.rule, itemsize=size)
        cut = _Cut.of(rule, run, layout_of(model, run, machine), machine)
        package = None if run.recurrent == "torch" else part.package
        kernel = of_torch(part, rule) if package is None else of_mamba(rule) if package == "mamba" else of_fla(rule)
        saved = int(rows * around.saved + cut.saved(kernel))
        count = sum(parts.recurrence for parts in model.parts)
        seconds = kernel_seconds(rule, rows, machine)
        return cls(
            saved=saved,
            narrow=narrow,
            forward=int(max(rows * around.convolution, rows * around.forward + cut.forward(kernel))),
            backward=int(
                max(saved + rows * around.after_backward, rows * around.before_backward + cut.backward(kernel))
            ),
            forward_seconds=count * (seconds + cut.seconds / 3),
            backward_seconds=count * (2 * seconds + cut.seconds * 2 / 3),
            told=f"{cut.route} of states by {NAMES[package]}",
        )


@dataclass(frozen=True)
class _Around:
    """Bytes of a token around the recurrence: convolution and norms of keys before it, gate and norm after it.

    Arguments:
        saved: all that is kept of both.
        convolution: what is there while it is computed, if nothing is kept.
        forward: what is there while the recurrence is computed, if nothing is kept.
        before_backward: what of it is there when the recurrence goes backward, with the gradients that go into it.
        after_backward: gradients beside all that is saved, when gate and norm go backward.
    """

    saved: int
    convolution: int
    forward: int
    before_backward: int
    after_backward: int

    @classmethod
    def of(cls, part: RecurrentPart, b: int) -> "_Around":
        """Of a part, for products of `b` bytes an element."""
        rule, width, channels = part.rule, part.width, part.channels
        if rule is None:  # both factors and the convolution's input; rows with those before them; its result; theirs
            saved = b * (part.projected + 3 * channels)
            return cls(saved, saved, saved, saved, 0)
        if not channels:
            return cls.of_lightning(width, b)
        if part.package is None:
            return cls.of_mamba1(part, b)
        heads = WIDE * rule.heads
        convolved = 3 * b * channels  # with the rows before them, as the convolution gave them, and after SiLU
        copies = 0 if b == WIDE else WIDE  # of what is float32 there are no copies
        if rule.delta:
            before = convolved + 2 * copies * rule.key_heads * rule.key_dim + 4 * heads
            after = 3 * (WIDE + b) * width + heads
            # As they go in, and in float32.
            arguments = (b + 2 * WIDE + (b if copies else 0)) * rule.key_heads * rule.key_dim
            gradients = (WIDE + b) * width
        else:
            before = convolved + 3 * b * rule.heads
            if part.normed:
                after = (4 * WIDE + b) * width + (copies * width or b * part.projected)
            else:
                after = (WIDE + 2 * b) * width + b * part.projected
            arguments, gradients = 0, 3 * WIDE * width
        forward = b * (channels + part.held) + arguments
        # Its input, of which the rest waits, the rows with those before them, and the result thrice.
        waiting = channels + part.held if rule.delta else part.projected
        convolution = b * (waiting + 4 * channels)
        return cls(before + after, convolution, forward, before + gradients, 4 * WIDE * width)

    @classmethod
    def of_lightning(cls, width: int, b: int) -> "_Around":
        """Queries, keys and values are one product with an activation; a norm and a gate come after."""
        product = 3 * b * width
        after = (WIDE + 4 * b) * width
        return cls(product + after, 2 * product, product, product + 2 * WIDE * width, 4 * WIDE * width)

    @classmethod
    def of_mamba1(cls, part: RecurrentPart, b: int) -> "_Around":
        """A gate that comes with the convolution's input; steps in float32, from a product of the convolution's result,
        and all that the recurrence is given."""
        width = part.width
        copies = 0 if b == WIDE else WIDE  # of what is float32 there are no copies
        before = 5 * b * width + 2 * b * (part.projected - 2 * width) + (2 * WIDE + copies) * width
        after = (2 * b + WIDE) * width
        forward = (3 * b + 2 * WIDE + copies) * width
        return cls(before + after, 6 * b * width, forward, before + 2 * WIDE * width, 4 * WIDE * width)


@dataclass(frozen=True)
class _Cut:
    """What the layout makes of the recurrence of a rank.

    Arguments:
        route: "scan" or "exchange".
        whole: rows of the rank in whole documents; by the exchange all rows count as such.
        cut: those in pieces.
        rounded: rows that chunks have places for, by those that there are.
        maps: bytes of the maps of the rank's middle pieces, and of the states that its middle and last ones start from,
            which are kept.
        message: bytes of what a rank holds of its own pieces, sends and receives.
        moved: bytes of the rows that the exchange of heads brings.
        seconds: what the route takes beside the kernel, in both passes.
    """

    route: str
    whole: float
    cut: "_PieceRows"
    rounded: float
    maps: int
    message: int
    moved: float
    seconds: float

    @classmethod
    def of(cls, rule: RecurrenceShape, run: RunShape, layout: Layout, machine: Machine) -> "_Cut":
        """For the documents of a run."""
        pieces, ranks = pieces_of(layout), run.ring * run.ulysses
        chunk = CHUNK_OF_DIAGONALS if rule.diagonal else CHUNK
        chunks = sum(-(-piece.size // chunk) for held in pieces for piece in held) * chunk
        rounded = chunks / max(1, sum(piece.size for held in pieces for piece in held))
        rows = run.local_tokens
        price = min(prices(layout, rule, machine), key=lambda one: one.seconds)
        if price.route == "exchange":
            # The rank with most heads has all tokens of these.
            own = run.tokens * -(-rule.heads // ranks) / rule.heads
            moved = rows * rule.row_numbers(ranks) * rule.itemsize
            return cls("exchange", max(own, rows), _PieceRows(0, 0, 0, 0), rounded, 0, 0, moved, price.seconds)
        roles, wide = roles_of(layout), max(WIDE, rule.itemsize)
        parts = [(one.firsts, one.middles, (*one.middles, *one.lasts), one.cut) for one in roles]
        held = _PieceRows(*(max(sum(piece.size for piece in part) for part in one) for one in zip(*parts, strict=True)))
        states = max(len(one.middles) + len(one.lasts) for one in roles)
        maps = wide * (max(len(one.middles) for one in roles) * rule.map_numbers + states * rule.state_numbers)
        own = wide * max(len(one.cut) for one in roles) * (rule.map_numbers + rule.state_numbers)
        message = int(own + 2 * max(received(layout, rule, price.rounds)))
        whole = max(layout.tokens(rank) for rank in range(ranks)) - held.all
        return cls("scan", max(0, whole), held, rounded, maps, message, 0.0, price.seconds)

    def saved(self, kernel: KernelBytes) -> float:
        dealt = kernel.dealt if self.route == "exchange" else 0
        return self.whole * (self.rounded * kernel.saved + dealt) + self.cut.all * kernel.inputs + self.maps

    def forward(self, kernel: KernelBytes) -> float:
        """With all that is there of the kernel, kept or not."""
        rows = self.cut
        most = max(rows.firsts * kernel.forward, rows.middles * kernel.mapped, rows.followed * kernel.forward)
        cut = self.rounded * most + self.maps + self.message
        return max(self.rounded * self.whole * kernel.forward, cut) + self.moved

    def backward(self, kernel: KernelBytes) -> float:
        """With what was kept: pieces that are cut are computed again, and what that keeps is there twice."""
        again = self.rounded * self.cut.all * (kernel.saved + kernel.again + kernel.backward) + self.message
        return self.saved(kernel) + max(self.rounded * self.whole * kernel.backward, again)


class _PieceRows(NamedTuple):
    """Rows in pieces of cut documents, each of the rank that has most.

    Arguments:
        firsts, middles: in pieces that begin their documents, and in those that neither begin nor end them.
        followed: in all but the first ones.
        all: in all of them.
    """

    firsts: int
    middles: int
    followed: int
    all: int

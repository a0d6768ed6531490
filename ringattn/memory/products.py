"""Matrix products that are kept beneath a checkpoint: they are computed once.

What a product is worth is what computing it again takes, by the bytes that keeping it takes. An output of a linear
layer with I inputs costs 2 I operations an element, whichever layer it is, so that in 16 bits each byte saves I of
them: 4 thousand in an 8B model. Not which product counts, but how many bytes there are:

    bytes a token    8B model           operations a byte
    attention's out  8 K (kept before)  by far the most at long lengths
    q, k, v          12 K               4 K
    o                8 K                4 K
    gate, up         56 K               4 K
    down             8 K                14 K, but most models' backward pass does not need it

So what is narrow is kept: the outputs of linear layers that are at most WIDEST times as wide as their inputs. They are
taken as they leave their layer: norms, rotary positions and sums are computed again from them. Gate and up, seven times
their input together, are computed again, and so are experts that are not linear layers. What leaves the layer without
being read by anything that the backward pass needs is not kept.

(The idea is torch's selective activation checkpointing, `torch.utils.checkpoint.create_selective_checkpoint_contexts`.
It looks at every operator in Python and keeps operators, not layers: products in tiles could not be told from others.)
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

WIDEST = 2

Values = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def linear_of(layer: nn.Linear, x: Tensor, values: Values) -> Tensor:
    """A linear layer whose values come from elsewhere, with the gradients of the true ones.

    Arguments:
        x: (..., I).
        values: from x, weight (O, I) and bias (O,), as autocast has them, to (..., O); called without gradients.
    """
    weight: Tensor = layer.weight
    bias: Tensor | None = layer.bias
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return _Linear.apply(x, weight, bias, values)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, values: Values) -> Tensor:
        wanted = ctx.needs_input_grad
        ctx.save_for_backward(x if wanted[1] else None, weight if wanted[0] else None)
        return values(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dout, wanted = grads[0], ctx.needs_input_grad
        rows = dout.flatten(0, -2)
        dx = dout @ weight if wanted[0] else None
        return dx, rows.T @ x.flatten(0, -2) if wanted[1] else None, rows.sum(0) if wanted[2] else None, None


def unset(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Memory for x @ weight.T + bias as it is found: for where nobody reads the values."""
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def narrow(layer: nn.Module) -> list[nn.Linear]:
    """The linear layers inside of one whose outputs are worth keeping. Quantised and other kinds of them are not."""
    linear = [one for one in layer.modules() if type(one) is nn.Linear]
    return [one for one in linear if one.out_features <= WIDEST * one.in_features]


class KeptLinears:
    """The linear layers of a layer, whose outputs can be kept from now on; `undo` gives them back.

    In tiles (`ringattn.memory.tiled_rows`), where gradients are off, nothing is kept.
    """

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        self.call: Products | None = None  # the one that runs now
        self.unread: nn.Linear | None = None  # the one whose output the backward pass does not need
        self.looked = False
        self._linears = [_KeptLinear(one, self) for one in linears]

    def undo(self) -> None:
        """All of them as they were."""
        for one in self._linears:
            one.undo()

    def look(self, last: nn.Linear, node: Any, outputs: Sequence[Any]) -> None:
        """Finds out, once, whether the backward pass needs the output of the last linear layer."""
        self.looked = True
        if node is not None and not _is_read(node, outputs):
            self.unread = last


class _KeptLinear:
    """Stands in a linear layer's place as its forward method."""

    def __init__(self, layer: nn.Linear, linears: KeptLinears) -> None:
        self.layer, self.linears = layer, linears
        self.plain, self._replaced = layer.forward, layer.__dict__.get("forward")
        layer.forward = self  # type: ignore[method-assign]

    def undo(self) -> None:
        if self.layer.__dict__.get("forward") is self:
            del self.layer.forward
            if self._replaced is not None:
                self.layer.forward = self._replaced

    @torch.compiler.disable
    def __call__(self, x: Tensor) -> Tensor:
        call = self.linears.call
        # An output that is not needed is not computed again: autograd has all that it wants before it would be.
        if call is None or not torch.is_grad_enabled() or (self.linears.unread is self.layer and not call.first):
            return self.plain(x)
        return call.product(self.layer, x)


class Products:
    """The products of one call of a layer, in the order in which they are made.

    Arguments:
        linears: of the layer.
        pack, unpack: what stands for a tensor meanwhile, and the tensor again.
    """

    def __init__(
        self,
        linears: KeptLinears,
        pack: Callable[[Tensor], Any] = lambda x: x,
        unpack: Callable[[Any], Tensor] = lambda x: x,
    ) -> None:
        self._linears, self._pack, self._unpack = linears, pack, unpack
        self.first = not linears.looked  # of all calls of the layer: it notes the product that nobody reads as well
        self._layers: list[nn.Linear] = []
        self._noted: list[tuple[Any, int] | None] = []  # and its version; None: computed again
        self._newest: tuple[Tensor, int, Any] | None = None  # the last product, its version and its node
        self._turn: int | None = None  # None: products are computed and noted; else the number of the next one

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Inside of it products are computed and noted."""
        with self._running(None):
            yield

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Inside of it they are what was noted."""
        with self._running(0):
            yield

    @contextmanager
    def _running(self, turn: int | None) -> Iterator[None]:
        before, self._linears.call = self._linears.call, self
        self._turn = turn
        try:
            yield
        finally:
            self._linears.call = before

    def product(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """The output of a linear layer, computed or kept. Raises RuntimeError if another one was called there."""
        if self._turn is None:
            self._note_newest()
            out = linear_of(layer, x, F.linear)
            self._layers.append(layer)
            self._newest = out.detach(), out._version, out.grad_fn
            return out
        number, self._turn = self._turn, self._turn + 1
        if number >= len(self._layers) or self._layers[number] is not layer:
            raise RuntimeError(
                f"linear layer {number + 1} of a layer is another one where the layer is computed again than it was at "
                f"first, when there were {len(self._layers)}: a layer whose products are kept must do the same twice"
            )
        return linear_of(layer, x, self._values(self._noted[number]))

    def end(self, out: Any) -> None:
        """The layer is over, and this is what it returned."""
        if self._newest is not None and self.first:
            outputs = out if isinstance(out, tuple) else (out,)
            self._linears.look(self._layers[-1], self._newest[2], outputs)
            if self._linears.unread is not None:
                self._newest = None
                self._noted.append(None)
        self._note_newest()

    def _note_newest(self) -> None:
        if self._newest is not None:
            newest, version, _ = self._newest
            self._noted.append((self._pack(newest), version) if newest._version == version else None)
            self._newest = None

    def _values(self, noted: tuple[Any, int] | None) -> Values:
        """Kept ones, unless the model has changed them in place since."""
        if noted is None or (isinstance(noted[0], Tensor) and noted[0]._version != noted[1]):
            return F.linear
        return lambda *_: self._unpack(noted[0]).detach()


# Of autograd's nodes those that need nothing of what went into them.
READS_NOTHING = frozenset({
    "AddBackward0", "CloneBackward0", "ToCopyBackward0", "ViewBackward0", "UnsafeViewBackward0", "SliceBackward0",
    "ReshapeAliasBackward0", "TransposeBackward0", "UnsqueezeBackward0", "SqueezeBackward1",
    # DeepSpeed's, around every module
    "PreBackwardFunctionForModuleBackward", "PostBackwardFunctionModuleBackward",
})  # fmt: skip
GATHERS_GRADIENT = "torch::autograd::AccumulateGrad"  # of a leaf: it was made whenever, and says that it came last


def _is_read(product: Any, outputs: Sequence[Any]) -> bool:
    """Whether anything that autograd computed after a product, on the way to the outputs, needs what went into it."""
    made = product._sequence_nr()
    todo = [out.grad_fn for out in outputs if isinstance(out, Tensor)]
    seen: set[Any] = set()
    while todo:
        node = todo.pop()
        if node is None or node in seen or node._sequence_nr() <= made or node.name() == GATHERS_GRADIENT:
            continue
        if node.name() not in READS_NOTHING:
            return True
        seen.add(node)
        todo += [before for before, _ in node.next_functions]
    return False

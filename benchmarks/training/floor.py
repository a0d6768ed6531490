"""The floor of a step: attention's kernel alone, and the matrix products alone.

Attention's forward and backward pass once, on all documents and an even share of the heads. Of the products of a layer
8/6 of a training step's: forward twice, since they are computed again, and once for each gradient; the head's without
being computed again. No norms, no communication, no copies, no optimizer.

T tokens of the stream, t = T / ranks, E and F input and output width of a linear layer.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.training.case import Case, Place, head_dim
from benchmarks.training.kernel import MeasuredKernel
from benchmarks.training.measuring import Watch, free_memory
from benchmarks.training.peer_attention import PeerAttention
from ringattn import Documents
from ringattn.kernels.spec import Grads, Options, SavedCall

ROWS = 16384  # of a product that is timed: longer ones take as long for each row
WARM = 2048  # tokens that the kernel is called with before it is timed


@dataclass(frozen=True)
class Floor:
    """Seconds of a step on one rank: attention of all layers forward and backward, products of all layers, the head's.

    Arguments:
        rate: FLOP/s of the layers' products.
    """

    forward: float
    backward: float
    layers: float
    head: float
    rate: float

    @property
    def seconds(self) -> float:
        return self.forward + self.backward + self.layers + self.head


def measure_floor(case: Case, place: Place, kernel: MeasuredKernel) -> Floor:
    """The floor of a case on this machine now. Collective."""
    config, local = case.config, case.docs.total / place.ranks
    forward, backward = _attention_seconds(case, place, kernel)
    free_memory()
    products = [_product_seconds(width, out, case, place) for width, out in linear_layers(config)]
    inner = sum(2 * first + second + third for first, second, third in products) * local
    head = sum(_product_seconds(config.hidden_size, config.vocab_size, case, place)) * local
    number = config.num_hidden_layers
    flops = 8 * local * sum(width * out for width, out in linear_layers(config))
    seconds = place.most(number * forward, number * backward, number * inner, head)
    free_memory()
    return Floor(seconds[0], seconds[1], seconds[2], seconds[3], flops / inner)


def linear_layers(config: Any) -> list[tuple[int, int]]:
    """Input and output width of each linear layer of a decoder layer of Llama's kind."""
    width, inner, dim = config.hidden_size, config.intermediate_size, head_dim(config)
    queries, keys = config.num_attention_heads * dim, config.num_key_value_heads * dim
    return [
        (width, queries), (width, keys), (width, keys), (queries, width),
        (width, inner), (width, inner), (inner, width),
    ]  # fmt: skip


def _attention_seconds(case: Case, place: Place, kernel: MeasuredKernel) -> tuple[float, float]:
    """Forward and backward of one layer, after a short call that compiles."""
    _kernel_seconds(replace(case, docs=Documents([min(WARM, case.docs.total)])), place, kernel)
    return _kernel_seconds(case, place, kernel)


def _kernel_seconds(case: Case, place: Place, kernel: MeasuredKernel) -> tuple[float, float]:
    config, total = case.config, case.docs.total
    heads = max(1, config.num_attention_heads // place.ranks)
    keys = max(1, config.num_key_value_heads // place.ranks)
    q, out, dout, dq = (_random(total, heads, head_dim(config), case=case, place=place) for _ in range(4))
    k, v, dk, dv = (_random(total, keys, head_dim(config), case=case, place=place) for _ in range(4))
    attention = PeerAttention(kernel)
    attention.of(case.docs)
    call, options = attention.call, Options(head_dim(config) ** -0.5)
    assert call is not None
    watches = Watch(place.device), Watch(place.device)
    watches[0].start()
    lse = kernel.real.forward(q, k, v, call, options, out)
    watches[0].stop()
    watches[1].start()
    kernel.real.backward(dout, SavedCall(q, k, v, out, lse, call, options), Grads(dq, dk, dv))
    watches[1].stop()
    return watches[0].seconds(), watches[1].seconds()


def _product_seconds(width: int, out: int, case: Case, place: Place) -> tuple[float, float, float]:
    """Seconds a row of a linear layer (F, E): its output, its input's gradient, and its weight's."""
    rows = max(1, min(ROWS, case.docs.total // place.ranks))
    x, weight, y = (
        _random(*shape, case=case, place=place) for shape in ((rows, width), (out, width), (rows, out))
    )  # fmt: skip
    products: tuple[Callable[[], object], ...] = lambda: x @ weight.T, lambda: y @ weight, lambda: y.T @ x
    first, second, third = (_seconds(product, place.device) / rows for product in products)
    return first, second, third


def _seconds(product: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    product()
    watch = Watch(device)
    watch.start()
    for _ in range(repeats):
        product()
    watch.stop()
    return watch.seconds() / repeats


def _random(*shape: int, case: Case, place: Place) -> torch.Tensor:
    return torch.randn(shape, device=place.device, dtype=case.dtype)

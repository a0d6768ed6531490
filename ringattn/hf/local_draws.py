"""Random draws inside of a model: apart on the ranks, for they hold other tokens, and equal outside of it.

Every rank starts from the same seed, so that the order of the data, batches and new weights are equal on all ranks.
Were that generator used inside of the model too, shards of equal size would draw equal dropout masks for different
tokens, and shards of unequal size would leave it at different places, so that the next batches differ.

So a training forward pass runs with the device's generator seeded anew: from the state in which the pass found it, so
that a run repeats from its seed and a resumed one goes on, and from the rank. Afterwards the generator gets its state
back and makes one draw, on every rank the same one whatever was drawn inside. Checkpointed layers save the state that
they run under, which is the inner one, so that recomputing them in the backward pass draws the same masks again.

What is drawn for each token (dropout, LoRA's dropout, the jitter of a router's input, NEFTune's noise) is right this
way. What is drawn for weights, layers or experts has to be equal on all ranks and would not be: those draws are
refused by name, here, in `configuration` and in `adapters`. NEFTune too is refused, for the size of its noise. A
model's own code that draws for something else than tokens, in its forward pass, cannot be seen from here.
"""

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd


@dataclass(eq=False)
class LocalDraws:
    """The generator of a device, forked for a forward pass.

    Arguments:
        device: whose default generator the model draws from.
        rank: of this process among all of the job: replicas too draw apart.
        parts: the modules of the model, kept because a walk through thousands takes milliseconds.
    """

    device: torch.device
    rank: int
    parts: list[nn.Module] = field(default_factory=list, repr=False)
    _outside: Tensor | None = field(default=None, repr=False)
    _owner: nn.Module | None = field(default=None, repr=False)

    @torch.compiler.disable
    def fork(self, owner: nn.Module) -> None:
        """Before `owner` runs: the generator is this rank's own until `join`, if any part of the model is in training
        mode, and may draw. Without effect inside of another module that has forked it.

        Raises NotImplementedError for dropout in a CUDA graph that is being captured: there it cannot be forked.
        """
        if self._owner is not None:
            return
        parts = self.parts or list(owner.modules())
        if not any(part.training for part in parts):
            return
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            if any(isinstance(part, _DropoutNd) and part.training and part.p for part in parts):
                raise NotImplementedError(
                    f"{type(owner).__name__} has dropout: ranks cannot draw apart in a CUDA graph"
                )
            return
        self._owner, self._outside = owner, self._state()
        digest = hashlib.blake2b(self._outside.numpy().tobytes(), digest_size=8).digest()
        self._seed((int.from_bytes(digest, "little") + self.rank) % 2**63)

    @torch.compiler.disable
    def join(self, owner: nn.Module) -> None:
        """After `owner` ran: back to the state that its `fork` found, and one draw further."""
        if self._owner is not owner or self._outside is None:
            return
        if self.device.type == "cpu":
            torch.set_rng_state(self._outside)
        else:
            torch.get_device_module(self.device).set_rng_state(self._outside, self.device)
        self._owner = self._outside = None
        torch.rand((), device=self.device)

    def _state(self) -> Tensor:
        if self.device.type == "cpu":
            return torch.get_rng_state()
        return torch.get_device_module(self.device).get_rng_state(self.device)

    def _seed(self, seed: int) -> None:
        if self.device.type == "cpu":
            torch.default_generator.manual_seed(seed)
        else:
            module = torch.get_device_module(self.device)
            with module.device(self.device):
                module.manual_seed(seed)


def fork_before(module: Any, args: Any) -> None:
    """A forward pre-hook of a parallelized model, and of its decoder, which a caller may run by itself."""
    if (handle := getattr(module, "_ringattn", None)) is not None:
        handle.draws.fork(module)


def join_after(module: Any, args: Any, output: Any) -> None:
    """A forward hook, to be called after a forward pass that raised, too."""
    if (handle := getattr(module, "_ringattn", None)) is not None:
        handle.draws.join(module)


def check_draws(model: Any) -> None:
    """Raises NotImplementedError for draws that are wrong when ranks make them apart. Looks at attributes, cheaply."""
    name = type(model).__name__
    layerdrop = getattr(model.get_decoder(), "layerdrop", 0.0)
    if layerdrop:
        raise NotImplementedError(
            f"{name} has layerdrop={layerdrop}: layers are dropped by a draw that must be equal on all ranks, which "
            "draw apart; set it to 0, in the configuration before the model is made"
        )
    alpha = getattr(model.get_input_embeddings(), "neftune_noise_alpha", None)
    if alpha is not None:
        raise NotImplementedError(
            f"{name} has neftune_noise_alpha={alpha}: the noise is scaled by the number of tokens that one call sees, "
            "of which a rank holds a part; leave it out"
        )

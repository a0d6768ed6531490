"""A pack on this rank: which of its tokens it holds, and the plans of the layers over them. Made ahead of the step,
from integers and tokens alone, so that any process can do it."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ringattn.parallel.layout import Layout
from ringattn.parallel.mesh.shape import MeshShape
from ringattn.parallel.planning.ahead import install
from ringattn.recurrent.ahead import Mixer, MixerPlans, plan_mixers
from ringattn.recurrent.weighing import MixingLayers, weighed_layout
from ringattn.training.packs.batches import Batch, batches
from ringattn.training.packs.packers import AnyPacker
from ringattn.training.packs.packing import NO_TARGET
from ringattn.training.packs.sharing import AnyPack
from ringattn.trees import Targets


@dataclass(frozen=True)
class LocalPack:
    """This rank's part of a pack: t of its T tokens.

    Arguments:
        ids, positions: (t,) int64; positions count in the document.
        targets: (t,) int64, already shifted; of a pack with common prefixes triples of the t tokens, on the host.
        layout: who holds which token.
        plans: of the model's attentions and layers with states on it, as far as these were known.
        count: how many of the t targets there are.
        there: once this CUDA event has happened, the tensors and the plans' tables are on the device; None: they are.
    """

    ids: torch.Tensor
    targets: torch.Tensor | Targets
    positions: torch.Tensor
    layout: Layout
    plans: MixerPlans = ()
    count: int = 0
    there: torch.cuda.Event | None = None

    @property
    def labels(self) -> torch.Tensor:
        """(t,) what the model is given as labels. Triples go with the layout: any labels ask for their loss."""
        return self.ids if isinstance(self.targets, Targets) else self.targets

    @property
    def known(self) -> int | Targets:
        """What the host knows of the targets."""
        return self.targets if isinstance(self.targets, Targets) else self.count

    def arrive(self) -> None:
        """Before the pack is used: its plans are found by the layers, and the current stream waits for it."""
        install(self.layout, self.plans)
        if self.there is not None:
            torch.cuda.current_stream(self.ids.device).wait_event(self.there)


@dataclass
class BatchMaker:
    """All that this rank's batches are made from; it can be sent to another process with `to_bytes`.

    Arguments:
        packer: where the stream of packs goes on.
        packs_per_step, replica, replicas: see `batches`.
        mesh: the ranks of the sequence, of which this one is `mesh.sequence_rank`.
        policy, layers: see `weighed_layout`.
        share: common prefixes of a pack's documents are computed once.
        mixers: for which plans are made, from the next pack on; they are known once a model ran.
    """

    packer: AnyPacker
    packs_per_step: int
    replica: int
    replicas: int
    mesh: MeshShape
    policy: str
    layers: MixingLayers | None
    share: bool = False
    mixers: tuple[Mixer, ...] = ()

    def batches(self) -> Iterator[Batch[LocalPack]]:
        """Endless batches."""
        return batches(self.packer, self.packs_per_step, self.replica, self.replicas, self._place, self.share)

    def _place(self, pack: AnyPack) -> LocalPack:
        return placed(pack, self.mesh, self.policy, self.layers, self.mixers)


def placed(
    pack: AnyPack,
    mesh: MeshShape,
    policy: str,
    layers: MixingLayers | None,
    mixers: tuple[Mixer, ...] = (),
) -> LocalPack:
    """This rank's part of a pack."""
    layout = weighed_layout(pack.docs, mesh, policy, layers)
    labels = pack.labels
    targets = labels.shard(layout) if isinstance(labels, Targets) else layout.shard(labels)
    return LocalPack(
        ids=layout.shard(pack.tokens),
        targets=targets,
        positions=layout.position_ids(torch.device("cpu")),
        layout=layout,
        plans=plan_mixers(layout, mixers),
        count=len(targets) if isinstance(targets, Targets) else int((targets != NO_TARGET).sum()),
    )

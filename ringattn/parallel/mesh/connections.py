"""What connects the ranks of a mesh while it is open: device meshes, process groups, and what moves data over them."""

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ringattn.parallel.transport.process_groups import CLOSED, Lease
from ringattn.parallel.transport.protocol import Transport
from ringattn.parallel.transport.symmetric import open_transport


class Connections:
    """The groups and transports of one `init_mesh` and shape, each made when it is first asked for.

    A mesh is a frozen record of numbers that says what ranks there are; this is the part of it that ends.
    """

    def __init__(self, device_mesh: DeviceMesh, sequence_mesh: DeviceMesh, lease: Lease) -> None:
        self._meshes = {"device": device_mesh, "sequence": sequence_mesh}
        self._lease = lease
        self._groups: dict[str, dist.ProcessGroup] = {}
        self._transports: dict[str, Transport] = {}
        lease.holds(self)

    @property
    def closed(self) -> bool:
        return self._lease.closed

    def mesh(self, name: str) -> DeviceMesh:
        """That of all axes, "device", or that of the ranks of both sequence axes in one dimension, "sequence"."""
        if name not in self._meshes:
            raise ValueError(CLOSED)
        return self._meshes[name]

    def group(self, axis: str) -> dist.ProcessGroup:
        """This rank's peers on "ring" or "ulysses", or on both of them: "sequence"."""
        if axis not in self._groups:
            self._groups[axis] = self.mesh("sequence" if axis == "sequence" else "device").get_group(axis)
        return self._groups[axis]

    def transport(self, axis: str, reason: str) -> Transport:
        """What moves data on an axis: one for all attentions, since it may own message buffers.

        Arguments:
            reason: why not copy engines, if not.
        """
        if axis not in self._transports:
            self._transports[axis] = open_transport(self.group(axis), reason)
        return self._transports[axis]

    def close(self) -> None:
        """Give back what the lease holds, and with it all groups that no other lease does. Collective."""
        self._lease.close()

    def forget(self) -> None:
        """Let go of all groups, so that their memory, sockets and threads are freed. What the lease calls first."""
        for axis in ("ring", "ulysses"):  # in one order on all ranks, for a transport may wait for its peers
            if axis in self._transports:
                self._transports.pop(axis).close()
        self._groups.clear()
        self._meshes.clear()

"""Message buffers of transports: how large they are, and who needs which."""

# Bytes that a rank sends at most, below which messages that are read from peers are pulled by a kernel, between others:
# 30 µs on the wire. Longer ones travel beside kernels.
PULLED = 8 << 20


SMALLEST = 1 << 20  # bytes of a message buffer


def message_buffers(largest: int) -> int:
    """Bytes of the two buffers of an axis whose messages copy engines read; none if there are no messages."""
    return 2 * half_bytes(largest) if largest else 0


def half_bytes(largest: int) -> int:
    """Bytes of one of them: powers of two, so that growing is rare."""
    return max(SMALLEST, 1 << (largest - 1).bit_length())

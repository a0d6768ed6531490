"""Layers that carry a state along a document, over any layout.

`parallel_recurrence` (gated delta rule, Mamba-2, gated linear and lightning attention) and `parallel_convolution` stand
beside `parallel_attention`.

The mathematics. A recurrence has a state S (d_k × d_v a head) that each token changes by an affine map. So a piece of a
document, a run of consecutive tokens, is one too, whatever its length:

    S_out = M · S_in + U                                                      (1)

U is what the piece makes of an empty state. M is d_k × d_k a head for the delta rule, a number a head for Mamba-2 and
lightning attention, and a diagonal for gated linear attention and Mamba-1. Affine maps compose: the state at the head
of piece n of a document is

    S_n = U_(n-1) + M_(n-1) · (U_(n-2) + M_(n-2) · ( ... U_0))                (2)

in the order of the document, whoever holds the pieces. So the pairs (M, U) of the pieces of *cut* documents travel, all
in one round or, where there are many ranks, composed in several (`ringattn.recurrent.rounds`), and every rank runs its
pieces from the right state. The first piece of a document has an empty state, and gives no M; the last gives nothing.
Documents that are whole on a rank need nothing, and run while the pairs are under way.

The outputs of a piece are affine in S_in as well. Let R be the gradient of the loss in S_in through the piece's own
outputs alone. Then with the transposed map of (1)

    dS_in = Mᵀ · dS_out + R                                                   (3)

and since the end of a piece is the head of the next one, dS_out of a piece is dS_in of the next, and 0 for the last. So
R travels as U does, with Mᵀ for M, from the end of each document to its head, and each rank runs the backward pass of
its pieces with both S_in and dS_out known: gradients through M and U arrive in it like all others, because S_out is a
function of the piece's inputs and of S_in.

A causal convolution of width w needs the w - 1 rows before a piece; their gradients go back and are added.

M, U, R and their products are float32, or float64 where inputs are.
"""

from ringattn.recurrent.convolution import parallel_convolution
from ringattn.recurrent.recurrence import ParallelRecurrence, parallel_recurrence

__all__ = ["ParallelRecurrence", "parallel_convolution", "parallel_recurrence"]

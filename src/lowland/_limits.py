"""Sizes and prices by which engines are chosen, and what they may take."""

from __future__ import annotations

MEBIBYTE = 1 << 20

# Above this many parameters brute force takes minutes rather than seconds; it must be asked for.
DENSE_LIMIT = 2048

# Nor is it taken unasked where its products are counted to take more than this many seconds.
DENSE_SECONDS = 10.0

# Up to this many the whole matrix is quicker to form and to decompose than a few of its eigenvalues
# are to find by products.
DENSE_IS_QUICKER = 512

# Bytes that a Hessian itself may take.
DENSE_MEMORY = 4 << 30

# Bytes of temporaries of the closed form.
DEFAULT_MEMORY_BUDGET = 256 * MEBIBYTE

DEFAULT_PROBES = 32

# What a probe and its gradient cost, in gradients of the loss; and how many probes an exact value
# is worth, which has no noise.
GRADIENTS_A_PROBE = 4
PROBES_WORTH = 8

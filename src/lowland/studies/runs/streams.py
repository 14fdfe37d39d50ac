"""Random numbers of studies: a stream of its own for each seed and purpose."""

from __future__ import annotations

import torch


def stream(seed: int, kind: int) -> torch.Generator:
    """Random numbers of one kind, of at most ten, for one seed: apart from those of the others."""
    return torch.Generator().manual_seed(10 * seed + kind)

"""A pass over batches that goes on where it was interrupted."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch

from lowland.exact.blocks import Tile
from lowland.exact.by_parameters import Tiles

# Writing takes at most one part in so many of the time.
_SHARE = 20


@dataclass(frozen=True, eq=False)
class Resumed:
    """What an interrupted pass had seen.

    Attributes:
        path: Where it was kept.
        batches: How many.
        seen: A digest of them.
        tiles: Of the weighted sum of their Hessians.
    """

    path: str
    batches: int
    seen: bytes
    tiles: Tiles

    def check(self, seen: bytes) -> None:
        """Require that the same batches have come.

        Raises:
            ValueError: If they are others.
        """
        if seen != self.seen:
            raise ValueError(
                f"the first {self.batches} batches are not those of the pass that is kept in "
                f"{self.path!r}: give the batches in the same order, without shuffling, or delete "
                "the file to start anew"
            )


class Kept:
    """A file that a pass is kept in.

    Args:
        path: Of the file, which is deleted when the pass is complete.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.written, self.took = -float("inf"), 0.0

    def resume(self, key: bytes) -> Resumed | None:
        """What there is of the pass; None if nothing is.

        Raises:
            ValueError: If the file is of another model, criterion or state, or is none of these.
        """
        if not Path(self.path).exists():
            return None
        try:
            found = torch.load(self.path, map_location="cpu", weights_only=True)
            belongs, batches, seen = found["key"], found["batches"], found["seen"]
            tiles = [(Tile(*place), values) for place, values in found["tiles"]]
        except (
            UnpicklingError,
            EOFError,
            LookupError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            raise ValueError(
                f"{self.path!r} is no pass of hessian_moments that was kept: give checkpoint= the "
                f"name of a file that does not exist yet ({error})"
            ) from error
        if belongs != key:
            raise ValueError(
                f"{self.path!r} keeps a pass of another model, of other parameters, or of another "
                "criterion: delete it, or give checkpoint= another name"
            )
        return Resumed(self.path, batches, seen, tiles)

    def keep(self, key: bytes, batches: int, seen: bytes, tiles: Tiles) -> None:
        """Write the pass so far, if that takes little of the time since the last time."""
        start = time.monotonic()
        if start - self.written < _SHARE * self.took:
            return
        places = [
            ((t.lower, t.upper, t.start, t.stop), values.detach().cpu()) for t, values in tiles
        ]
        # Written beside it first, so that the file is whole whenever the process is killed.
        beside = f"{self.path}.part"
        torch.save({"key": key, "batches": batches, "seen": seen, "tiles": places}, beside)
        Path(beside).replace(self.path)
        self.written = time.monotonic()
        self.took = self.written - start

    def remove(self) -> None:
        """The pass is complete."""
        Path(self.path).unlink(missing_ok=True)

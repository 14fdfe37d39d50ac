"""How large a problem is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """The extent of a problem.

    ``features`` counts all rows of ``W``, ``inputs`` and ``outputs`` the trained rows of ``W`` and
    of ``v``; biases are among them.
    """

    networks: int
    samples: int
    features: int
    inputs: int
    hidden: int
    outputs: int
    itemsize: int

    @property
    def dim(self) -> int:
        """``P``, the number of trained parameters."""
        return self.inputs * self.hidden + self.outputs

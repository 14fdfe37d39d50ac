"""How large a problem is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """The numbers of networks, samples, units and trained rows, which costs depend on.

    Attributes:
        networks: In the ensemble.
        samples: Of each network.
        widths: Inputs, hidden layers from the first, outputs; biases are not counted.
        rows: Trained rows of each layer's weights, the bias's among them.
        itemsize: Bytes of a number.
    """

    networks: int
    samples: int
    widths: tuple[int, ...]
    rows: tuple[int, ...]
    itemsize: int

    @property
    def depth(self) -> int:
        """The number of layers with weights."""
        return len(self.rows)

    @property
    def dim(self) -> int:
        """``P``, the number of trained parameters."""
        return sum(rows * width for rows, width in zip(self.rows, self.widths[1:], strict=True))

    @property
    def last_in_factors(self) -> bool:
        """Whether pairs of samples take the last hidden layer's ``B`` as ``U Q U^T + diag(c)``.

        Of a wide layer under few outputs the whole matrix is larger than what it is made of. The
        layers below it need the whole.
        """
        width, outputs = self.widths[-2:]
        return self.depth - 2 in self.trained[:1] and width > 4 * outputs * outputs

    @property
    def trained(self) -> list[int]:
        """Layers of which at least one row is trained."""
        return [layer for layer, rows in enumerate(self.rows) if rows]

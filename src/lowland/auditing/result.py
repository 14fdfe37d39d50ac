"""What an audit found, as numbers, table, figure and words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowland.auditing import words
from lowland.auditing.figure import draw
from lowland.auditing.findings import Findings

if TYPE_CHECKING:
    from matplotlib.figure import Figure
else:  # optional; annotations are looked at in the tests
    Figure = Any


@dataclass(frozen=True, eq=False)
class Audit(Findings):
    """Measures of one network over rescalings, and what they say; from :func:`lowland.audit`.

    Attributes:
        layer, layers, parameters, samples, unseen, dtype, probes: What was measured.
        factors, values, stderr: What was found; one number a factor, by the measure's name.
        limits, left_out, notes: What else a reader should know.

    Example:
        >>> import torch, lowland
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> x, y, x_unseen = torch.randn(40, 3), torch.arange(40) % 2, torch.randn(20, 3)
        >>> audit = lowland.audit(model, nn.CrossEntropyLoss(), x, y, x_unseen, pairs=False)
        >>> audit.layer, len(audit.factors), len(audit.values["trace"])
        (0, 7, 7)
    """

    @property
    def verdict(self) -> str:
        """What may and what may not be concluded for this network, in words."""
        return words.verdict(self)

    def plot(self) -> Figure:
        """What moves with the factor, on logarithmic scales, beside what stays.

        Raises:
            ImportError: Without matplotlib, ``pip install 'lowland[cli]'``.
        """
        return draw(self)

    def __str__(self) -> str:
        return words.table(self)

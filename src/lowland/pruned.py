"""What was left out of moments, and how much that can be at most."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class Pruned:
    r"""Which samples were left out of ``Tr H`` and ``Tr H^2``, and certificates of what they add.

    Each certificate bounds the distance between a moment, or the gradient of one, of the samples
    that were kept and of all samples; it holds up to rounding. All have the shape ``(*ensemble)``.

    Attributes:
        tolerance: What was asked for.
        samples: How many there are.
        kept: The places of those that were kept, ascending, ``(kept,)``.
        trace: On the error of ``Tr H``.
        trace_sq: On the error of ``Tr H^2``.
        trace_gradient: On the Euclidean norm of the error of the gradient of ``Tr H``, in all
            weights together.
        trace_sq_gradient: The same of ``Tr H^2``.

    Example:
        >>> import torch
        >>> from lowland import exact
        >>> x, y = torch.tensor([[-9.0], [-2.0], [2.0], [9.0]]), torch.tensor([0.0, 0, 1, 1])
        >>> weights = [torch.tensor([[0.0], [5.0]])]  # the outer samples are fitted to 1e-20
        >>> moments = exact.moments(weights, x, y, activation="identity", loss="bce", prune=1e-3)
        >>> moments.pruned.dropped, moments.pruned.kept
        (2, tensor([1, 2]))
        >>> bool(moments.pruned.trace < 1e-3 * moments.trace)
        True
    """

    tolerance: float
    samples: int
    kept: Tensor
    trace: Tensor
    trace_sq: Tensor
    trace_gradient: Tensor
    trace_sq_gradient: Tensor

    @property
    def dropped(self) -> int:
        """How many samples were left out."""
        return self.samples - len(self.kept)

    def shifted(self, by: float) -> Pruned:
        """The certificates of the moments of ``H + by I``."""
        more = 2 * abs(by)
        return replace(
            self,
            trace_sq=self.trace_sq + more * self.trace,
            trace_sq_gradient=self.trace_sq_gradient + more * self.trace_gradient,
        )

    def scaled(self, by: Tensor) -> Pruned:
        """The certificates of the moments of ``by H``."""
        one, two = by.abs(), by.square()
        return replace(
            self,
            trace=one * self.trace,
            trace_sq=two * self.trace_sq,
            trace_gradient=one * self.trace_gradient,
            trace_sq_gradient=two * self.trace_sq_gradient,
        )

    def __repr__(self) -> str:
        """How many were left out; the certificates are attributes."""
        left = f"{self.dropped} of {self.samples} samples"
        return f"{type(self).__name__}({left}, tolerance={self.tolerance:g})"

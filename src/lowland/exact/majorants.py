r"""Matrices known by their norms alone, and how fast they change with the weights.

Of a matrix ``X`` that depends on the weights, :math:`\|X\|`, :math:`\|X\|_F` and the largest
:math:`\|\dot X\|_F` in any direction of length 1 are bounded. Sums, products and Kronecker
products of such matrices are bounded by the triangle inequality, by
:math:`\|XY\|_F \le \|X\| \|Y\|_F` and by the rule of the derivative of a product, so that a formula
of matrices is one of bounds as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Majorant:
    """Bounds on a matrix for each sample; all tensors broadcast to ``(networks, samples)``.

    Attributes:
        operator: On the largest singular value.
        frobenius: On the root of the sum of squares.
        rate: On the Frobenius norm of the derivative along any unit vector of the weights.
    """

    operator: Tensor
    frobenius: Tensor
    rate: Tensor

    @classmethod
    def vector(cls, norm: Tensor, rate: Tensor) -> Majorant:
        """Of a vector, whose two norms are one."""
        return cls(norm, norm, rate)

    def __add__(self, other: Majorant) -> Majorant:
        return Majorant(
            self.operator + other.operator,
            self.frobenius + other.frobenius,
            self.rate + other.rate,
        )

    def __matmul__(self, other: Majorant) -> Majorant:
        return Majorant(
            self.operator * other.operator,
            torch.minimum(self.frobenius * other.operator, self.operator * other.frobenius),
            self.rate * other.operator + self.operator * other.rate,
        )

    def kron(self, other: Majorant) -> Majorant:
        """The Kronecker product, of which every entry is one of both factors' entries."""
        return Majorant(
            self.operator * other.operator,
            self.frobenius * other.frobenius,
            self.rate * other.frobenius + self.frobenius * other.rate,
        )

    def inner(self, other: Majorant) -> Majorant:
        """The number ``<X, Y>``, by Cauchy and Schwarz."""
        size = self.frobenius * other.frobenius
        rate = self.rate * other.frobenius + self.frobenius * other.rate
        return Majorant.vector(size, rate)

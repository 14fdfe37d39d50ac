"""The waist of the library: moments of the Hessian's spectrum, and what they imply."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Literal

import torch
from torch import Tensor

from lowland.brackets import four_moment_bracket, four_moment_upper
from lowland.matrices import Matrix
from lowland.pruned import Pruned


@dataclass(frozen=True)
class HessianMoments:
    r"""``Tr H`` and ``Tr H^2`` of a symmetric ``P x P`` matrix, and the bounds that follow.

    With the eigenvalues :math:`\lambda_1 \ge \dots \ge \lambda_P`, their mean
    :math:`m = \mathrm{Tr} H / P` and standard deviation
    :math:`s = \sqrt{\mathrm{Tr} H^2 / P - m^2}`, Wolkowicz and Styan bracket every eigenvalue.
    All quantities keep the gradients and the leading (ensemble) dimensions of the two traces.

    Attributes:
        dim: ``P``, the number of parameters.
        trace: ``Tr H``, shape ``(*ensemble)``.
        trace_sq: ``Tr H^2``, shape ``(*ensemble)``.
        stderr: Standard errors of ``(trace, trace_sq)`` where they are estimates, over the random
            directions; what a batch differs from its data set is not in them. NaN for a single
            direction, None where the traces are exact.
        higher: ``(Tr H^3, Tr H^4)``, each of shape ``(*ensemble)``, where they were asked for.
        method: The engine that computed them, where :func:`lowland.hessian_moments` chose it.
        matrix: Which matrix ``H`` stands for, the Hessian or one beside it
            (:mod:`lowland.matrices`).
        pruned: Which samples were left out, and how much they can add at most, where ``prune=`` was
            given.

    Raises:
        ValueError: If ``dim`` is not positive or the traces differ in shape.

    Notes:
        Estimates (``unbiased=True``) make estimates of the bounds, which need not hold. Where
        ``trace_sq`` is estimated so low that no spectrum has it, below ``trace^2 / P`` or even
        negative, ``std`` is zero: all bounds and brackets are the mean, and of a bound's gradient
        only that of the mean is left.

    References:
        H. Wolkowicz and G. P. H. Styan, Bounds for eigenvalues using traces, Linear Algebra and
        its Applications 29 (1980), theorems 2.1 to 2.5.

    Example:
        >>> import torch
        >>> from lowland import HessianMoments
        >>> eigenvalues = torch.tensor([1.0, 2.0, 6.0])
        >>> moments = HessianMoments(3, eigenvalues.sum(), eigenvalues.square().sum())
        >>> moments
        HessianMoments(dim=3, trace=9, trace_sq=41)
        >>> moments.mean, moments.lower, moments.upper  # the bounds hold all three
        (tensor(3.), tensor(-0.0551), tensor(6.0551))
    """

    dim: int
    trace: Tensor
    trace_sq: Tensor
    stderr: tuple[Tensor, Tensor] | None = None
    higher: tuple[Tensor, Tensor] | None = None
    method: str | None = None
    matrix: Matrix = "hessian"
    pruned: Pruned | None = None

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise ValueError(f"dim must be at least 1, the number of parameters; got {self.dim}")
        if self.trace.shape != self.trace_sq.shape:
            raise ValueError(
                f"trace and trace_sq must have one shape; got {tuple(self.trace.shape)} "
                f"and {tuple(self.trace_sq.shape)}"
            )
        if self.higher and any(power.shape != self.trace.shape for power in self.higher):
            shapes = " and ".join(str(tuple(power.shape)) for power in self.higher)
            raise ValueError(
                f"higher must have the shape {tuple(self.trace.shape)} of trace; got {shapes}"
            )

    def __repr__(self) -> str:
        """In one line, with standard errors where they are known; of an ensemble its ends."""
        shown = [f"dim={self.dim}"]
        if self.trace.ndim:
            shown.append(f"ensemble={tuple(self.trace.shape)}")
        shown += [f"trace={_short(self.trace)}", f"trace_sq={_short(self.trace_sq)}"]
        if self.stderr is not None:
            shown.append(f"stderr=({', '.join(map(_short, self.stderr))})")
        if self.method is not None:
            shown.append(f"method={self.method!r}")
        if self.matrix != "hessian":
            shown.append(f"matrix={self.matrix!r}")
        if self.pruned is not None:
            shown.append(f"pruned={self.pruned!r}")
        return f"{type(self).__name__}({', '.join(shown)})"

    @property
    def mean(self) -> Tensor:
        """The mean eigenvalue ``m``."""
        return self.trace / self.dim

    @property
    def std(self) -> Tensor:
        """The standard deviation ``s`` of the eigenvalues.

        At zero spread the square root has no gradient; the subgradient zero is used there.
        """
        variance, flat = self._variance()
        root = torch.where(flat, 1, variance).sqrt()
        return torch.where(flat, variance.detach().clamp(min=0).sqrt(), root)

    def _variance(self) -> tuple[Tensor, Tensor]:
        """That of the eigenvalues, and where it is none."""
        second = self.trace_sq / self.dim
        variance = second - self.mean.square()
        # Below this the difference is rounding noise, and 1 / s would amplify it without limit.
        return variance, variance <= 4 * torch.finfo(variance.dtype).eps * second

    @property
    def slopes_of_upper(self) -> tuple[Tensor, Tensor]:
        """The derivatives of :attr:`upper` in ``Tr H`` and in ``Tr H^2``, as autograd has them.

        Example:
            >>> import torch
            >>> from lowland import HessianMoments
            >>> moments = HessianMoments(3, torch.tensor(9.0), torch.tensor(41.0))
            >>> [round(slope.item(), 4) for slope in moments.slopes_of_upper]
            [-0.3213, 0.1091]
        """
        variance, flat = self._variance()
        root = torch.where(flat, math.inf, variance).rsqrt()
        by_square = root * (math.sqrt(self.dim - 1) / (2 * self.dim))
        return 1 / self.dim - 2 * self.mean * by_square, by_square

    @property
    def upper(self) -> Tensor:
        """The upper bound ``m + s sqrt(P - 1)`` on the largest eigenvalue: what HSR descends."""
        return self.mean + self.std * math.sqrt(self.dim - 1)

    @property
    def four_moment_upper(self) -> Tensor:
        """The upper bound on the largest eigenvalue from all four moments, with its gradient.

        It is that of ``bracket(1, moments=4)``, and never above :attr:`upper`.

        Raises:
            ValueError: Without :attr:`higher`.

        Example:
            >>> import torch
            >>> from lowland import HessianMoments
            >>> eigenvalues = torch.tensor([1.0, 2.0, 3.0, 4.0, 10.0]).double()
            >>> traces = [(eigenvalues**power).sum() for power in (1, 2, 3, 4)]
            >>> moments = HessianMoments(5, *traces[:2], higher=tuple(traces[2:]))
            >>> [round(bound.item(), 2) for bound in (moments.four_moment_upper, moments.upper)]
            [10.0, 10.32]
        """
        upper = self.upper
        narrower = four_moment_upper(self.dim, self._means("four_moment_upper"))
        narrower = torch.where(narrower < upper, narrower, upper)  # also where it is NaN
        _, end = self.bracket(1, moments=4)  # which rounding cannot take below the lower end
        return torch.where(narrower < end, end + (narrower - narrower.detach()), narrower)

    def _means(self, asked: str) -> tuple[Tensor, ...]:
        """The means of the eigenvalues' first four powers."""
        if self.higher is None:
            raise ValueError(
                f"{asked} needs Tr H^3 and Tr H^4, which were not computed; get them by "
                "hessian_moments(..., moments=4)"
            )
        powers = (self.trace, self.trace_sq, *self.higher)
        return tuple(power / self.dim for power in powers)

    @property
    def lower(self) -> Tensor:
        """The lower bound ``m - s sqrt(P - 1)`` on the smallest eigenvalue."""
        return self.mean - self.std * math.sqrt(self.dim - 1)

    @property
    def spread(self) -> tuple[Tensor, Tensor]:
        """``(low, high)`` for the distance between the largest and the smallest eigenvalue.

        Example:
            >>> import torch
            >>> from lowland import HessianMoments
            >>> moments = HessianMoments(3, torch.tensor(9.0), torch.tensor(41.0))  # of 1, 2 and 6
            >>> moments.spread  # around 5
            (tensor(4.5826), tensor(5.2915))
        """
        dim = self.dim
        if dim == 1:
            return torch.zeros_like(self.trace), torch.zeros_like(self.trace)
        low = 2.0 if dim % 2 == 0 else 2 * dim / math.sqrt(dim * dim - 1)
        return low * self.std, math.sqrt(2 * dim) * self.std

    def shifted(self, by: float) -> HessianMoments:
        """The moments of ``H + by I``: every eigenvalue is so much larger.

        With PyTorch's ``weight_decay`` for it, they are those of the loss with
        ``weight_decay / 2`` times the parameters' squared norm. The standard error of an estimate
        of ``trace_sq`` is then an upper bound.

        Example:
            >>> import torch
            >>> from lowland import HessianMoments
            >>> HessianMoments(3, torch.tensor(9.0), torch.tensor(41.0)).shifted(1.0)
            HessianMoments(dim=3, trace=12, trace_sq=62)
        """
        powers = [torch.full_like(self.trace, self.dim), self.trace, self.trace_sq]
        powers += self.higher or ()
        moved = [
            torch.stack([math.comb(n, i) * by ** (n - i) * powers[i] for i in range(n + 1)]).sum(0)
            for n in range(len(powers))
        ]
        error = self.stderr
        if error is not None:
            error = error[0], error[1] + 2 * abs(by) * error[0]
        higher = (moved[3], moved[4]) if self.higher else None
        pruned = self.pruned and self.pruned.shifted(by)
        return replace(
            self, trace=moved[1], trace_sq=moved[2], stderr=error, higher=higher, pruned=pruned
        )

    def scaled(self, by: float | Tensor) -> HessianMoments:
        """The moments of ``by H``: every eigenvalue is so many times as large.

        Example:
            >>> import torch
            >>> from lowland import HessianMoments
            >>> HessianMoments(3, torch.tensor(9.0), torch.tensor(41.0)).scaled(2.0)
            HessianMoments(dim=3, trace=18, trace_sq=164)
        """
        if not isinstance(by, Tensor):
            if by == 1:
                return self
            by = self.trace.new_tensor(by)
        error, higher, square = self.stderr, self.higher, by.square()
        return replace(
            self,
            trace=by * self.trace,
            trace_sq=square * self.trace_sq,
            stderr=error and (by.abs() * error[0], square * error[1]),
            higher=higher and (by * square * higher[0], square.square() * higher[1]),
            pruned=self.pruned and self.pruned.scaled(by),
        )

    def bracket(self, k: int, moments: Literal[2, 4] = 2) -> tuple[Tensor, Tensor]:
        """``(low, high)`` for the ``k``-th largest eigenvalue, ``k = 1`` the largest.

        Args:
            k: Between 1 and ``dim``.
            moments: 2 for the bracket from ``trace`` and ``trace_sq``. 4 for the narrower one, from
                ``higher`` too, by the Chebyshev-Markov-Stieltjes inequalities
                (:mod:`lowland.brackets`); it is never wider, and has no gradients
                (:attr:`four_moment_upper` has).

        Returns:
            Two tensors of shape ``(*ensemble)``.

        Raises:
            TypeError: If ``k`` is no whole number.
            ValueError: If ``k`` is not between 1 and ``dim``, or ``moments`` is neither 2 nor 4, or
                is 4 without ``higher``.

        Example:
            >>> import torch
            >>> from lowland import HessianMoments
            >>> eigenvalues = torch.tensor([1.0, 2.0, 3.0, 4.0, 10.0]).double()
            >>> traces = [(eigenvalues**power).sum() for power in (1, 2, 3, 4)]
            >>> moments = HessianMoments(5, *traces[:2], higher=tuple(traces[2:]))
            >>> [round(end.item(), 2) for end in moments.bracket(2)]
            [2.42, 7.87]
            >>> [round(end.item(), 2) for end in moments.bracket(2, moments=4)]
            [3.57, 5.09]
        """
        check_number(moments)
        dim = self.dim
        if not isinstance(k, Integral):
            raise TypeError(f"k must be a whole number, 1 for the largest eigenvalue; got {k!r}")
        if not 1 <= k <= dim:
            raise ValueError(f"k must be between 1 (the largest eigenvalue) and {dim}; got {k}")
        mean, std = self.mean, self.std
        low = mean - std * math.sqrt((k - 1) / (dim - k + 1))
        high = mean + std * math.sqrt((dim - k) / k)
        # The extreme eigenvalues also lie on the far side of the mean.
        if dim > 1 and k == 1:
            low = mean + std / math.sqrt(dim - 1)
        if dim > 1 and k == dim:
            high = mean - std / math.sqrt(dim - 1)
        if moments == 2:
            return low, high
        means = self._means("bracket(k, moments=4)")
        low, high = low.detach(), high.detach()
        four_low, four_high = four_moment_bracket(k, dim, means)
        # Where four moments are NaN, fmax and fmin keep to two; rounding cannot swap the ends.
        four_low = torch.fmin(torch.fmax(low, four_low), high)
        return four_low, torch.maximum(torch.fmin(high, four_high), four_low)


def _short(values: Tensor) -> str:
    """A number; of several the smallest and the largest."""
    if not values.numel():
        return "none"
    ends = [f"{end.item():.6g}" for end in values.detach().aminmax()]
    return " to ".join(ends if values.ndim else ends[:1])


def check_number(moments: int) -> None:
    """Refuse any number of moments but 2 and 4.

    Raises:
        ValueError: If there are no brackets from that many.
    """
    if moments not in (2, 4):
        raise ValueError(f"moments must be 2 or 4, how many of the spectrum; got {moments!r}")

r"""Functions of a symmetric matrix's eigenvalues, and their slopes.

For any function :math:`F(H) = F(\lambda_1, \dots, \lambda_P)` that does not depend on the order of
the eigenvalues,

.. math:: dF = \langle C, dH \rangle, \qquad
    C = \sum_i \frac{\partial F}{\partial \lambda_i} u_i u_i^T,

so that its gradient in parameters is :math:`\nabla \langle C, H \rangle` with the constant ``C``.
Where ``F`` has a kink, the slopes here are those of a subgradient:

=================  =====================================================  ==========================
f                  F                                                      at a kink
=================  =====================================================  ==========================
``lambda_max``     the largest eigenvalue                                 the mean over those equal
``lambda_min``     the smallest                                           the mean over those equal
``spectral_norm``  the largest magnitude                                  the mean over those equal
``nuclear``        the sum of magnitudes                                  0 for eigenvalues of zero
``schatten``       ``(sum |l|^p)^(1/p)``, ``p >= 1``                      0 for eigenvalues of zero
``soft_max``       ``log(sum exp(beta l)) / beta``, ``beta > 0``          none
``log_det``        ``1/2 sum log(max(l, 0) + alpha)``, ``alpha > 0``      0 for eigenvalues of zero
``effective_dim``  ``sum max(l, 0) / (max(l, 0) + alpha)``                0 for eigenvalues of zero
=================  =====================================================  ==========================

*Equal* are eigenvalues that differ by no more than a tolerance times the largest magnitude, and
*zero* those of no more than ``P`` roundings of it.

References:
    A. S. Lewis, Derivatives of spectral functions, Mathematics of Operations Research 21 (1996),
    theorem 1.1; D. J. C. MacKay, Bayesian interpolation, Neural Computation 4 (1992), for the
    evidence and the effective number of parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import grad

from lowland.validation import is_number

Name = Literal[
    "lambda_max",
    "lambda_min",
    "spectral_norm",
    "log_det",
    "effective_dim",
    "nuclear",
    "schatten",
    "soft_max",
]
Elementwise = Callable[[Tensor], Tensor]
Function = Name | tuple[Elementwise, Elementwise]
"""The name of a spectral function, or a pair ``(f, f')`` that stands for the sum of ``f(l_i)``."""

End = Literal["largest", "smallest"]

Eigenvalues = Float[Tensor, "*ensemble dim"]

_NEEDS = {"log_det": "alpha", "effective_dim": "alpha", "schatten": "p", "soft_max": "beta"}
_ENDS: dict[str, tuple[End, ...]] = {
    "lambda_max": ("largest",),
    "lambda_min": ("smallest",),
    "spectral_norm": ("largest", "smallest"),
}


@dataclass(frozen=True)
class SpectralFunction:
    """A function of eigenvalues, ready to be evaluated.

    Attributes:
        name: Its name, ``"a function"`` for one of the user's own.
        evaluate: Of ascending eigenvalues of shape ``(*ensemble, P)`` its value ``(*ensemble)`` and
            its slopes, of the eigenvalues' shape.
        ends: The ends of the spectrum on which it depends alone; none if it needs all eigenvalues.
        tolerance: Up to which difference eigenvalues are equal, as a fraction of the largest
            magnitude. None for the square root of a rounding: eigenvectors across a smaller gap
            are known to less than half of the digits.
    """

    name: str
    evaluate: Callable[[Eigenvalues, float], tuple[Tensor, Eigenvalues]]
    ends: tuple[End, ...] = ()
    tolerance: float | None = None

    def tolerance_for(self, dtype: torch.dtype) -> float:
        """The tolerance for eigenvalues of a type."""
        return math.sqrt(torch.finfo(dtype).eps) if self.tolerance is None else self.tolerance

    def of(
        self, matrix: Float[Tensor, "*ensemble dim dim"]
    ) -> tuple[Float[Tensor, "*ensemble"], Float[Tensor, "*ensemble dim dim"]]:
        """``F`` and ``C`` of symmetric matrices, without gradients; NaN where there are NaN.

        Raises:
            ValueError: As :meth:`at`.
        """
        matrix = matrix.detach()
        finite = matrix.isfinite().flatten(-2).all(-1)[..., None, None]
        values, vectors = torch.linalg.eigh(torch.where(finite, matrix, 0))
        values = torch.where(finite.squeeze(-1), values, torch.nan)
        value, slopes = self.at(values)
        return value, (vectors * slopes.unsqueeze(-2)) @ vectors.mT

    def at(self, values: Eigenvalues) -> tuple[Tensor, Eigenvalues]:
        """The value and the slopes at ascending eigenvalues.

        Raises:
            ValueError: If a function of the user's own has another shape than its argument, or its
                derivative is not that.
        """
        value, slopes = self.evaluate(values, self.tolerance_for(values.dtype))
        return value, torch.where(values.isnan(), torch.nan, slopes)


def spectral_function(
    f: Function,
    *,
    alpha: float | None = None,
    p: float | None = None,
    beta: float | None = None,
    tolerance: float | None = None,
) -> SpectralFunction:
    """Make a spectral function of its name and its parameter.

    Args:
        f: A name of the table above, or a pair ``(f, f')`` of functions of a tensor of eigenvalues,
            element by element: the sum of ``f`` over all eigenvalues. Where ``f`` can be
            differentiated by autograd, ``f'`` is compared with that in each call.
        alpha: The shift of ``"log_det"`` and ``"effective_dim"``, above 0: as a prior of precision
            ``alpha``.
        p: The exponent of ``"schatten"``, at least 1.
        beta: Of ``"soft_max"``, above 0. It exceeds the largest eigenvalue by at most
            ``log(P) / beta``.
        tolerance: Up to which difference eigenvalues count as equal, as a fraction of the largest
            magnitude; at least 0 and below 1. By default the square root of a rounding.

    Raises:
        TypeError: If ``f`` is neither a name nor a pair of functions, or a parameter no number.
        ValueError: If there is no function of that name, or a parameter is missing, out of range,
            or none of that function's.

    Example:
        >>> import torch
        >>> from lowland.spectral_functions import spectral_function
        >>> value, slopes = spectral_function("schatten", p=2).at(torch.tensor([-3.0, 4.0]))
        >>> value, slopes
        (tensor(5.), tensor([-0.6000,  0.8000]))
    """
    if not isinstance(f, str):
        _check_pair(f)
    elif f not in get_args(Name):
        known = ", ".join(map(repr, get_args(Name)))
        raise ValueError(
            f"unknown spectral function {f!r}: expected one of {known}, or a pair (f, f') of "
            "functions of a tensor of eigenvalues"
        )
    name = f if isinstance(f, str) else "a function"
    needed = _NEEDS.get(name)
    given = {"alpha": alpha, "p": p, "beta": beta}
    for key, number in given.items():
        if key != needed and number is not None:
            raise ValueError(f"{key}= is no parameter of {name!r}: leave it out; got {number!r}")
    if needed:
        _check_parameter(name, needed, given[needed])
    if tolerance is not None:
        _check_number("tolerance", tolerance)
        if not 0 <= tolerance < 1:
            raise ValueError(
                "tolerance must be at least 0 and below 1, a fraction of the largest magnitude of "
                f"an eigenvalue; got {tolerance}"
            )
    if not isinstance(f, str):
        return SpectralFunction(name, partial(_sum_of, *f), tolerance=tolerance)
    parameter = given[needed] if needed else None
    # Without closures, so that a penalty can be pickled.
    evaluate = _NAMED[name] if parameter is None else partial(_NAMED[name], float(parameter))
    return SpectralFunction(name, evaluate, _ENDS.get(name, ()), tolerance)


def _check_pair(f: object) -> None:
    if not (isinstance(f, tuple | list) and len(f) == 2 and all(map(callable, f))):
        raise TypeError(
            "f must be the name of a spectral function, such as 'lambda_max', or a pair (f, f') of "
            f"functions of a tensor of eigenvalues, such as (torch.exp, torch.exp); got {f!r}"
        )


def _check_number(name: str, value: object) -> None:
    if not is_number(value) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number; got {value!r}")


def _check_parameter(function: str, name: str, value: float | None) -> None:
    least = "at least 1" if name == "p" else "above 0"
    if value is None:
        raise ValueError(f"{function!r} needs {name}=, a finite number {least}")
    _check_number(name, value)
    if not (math.isfinite(value) and (value >= 1 if name == "p" else value > 0)):
        hint = "; of p = inf it is f='spectral_norm'" if value == math.inf and name == "p" else ""
        raise ValueError(
            f"{name} of {function!r} must be a finite number {least}; got {value}{hint}"
        )


def _scale(values: Tensor) -> Tensor:
    return values.abs().amax(-1, keepdim=True)


def _signs(values: Tensor) -> Tensor:
    """Signs, zero for what rounding alone tells from zero."""
    rounding = values.shape[-1] * torch.finfo(values.dtype).eps * _scale(values)
    return torch.where(values.abs() <= rounding, 0, values.sign())


def _mean_over(equal: Tensor, values: Tensor) -> Tensor:
    return equal.to(values.dtype) / equal.sum(-1, keepdim=True)


def _end(place: int, values: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    end = values[..., place]
    equal = (values - end.unsqueeze(-1)).abs() <= tolerance * _scale(values)
    return end, _mean_over(equal, values)


def _spectral_norm(values: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    scale = _scale(values)
    equal = values.abs() >= (1 - tolerance) * scale
    return scale.squeeze(-1), _mean_over(equal, values) * values.sign()


def _nuclear(values: Tensor, _: float) -> tuple[Tensor, Tensor]:
    return values.abs().sum(-1), _signs(values)


def _schatten(p: float, values: Tensor, _: float) -> tuple[Tensor, Tensor]:
    # Relative to the largest, since powers of the numbers themselves may overflow.
    scale = _scale(values)
    relative = values.abs() / torch.where(scale > 0, scale, 1)
    norm = relative.pow(p).sum(-1, keepdim=True).pow(1 / p)
    slopes = (relative / torch.where(norm > 0, norm, 1)).pow(p - 1) * _signs(values)
    return (scale * norm).squeeze(-1), slopes


def _soft_max(beta: float, values: Tensor, _: float) -> tuple[Tensor, Tensor]:
    # From the largest on: beta times it might overflow, and a small beta is divided by.
    largest = values[..., -1:]
    below = beta * (values - largest)
    value = largest.squeeze(-1) + torch.logsumexp(below, -1) / beta
    return value, torch.softmax(below, -1)


def _log_det(alpha: float, values: Tensor, _: float) -> tuple[Tensor, Tensor]:
    positive = values.clamp(min=0) + alpha
    slopes = torch.where(_signs(values) > 0, 0.5 / positive, 0)
    return 0.5 * positive.log().sum(-1), slopes


def _effective_dim(alpha: float, values: Tensor, _: float) -> tuple[Tensor, Tensor]:
    positive = values.clamp(min=0)
    shifted = positive + alpha
    slopes = torch.where(_signs(values) > 0, alpha / shifted / shifted, 0)
    return (positive / shifted).sum(-1), slopes


_NAMED: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "lambda_max": partial(_end, -1),
    "lambda_min": partial(_end, 0),
    "spectral_norm": _spectral_norm,
    "nuclear": _nuclear,
    "schatten": _schatten,
    "soft_max": _soft_max,
    "log_det": _log_det,
    "effective_dim": _effective_dim,
}


def _sum_of(
    f: Elementwise, derivative: Elementwise, values: Tensor, _: float
) -> tuple[Tensor, Tensor]:
    """The sum of a function of the user's own, whose derivative is looked at."""
    _compare(f, derivative, values)
    each, slopes = _called("f", f, values), _called("f'", derivative, values)
    return each.sum(-1), slopes.detach()


def _called(name: str, function: Elementwise, values: Tensor) -> Tensor:
    result = function(values)
    if not (isinstance(result, Tensor) and result.shape == values.shape):
        came = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else repr(result)
        raise ValueError(
            f"{name} must give a number for each eigenvalue, a tensor of shape "
            f"{tuple(values.shape)}; got {came}"
        )
    return result


def _compare(f: Elementwise, derivative: Elementwise, values: Tensor) -> None:
    """Require ``f'`` to be what autograd finds of ``f``, if it finds anything.

    Beside the eigenvalues, since at themselves, such as at zero, there may be kinks.
    """
    scale = _scale(values)
    places = torch.arange(1, values.shape[-1] + 1, device=values.device, dtype=values.dtype)
    with torch.enable_grad():
        beside = (values + 0.01 * (scale * places.sin() + values)).detach().requires_grad_()
        value = _called("f", f, beside)
        if not value.requires_grad:
            return
        (expected,) = grad(value.sum(), beside, allow_unused=True)
    if expected is None:
        return
    found = _called("f'", derivative, beside.detach()).detach()
    known = found.isfinite() & expected.isfinite()
    size = torch.where(known, torch.maximum(found.abs(), expected.abs()), 0)
    apart = torch.where(known, (found - expected).abs(), 0)
    room = 100 * math.sqrt(torch.finfo(values.dtype).eps)
    wrong = apart > max(1e-3, room) * size + room * size.amax()
    if bool(wrong.any()):
        at = wrong.flatten().nonzero()[0]
        point, one, other = (float(t.flatten()[at]) for t in (beside.detach(), found, expected))
        raise ValueError(
            f"f' is not the derivative of f: at {point:.4g} it gives {one:.4g}, where autograd "
            f"finds {other:.4g}; pass (f, f')"
        )

r"""Any function of the eigenvalues of ``H``, with its analytic gradient.

Of all eigenvalues: ``H`` is formed and decomposed, and :math:`C = U f'(\Lambda) U^T` is contracted
with its gradient as in the order of parameters. Of the ends of the spectrum alone, nothing of size
``P^2`` is needed: products with ``H`` lead to an eigenvector ``u`` by a Lanczos iteration, and what
is left is the gradient of :math:`u^T H u` (:mod:`lowland.exact.along`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from lowland._limits import DEFAULT_MEMORY_BUDGET, DENSE_IS_QUICKER, MEBIBYTE
from lowland.exact.blocks import places
from lowland.exact.of_matrix import ByMatrix, run
from lowland.exact.problem import Problem
from lowland.exact.setup import Activations, Reduction, Setup, prepare
from lowland.exact.terms import ExactMatrix
from lowland.exact.torch_backend import PerNetwork, TorchBackend
from lowland.losses import Loss
from lowland.spectra.lanczos import Top, largest
from lowland.spectral_functions import Function, SpectralFunction, spectral_function
from lowland.validation import check_budget

Choice = Literal["auto", "dense", "lanczos"]

_SEED = 0  # of the start vector: the same call finds the same numbers
_PRODUCTS = 3000  # of a Lanczos iteration, before it gives up

# Vectors as long as all parameters: a basis, its images, both once more where they are combined,
# those of a product; and bytes of the small matrix that the basis turns H into.
_VECTORS, _SMALL = 90, 1 << 14

# H; for its decomposition a copy, the eigenvectors, and workspace of two more; C, what it is the
# product of, and its tiles.
COPIES = 8


def spectral(
    weights: Sequence[Tensor],
    x: Tensor,
    y: Tensor,
    *,
    activation: Activations,
    loss: str | Loss,
    f: Function,
    alpha: float | None = None,
    p: float | None = None,
    beta: float | None = None,
    tolerance: float | None = None,
    method: Choice = "auto",
    reduction: Reduction = "mean",
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    matrix: ExactMatrix = "hessian",
) -> Tensor:
    r"""A function of the eigenvalues of the Hessian of multilayer perceptrons, exact.

    .. math:: F = \sum_i f(\lambda_i), \qquad \nabla F = \nabla \langle C, H \rangle, \qquad
        C = \sum_i f'(\lambda_i) \, u_i u_i^T

    and alike where ``F`` is no sum. The result can be differentiated (once) in the weights, and in
    ``x``; the gradient is analytic: autograd never sees a decomposition, so that equal eigenvalues
    do not make it NaN.

    Args:
        weights: As for :func:`lowland.exact.moments`, like all that is not named here.
        x: Inputs.
        y: Targets.
        activation: Of the hidden layers.
        loss: Of the logits.
        f: ``"lambda_max"``, ``"lambda_min"``, ``"spectral_norm"``, ``"log_det"``,
            ``"effective_dim"``, ``"nuclear"``, ``"schatten"`` or ``"soft_max"``, which
            :mod:`lowland.spectral_functions` defines with their subgradients; or a pair of
            functions ``(f, f')`` of a tensor of eigenvalues, element by element.
        alpha: The shift of ``"log_det"``, :math:`\frac12 \sum_i \log(\max(\lambda_i, 0) + \alpha)`,
            and ``"effective_dim"``; above 0. Negative eigenvalues count as zeros: of a Laplace
            approximation, to which a saddle's negative curvature tells nothing.
        p: The exponent of ``"schatten"``, at least 1.
        beta: Of ``"soft_max"``, above 0.
        tolerance: Up to which difference, as a fraction of the largest magnitude, eigenvalues count
            as equal: where ``lambda_max`` is not simple, its gradient is the mean over the
            eigenspace, a subgradient. By default the square root of a rounding, 1.5e-8 in float64.
        method: For ``"lambda_max"``, ``"lambda_min"`` and ``"spectral_norm"``: ``"dense"`` forms
            ``H``; ``"lanczos"`` takes products with it in memory linear in the parameters, with
            residuals below a hundredth of ``tolerance``, and gives the gradient along one unit
            vector of the eigenspace, a subgradient too. ``"auto"`` takes the latter above 512
            parameters. All other functions need ``"dense"``.
        reduction: Of the loss over samples.
        memory_budget: Bytes of temporaries, of which ``"dense"`` takes ``11 P^2`` numbers and
            ``"lanczos"`` ``90 P``.
        matrix: ``"hessian"``, ``"ggn"`` or ``"residual"``.

    Returns:
        ``F`` of each network, of shape ``(*ensemble)``; NaN where ``H`` has overflowed.

    Raises:
        TypeError: As :func:`lowland.exact.moments`; or if ``f`` is neither a name nor a pair of
            functions, or its parameter no number.
        UnsupportedModelError: If ``y`` requires gradients.
        ValueError: As :func:`lowland.exact.moments`; or if there is no function of that name, its
            parameter is missing, out of range or another function's, the method is unknown or has
            not that function, or ``f'`` is not the derivative of ``f``.
        RuntimeError: If the Lanczos iteration does not converge.

    Notes:
        ``"dense"`` takes ``O(n P^2 + P^3)`` time, the gradient included. ``"lanczos"`` takes
        ``O(n P)`` for each product, of which it needs some 10 to 200, and for the gradient: one
        pass through the samples, measured at 0.05 to 0.4 of an exact gradient of HSR where all of
        it took 0.7 to 20 of them (``benchmarks/spectral.py``).

    References:
        A. S. Lewis, Derivatives of spectral functions, Mathematics of Operations Research 21
        (1996); the contraction with ``C`` is that of arXiv:2606.28662, theorems 2 to 5, with
        another ``C``.

    Example:
        >>> import torch
        >>> from lowland import exact
        >>> weights = [torch.randn(3, 4, requires_grad=True), torch.randn(5, 1)]
        >>> x, y = torch.randn(50, 2), torch.randint(2, (50,)).float()
        >>> network = {"activation": "tanh", "loss": "bce"}
        >>> top = exact.spectral(weights, x, y, **network, f="lambda_max")
        >>> top.backward()
        >>> weights[0].grad.shape
        torch.Size([3, 4])
        >>> bool(top <= exact.moments(weights, x, y, **network).upper)
        True
        >>> square = (torch.square, lambda eigenvalue: 2 * eigenvalue)
        >>> torch.allclose(
        ...     exact.spectral(weights, x, y, **network, f=square),
        ...     exact.moments(weights, x, y, **network).trace_sq,
        ...     rtol=1e-3,
        ... )
        True
    """
    function = spectral_function(f, alpha=alpha, p=p, beta=beta, tolerance=tolerance)
    check_way(method, function)
    setup = prepare(weights, x, y, activation, loss, reduction, inputs_vary=True).of(matrix)
    return evaluate(setup, function, method, memory_budget)


def check_way(method: str, function: SpectralFunction) -> None:
    """Require a way that leads to a function.

    Raises:
        ValueError: If there is no such way, or it is not that function's.
    """
    if method not in get_args(Choice):
        raise ValueError(f"unknown method {method!r}: expected 'auto', 'dense' or 'lanczos'")
    if method == "lanczos" and not function.ends:
        raise ValueError(
            f"method='lanczos' finds the ends of the spectrum, and {function.name!r} is a function "
            "of all eigenvalues: use method='dense'"
        )


def evaluate(
    setup: Setup, function: SpectralFunction, method: Choice, memory_budget: int
) -> Tensor:
    """The function of each network's eigenvalues, with its gradient; checked arguments."""
    if method == "auto":
        by_products = bool(function.ends) and setup.size.dim > DENSE_IS_QUICKER
        method = "lanczos" if by_products else "dense"
    if method == "lanczos":
        problem = _product_problem(setup, memory_budget)
        (value,) = run(problem, setup.weights, _ByProducts(function))
        return value.view(setup.ensemble)
    instead = " or use method='lanczos'" if function.ends else ""
    what = f"{function.name!r} decomposes the Hessian of {setup.size.dim} parameters"
    problem = setup.matrix_problem(memory_budget, COPIES, what, instead)

    def decomposed(matrices: Tensor) -> list[tuple[Tensor, Callable[[], Tensor]]]:
        value, coefficients = function.of(matrices)
        return [(value, lambda: coefficients)]

    keep = setup.asks_for_gradients and problem.plan.keep
    (value,) = run(problem, setup.weights, ByMatrix(decomposed, keep))
    return value.view(setup.ensemble)


def _product_problem(setup: Setup, memory_budget: int) -> Problem:
    """The problem of one network's products with ``H`` after another: nothing of size ``P^2``.

    Raises:
        ValueError: If the budget is too small for the vectors, or for one sample beside them.
    """
    memory_budget = check_budget(memory_budget)
    vectors = _VECTORS * setup.size.dim * setup.size.itemsize + _SMALL
    if vectors > memory_budget:
        raise ValueError(
            f"a memory budget of {memory_budget / MEBIBYTE:.3g} MiB is too small: a Lanczos "
            f"iteration over {setup.size.dim} parameters holds {vectors / MEBIBYTE:.3g} MiB of "
            "vectors; raise memory_budget"
        )
    # A sample takes no more of a product than of the trace and its gradient.
    problem = setup.of_plain_code().trace_problem(memory_budget - vectors)
    return replace(problem, plan=replace(problem.plan, networks=1))


class _Operator:
    """``v -> H v``, or ``-H v``, of one network, for flat vectors of its trained weights."""

    def __init__(self, backend: TorchBackend, sign: float) -> None:
        self.backend, self.sign = backend, sign
        dim, like = backend.size.dim, backend.weights[0]
        self.shape, self.dtype, self.device = (dim, dim), like.dtype, like.device

    def __matmul__(self, vector: Tensor) -> Tensor:
        product = self.backend.product(_layers(self.backend, vector))
        rows = zip(product, self.backend.arch.rows, strict=True)
        return self.sign * torch.cat([part[0, kept].flatten() for part, kept in rows])


def _layers(backend: TorchBackend, vector: Tensor) -> list[Tensor]:
    """A flat vector of trained weights, shaped like the weights, with zeros for the others."""
    result = [torch.zeros_like(weight) for weight in backend.weights]
    for layer, (part, rows) in enumerate(zip(result, backend.arch.rows, strict=True)):
        part[0, rows] = vector[places(backend.size, layer)].view_as(part[0, rows])
    return result


@dataclass(frozen=True)
class _ByProducts:
    """One network's function of the ends of its spectrum; what is kept is the eigenvector.

    Attributes:
        function: Of the ends of the spectrum.
    """

    function: SpectralFunction

    def look(self, backend: TorchBackend) -> tuple[list[PerNetwork], list[Tensor]]:
        """The eigenvalue that counts; its eigenvector, and the function's slope in it."""
        ends = []
        for end in self.function.ends:
            sign = 1.0 if end == "largest" else -1.0
            tolerance = self.function.tolerance_for(backend.weights[0].dtype)
            top = _end(_Operator(backend, sign), tolerance)
            ends.append((sign * float(top.values[0]), top.vectors[:, 0]))
        eigenvalue, vector = max(ends, key=lambda each: abs(each[0]))
        value = vector.new_tensor([eigenvalue])
        if len(ends) == 1:
            return [value], [vector[None], torch.ones_like(value)]
        return [value.abs()], [vector[None], value.sign()]

    def gradient(
        self, backend: TorchBackend, slopes: Sequence[PerNetwork], kept: Sequence[Tensor]
    ) -> list[Tensor]:
        """That of ``u^T H u``."""
        vector, slope = kept
        along = backend.gradient_along(_layers(backend, vector[0]))
        return [slopes[0] * slope * part for part in along]


def _end(operator: _Operator, tolerance: float) -> Top:
    generator = torch.Generator().manual_seed(_SEED)
    start = torch.randn(operator.shape[0], generator=generator, dtype=torch.float64)
    start = start.to(operator.device, operator.dtype)
    try:
        return largest(
            operator,
            1,
            start,
            tolerance=tolerance / 100,
            limit=_PRODUCTS,
            generator=generator,
        )
    except RuntimeError as error:
        raise RuntimeError(
            f"the Lanczos iteration has not converged within {_PRODUCTS} products with the "
            "Hessian: use a larger tolerance, or method='dense' and the memory_budget that it "
            f"asks for ({error})"
        ) from error

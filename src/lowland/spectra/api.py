"""One call for the spectrum of a trained model, another for those of its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, Literal, get_args

import torch
from torch import nn

from lowland._limits import DENSE_LIMIT, DENSE_MEMORY
from lowland._weights import Count
from lowland.matrices import Matrix
from lowland.spectra.lanczos import lanczos_pairs
from lowland.spectra.result import Spectrum
from lowland.spectra.solve import (
    Which,
    check_products,
    dense_pairs,
    density_of,
    ends_of,
    smooth,
    trace_of,
)
from lowland.spectra.surface import (
    Surface,
    own_randomness,
    survey,
)
from lowland.validation import check_l2

Method = Literal["auto", "dense", "lanczos"]

_LEAST = 9  # parameters, for the few vectors that each iteration keeps


@dataclass(frozen=True)
class _Settings:
    k: int | None
    which: Which
    density: bool = False
    method: Method = "auto"
    tolerance: float = 1e-5
    trace_probes: int = 30
    density_probes: int = 10
    density_steps: int = 64
    restarts: int = 300
    seed: int = 0
    adaptive: bool = False
    count: Count | None = None
    matrix: Matrix = "hessian"
    l2: float = 0.0
    wrt: str | None = None

    def __post_init__(self) -> None:
        check_l2(self.l2)
        for name, value, known in (
            ("which", self.which, get_args(Which)),
            ("method", self.method, get_args(Method)),
        ):
            if value not in known:
                raise ValueError(
                    f"unknown {name} {value!r}: expected one of {', '.join(map(repr, known))}"
                )
        if not isinstance(self.k, Integral | None):
            raise TypeError(
                f"k must be a whole number, or None for all eigenvalues; got {self.k!r}"
            )
        if self.k is not None and self.k < 1:
            raise ValueError(f"k must be at least 1, or None for all eigenvalues; got {self.k}")
        if not 0 < self.tolerance < 1:
            raise ValueError(
                "tolerance must be between 0 and 1, a fraction of the largest eigenvalue's "
                f"magnitude; got {self.tolerance}"
            )
        for name, count, least in (
            ("trace_probes", self.trace_probes, 2),
            ("density_probes", self.density_probes, 2),
            ("density_steps", self.density_steps, 2),
            ("restarts", self.restarts, 1),
        ):
            if count < least:
                raise ValueError(f"{name} must be at least {least}; got {count}")


def spectrum(
    model: nn.Module,
    criterion: Callable[..., Any],
    data: Any,
    k: int | None = 10,
    which: Which = "LA",
    *,
    density: bool = False,
    method: Method = "auto",
    tolerance: float = 1e-5,
    trace_probes: int = 30,
    density_probes: int = 10,
    density_steps: int = 64,
    restarts: int = 300,
    seed: int = 0,
    adaptive: bool = False,
    count: Count | None = None,
    matrix: Matrix = "hessian",
    l2: float = 0.0,
    wrt: str | None = None,
) -> Spectrum:
    r"""The spectrum of the Hessian of a trained model's loss, in its trainable parameters.

    .. math:: H = \nabla^2_\theta \frac1n \sum_{i=1}^n \ell(f_\theta(x_i), y_i), \qquad
        H v_i = \lambda_i v_i, \quad \lambda_1 \ge \dots \ge \lambda_P

    Args:
        model: Any module, in evaluation mode where it has layers that draw random numbers or keep
            statistics.
        criterion: Maps the model's output and targets to a scalar. With the reduction ``"sum"`` the
            loss is the sum over the data set; otherwise it is the mean, in which
            ``nn.CrossEntropyLoss`` and ``nn.NLLLoss`` count samples by their class weights.
        data: One batch: a pair ``(x, y)``, or a mapping or an object that holds both, with which
            the criterion is called as it is; or a ``DataLoader``, a ``Dataset``, a list, or any
            other iterable of such batches that gives the same ones in each pass. A mapping goes to
            the model by names where its ``forward`` has them, otherwise as it is.
        k: How many eigenvalues at each end that is asked for; None for all of them, from the dense
            matrix alone.
        which: ``"LA"`` for the largest, ``"SA"`` for the smallest (most negative), ``"both"``.
        density: Look at the whole spectrum, too.
        method: ``"dense"`` forms the matrix, from ``P`` products with a Hessian; all results are
            exact to rounding. ``"lanczos"`` takes products alone. ``"auto"`` is dense up to about
            two thousand parameters.
        tolerance: Of Lanczos: largest norm of a residual ``H v - lambda v``, as a fraction of the
            spectrum's largest magnitude. In float32 about 1e-6 can be reached.
        trace_probes: Of Lanczos: independent estimates of what the iteration leaves of the
            trace, a product each, from which its standard error comes.
        density_probes: Of Lanczos: independent estimates of the density.
        density_steps: Products that each of them takes: the nodes of its quadrature.
        restarts: Of Lanczos, before it gives up.
        seed: Of the start vectors and the probes. No global generator is touched.
        adaptive: The spectrum of :math:`D H D` with :math:`D = \mathrm{diag}(|\theta|)` instead:
            curvature in steps relative to each parameter (see the notes).
        count: What the criterion's mean over a batch divides by, as for
            :func:`lowland.hessian_moments`.
        matrix: ``"hessian"``; or ``"ggn"``, ``"fisher"`` or ``"residual"`` in its place, the
            Gauss-Newton matrix, the Fisher matrix of the model's own predictive distribution, and
            what the Hessian has beyond the Gauss-Newton matrix (:mod:`lowland.matrices`).
        l2: Weight decay that is part of the loss, as ``weight_decay`` of PyTorch's optimizers:
            ``l2 / 2`` times the squared norm of the trainable parameters.
        wrt: In place of parameters, ``"inputs"``, or the name of a layer for what it gives, as for
            :func:`lowland.hessian_moments`: of one batch, of all its samples together.

    Returns:
        The eigenvalues with residuals and eigenvectors, the trace, and the density if asked for.

    Raises:
        TypeError: If the data has another form, the criterion returns no tensor, or ``k`` is no
            whole number.
        UnsupportedModelError: If it is the Fisher matrix of a criterion that has none; or the model
            is a ``DistributedDataParallel`` module.
        ValueError: If an argument is out of range, ``k`` exceeds the number of parameters, there is
            no trainable parameter, a layer is in training mode and behaves otherwise there, the
            data is empty, not finite, or other in each pass, the loss is not a finite scalar or has
            no graph, or a product with the Hessian is not finite.
        RuntimeError: If PyTorch cannot differentiate the model or the criterion twice or does so
            wrongly, or Lanczos does not converge.

    Notes:
        A product with the Hessian costs several gradients over all of the data, some ten for a
        convolutional network on a CPU. The largest eigenvalue of a ResNet-18 of half the usual
        width with random weights takes 28 products, one that stands out of the others fewer; the
        smallest, which crowd at zero, several times as many; both ends come from one iteration; the
        trace takes 30, a density 640. A larger tolerance takes fewer. Where several eigenvalues are
        asked for, the iteration goes on from a second random vector until nothing changes, to find
        the copies of an eigenvalue that occurs several times; one can be missed still. At most ``2
        k + 25`` vectors of the length of all parameters are kept, of the smallest ``2 k + 61``, of
        both ends ``4 k + 61``.

        ReLU and the like have second derivatives almost everywhere, and those are what is used.

        With ``adaptive=True`` the largest eigenvalue is the adaptive sharpness of Kwon et al. to
        second order, element-wise, with the 2-norm and without a constant added to the weights: at
        a critical point

        .. math:: \max_{\lVert D^{-1} \epsilon \rVert_2 \le \rho} L(\theta + \epsilon) - L(\theta)
            = \tfrac12 \rho^2 \lambda_1(D H D) + O(\rho^3),

        and the trace, :math:`\sum_i \theta_i^2 H_{ii}`, gives the mean over
        :math:`\epsilon \sim N(0, \rho^2 D^2)` in the same way, that of Andriushchenko et al. Both
        have the unit of the loss, and stay where rescaling keeps the predictions
        (:func:`lowland.rescale`): that maps :math:`\theta` to :math:`A \theta` with a positive
        diagonal A, hence H to :math:`A^{-1} H A^{-1}` and D to :math:`A D`.

    References:
        K. Wu and H. Simon, Thick-restart Lanczos method for large symmetric eigenvalue problems,
        SIAM Journal on Matrix Analysis and Applications 22 (2000); M. Hutchinson, Communications in
        Statistics: Simulation and Computation
        18 (1989), for the trace; V. Papyan, Journal of Machine Learning Research 21 (2020), for
        the density. J. Kwon et al., ASAM,
        ICML 2021 (arXiv:2102.11600), and M. Andriushchenko et al., A modern look at the
        relationship between sharpness and generalization, ICML 2023 (arXiv:2302.07011), for
        adaptive sharpness.

    Example:
        >>> import torch, lowland
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        >>> x, y = torch.randn(50, 3), torch.ones(50, dtype=torch.long)
        >>> spectrum = lowland.spectrum(model, nn.CrossEntropyLoss(), (x, y), k=2)
        >>> spectrum.eigenvalues.shape, spectrum.eigenvectors[0]["0.weight"].shape, spectrum.method
        (torch.Size([2]), torch.Size([4, 3]), 'dense')
        >>> curve = spectrum.along(0, [-1.0, 0.0, 1.0])  # of the loss along the first eigenvector
    """
    settings = _Settings(
        k,
        which,
        density,
        method,
        tolerance,
        trace_probes,
        density_probes,
        density_steps,
        restarts,
        seed,
        adaptive,
        count,
        matrix,
        l2,
        wrt,
    )
    with _prepared(model, criterion, data, settings) as surface:
        return _measure(surface, settings)


def layer_spectra(
    model: nn.Module,
    criterion: Callable[..., Any],
    data: Any,
    k: int | None = 1,
    which: Which = "LA",
    **settings: Any,
) -> dict[str, Spectrum]:
    """The spectrum of each layer's diagonal block of the Hessian: all other layers held fixed.

    A layer is a module with trainable parameters of its own. Parameters that several modules share
    belong to the first. The traces add up to that of the whole Hessian, and no block's largest
    eigenvalue exceeds the whole one's.

    Args:
        model: As for :func:`lowland.spectrum`.
        criterion: The loss.
        data: The data set.
        k: How many eigenvalues of each block, None for all; of smaller blocks all.
        which: ``"LA"``, ``"SA"`` or ``"both"``.
        **settings: All others of :func:`lowland.spectrum`, for each block. The method ``"auto"``
            goes by the block's own size.

    Returns:
        A spectrum for each layer, by its name in the model, in the model's order.

    Raises:
        TypeError, ValueError, RuntimeError: As :func:`lowland.spectrum`.

    Example:
        >>> import torch, lowland
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        >>> x, y = torch.randn(50, 3), torch.ones(50, dtype=torch.long)
        >>> layers = lowland.layer_spectra(model, nn.CrossEntropyLoss(), (x, y))
        >>> {name: layer.dim for name, layer in layers.items()}
        {'0': 16, '2': 10}
    """
    chosen = _Settings(k, which, **settings)
    with _prepared(model, criterion, data, chosen) as surface:
        result = {}
        for name, names in _layers(surface.names).items():
            block = surface.within(names)
            result[name] = _measure(block, replace(chosen, k=k and min(k, block.dim)))
        return result


@contextmanager
def _prepared(
    model: nn.Module, criterion: Callable[..., Any], data: Any, settings: _Settings
) -> Iterator[Surface]:
    surface = survey(
        model, criterion, data, settings.count, matrix=settings.matrix, wrt=settings.wrt
    )
    surface = replace(
        surface,
        adaptive=settings.adaptive,
        l2=float(settings.l2),
        penalized=tuple(surface.names),
    )
    with own_randomness(surface.device, settings.seed):
        yield surface


def _layers(names: Sequence[str]) -> dict[str, list[str]]:
    """The names of each module's own parameters."""
    layers: dict[str, list[str]] = {}
    for name in names:
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    return layers


def _measure(surface: Surface, settings: _Settings) -> Spectrum:
    dim = surface.dim
    method = _method(dim, settings)
    operator = surface.operator()
    # Differences are symmetric to their own precision alone.
    check = surface.products == "autograd"
    k = dim if settings.k is None else settings.k
    curve = None
    if method == "dense":
        if check:
            check_products(operator, settings.seed)
        everything = dense_pairs(operator)
        pairs = ends_of(everything, k, settings.which)
        trace, stderr = float(everything.values.sum()), 0.0
        if settings.density:
            curve = smooth([(everything.values, torch.full((dim,), 1 / dim).double())])
    else:
        pairs, space = lanczos_pairs(
            operator,
            k,
            settings.which,
            tolerance=settings.tolerance,
            restarts=settings.restarts,
            seed=settings.seed,
            check=check,
        )
        trace, stderr = trace_of(operator, space, probes=settings.trace_probes, seed=settings.seed)
        if settings.density:
            curve = density_of(
                operator,
                probes=settings.density_probes,
                steps=settings.density_steps,
                seed=settings.seed,
            )
    return Spectrum(
        dim=dim,
        eigenvalues=pairs.values,
        residuals=pairs.residuals,
        ranks=pairs.ranks,
        tolerance=pairs.tolerance,
        eigenvectors=[
            surface.unflatten(surface.scaled(vector.to(operator.device, operator.dtype)))
            for vector in pairs.vectors.T
        ],
        trace=trace,
        trace_stderr=stderr,
        density=curve,
        method=method + (", differences" if surface.products == "differences" else ""),
        surface=surface,
    )


def _method(dim: int, settings: _Settings) -> Literal["dense", "lanczos"]:
    """Which way to go.

    Raises:
        ValueError: If there are not that many eigenvalues, or that way does not lead to them.
    """
    k = settings.k
    if k is not None and k > dim:
        raise ValueError(
            f"k must be at most {dim}, the number of trainable parameters; got {k}: "
            "use k=None for all eigenvalues"
        )
    if settings.method == "dense" or (settings.method == "auto" and dim <= DENSE_LIMIT):
        if 8 * dim**2 > DENSE_MEMORY:
            raise ValueError(
                f"the matrix of {dim} parameters takes {8 * dim**2 / 2**30:.3g} GiB, more than the "
                f"limit of {DENSE_MEMORY / 2**30:.3g} GiB; use method='lanczos'"
            )
        return "dense"
    wanted = dim if k is None else k * (2 if settings.which == "both" else 1)
    if wanted >= dim or dim < _LEAST:
        raise ValueError(
            f"Lanczos gives fewer eigenvalues than the model has parameters, from {_LEAST} "
            f"parameters on; got k={k}, which={settings.which!r} and {dim} parameters: use a "
            "smaller k or method='dense'"
        )
    return "lanczos"

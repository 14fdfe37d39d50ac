r"""The diagonal of the Hessian, or of a matrix beside it: exact, or estimated with standard errors.

With a random direction ``v`` of independent signs,

.. math:: E[v_i (Hv)_i] = H_{ii}, \qquad
    \mathrm{Var}[v_i (Hv)_i] = \sum_{j \ne i} H_{ij}^2,

so that an entry is known as well as what stands beside it in its row is small.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Generator, Tensor, nn
from torch.autograd import grad

from lowland._batches import as_batch, as_batches, checked, to_device
from lowland._limits import DEFAULT_MEMORY_BUDGET, DEFAULT_PROBES
from lowland._weights import Count, Weights, check_count
from lowland.criteria import Criterion
from lowland.dense import BruteForce, without_closed_form
from lowland.errors import UnsupportedModelError
from lowland.estimation import Estimation, Products
from lowland.exact.engine import ExactEngine
from lowland.matrices import Matrix
from lowland.objective import Objective, objective, over
from lowland.probes import rademacher
from lowland.products import Vector, hessian_products

Method = Literal["auto", "exact", "dense", "probes"]

_AT_ONCE = 8  # directions whose products share one graph, and which are held at a time


@dataclass(frozen=True)
class HessianDiagonal:
    """The diagonal of a Hessian, by parameter; from :func:`lowland.hessian_diagonal`.

    Attributes:
        values: For each parameter, by its name in the model, the entries that belong to it, in its
            shape: second derivatives of the loss in each of its numbers alone.
        stderr: Standard errors of these over the random directions, in the same shapes, NaN for a
            single direction; None where the values are exact.
        trace_stderr: The standard error of :attr:`trace`, None where it is exact. It is no sum of
            the others, since a direction's errors go together.
        method: The engine that found them: ``"exact"``, ``"dense"`` or ``"probes"``, or these
            with ``", differences"`` behind them where there were no derivatives.
        matrix: Which matrix it is the diagonal of (:mod:`lowland.matrices`).

    Example:
        >>> import torch
        >>> from lowland import HessianDiagonal
        >>> HessianDiagonal({"weight": torch.tensor([[1.0, 2.0]])}, method="exact")
        HessianDiagonal(dim=2, trace=3, values=1 to 2, method='exact')
    """

    values: Mapping[str, Tensor]
    stderr: Mapping[str, Tensor] | None = None
    trace_stderr: Tensor | None = None
    method: str = "exact"
    matrix: Matrix = "hessian"

    @property
    def dim(self) -> int:
        """``P``, the number of entries."""
        return sum(part.numel() for part in self.values.values())

    @property
    def trace(self) -> Tensor:
        """The sum of all entries, a scalar: ``Tr H``."""
        return torch.stack([part.sum() for part in self.values.values()]).sum()

    def __repr__(self) -> str:
        """In one line, with the trace and the ends of the values."""
        trace = f"trace={self.trace.item():.6g}"
        if self.trace_stderr is not None:
            trace += f" ± {self.trace_stderr.item():.2g}"
        ends = torch.cat([part.reshape(-1) for part in self.values.values()]).aminmax()
        low, high = (f"{end.item():.6g}" for end in ends)
        shown = [f"dim={self.dim}", trace, f"values={low} to {high}", f"method={self.method!r}"]
        if self.matrix != "hessian":
            shown.append(f"matrix={self.matrix!r}")
        return f"{type(self).__name__}({', '.join(shown)})"


def hessian_diagonal(
    model: nn.Module,
    criterion: Criterion,
    x: Any,
    y: Any = None,
    method: Method = "auto",
    *,
    probes: int = DEFAULT_PROBES,
    products: Products = "auto",
    generator: Generator | None = None,
    parameters: Iterable[Tensor] | None = None,
    matrix: Matrix = "hessian",
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    count: Count | None = None,
) -> HessianDiagonal:
    r"""The diagonal of the Hessian of ``criterion(model(x), y)`` in the trainable parameters.

    Args:
        model: As for :func:`lowland.hessian_moments`, like all that is not said here.
        criterion: The loss.
        x: Inputs; without ``y`` a pair of both, or a data loader, or anything that gives batches
            ``(x, y)``, which is gone through once: the diagonal is that of the loss on all of them,
            by whichever method.
        y: Targets.
        method: ``"exact"`` is the closed form, in time linear in samples and parameters alike;
            ``"dense"`` takes the diagonal of the matrix that brute force forms, and ``"probes"``
            estimates it from products with random signs. ``"auto"`` takes the closed form where it
            covers the model, brute force up to a few thousand parameters, and probes beyond.
        probes: How many, for ``"probes"``. Standard errors fall with their square root. Each batch
            of a loader draws its own.
        products: Where there is no closed form, ``"autograd"``, ``"differences"`` of gradients, or
            ``"auto"``, as for :func:`lowland.hessian_moments`.
        generator: Of the probes' signs; without one PyTorch's own is used.
        parameters: Those that are meant, if not all that are trainable.
        matrix: ``"hessian"``, or ``"ggn"``, ``"fisher"`` or ``"residual"`` in its place
            (:mod:`lowland.matrices`).
        memory_budget: Bytes of temporaries that ``"exact"`` does not exceed.
        count: Of several batches: what the criterion's mean over one divides by, as for
            :func:`lowland.hessian_moments`.

    Returns:
        Values by parameter, with standard errors where they are estimates. They carry no gradient.

    Raises:
        UnsupportedModelError: If the method asked for cannot do it, or the model is a
            ``DistributedDataParallel`` module, of which each process has its own data.
        TypeError, ValueError, RuntimeError: As :func:`lowland.hessian_moments`.

    Notes:
        The error of an estimated entry is the length of the rest of its row, over the square root
        of the number of probes: entries that are small beside their row take many. Where they
        matter, ``parameters=`` with ``method="dense"`` gives those of some layers exactly.

    References:
        C. Bekas, E. Kokiopoulou and Y. Saad, An estimator for the diagonal of a matrix, Applied
        Numerical Mathematics 57 (2007).

    Example:
        >>> import torch, lowland
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        >>> x, y = torch.randn(50, 3), torch.ones(50, dtype=torch.long)
        >>> diagonal = lowland.hessian_diagonal(model, nn.CrossEntropyLoss(), x, y)
        >>> diagonal.values["0.weight"].shape, diagonal.method
        (torch.Size([4, 3]), 'exact')
        >>> trace = lowland.hessian_moments(model, nn.CrossEntropyLoss(), x, y).trace
        >>> torch.allclose(diagonal.trace, trace, rtol=1e-4)
        True
    """
    if method not in get_args(Method):
        raise ValueError(
            f"unknown method {method!r}: expected 'auto', 'exact', 'dense' or 'probes'"
        )
    check_count(count)
    settings = Estimation(probes, products, generator, memory_budget=memory_budget)
    batch = (x, y) if y is not None else as_batch(x)
    weigh = None
    if batch is None:
        target = over(model, criterion, (), parameters, matrix=matrix)
        weigh = Weights(target, count)
    else:
        target = objective(model, criterion, *batch, parameters, matrix=matrix)
    if target.parallel:
        raise UnsupportedModelError(
            "the model is a DistributedDataParallel module, and each process would measure its own "
            "data; give model.module and the whole data set in one process"
        )
    find, name = None, ""
    total = _Found([torch.zeros_like(p) for p in target.parameters])
    for weight, part in [(1.0, target)] if weigh is None else _weighed(target, x, weigh):
        if find is None:
            find, settings, name = _choose(part, method, settings)
        total.add(find(part, settings), weight)
    return total.result(target, name, 1.0 if weigh is None else 1 / weigh.total)


class _Found:
    """A diagonal, and where it is estimated the squares of its standard errors."""

    def __init__(
        self,
        values: Vector,
        variances: Vector | None = None,
        of_trace: Tensor | None = None,
    ) -> None:
        self.values, self.variances, self.of_trace = values, variances, of_trace

    def add(self, other: _Found, count: float) -> None:
        """Add so many times another one, whose errors are independent of these."""
        torch._foreach_add_(self.values, other.values, alpha=count)
        if other.variances is None or other.of_trace is None:
            return
        square = count * count
        if self.variances is None or self.of_trace is None:
            self.variances = [torch.zeros_like(each) for each in other.variances]
            self.of_trace = torch.zeros_like(other.of_trace)
        torch._foreach_add_(self.variances, other.variances, alpha=square)
        self.of_trace = self.of_trace + square * other.of_trace

    def result(self, target: Objective, method: str, scale: float) -> HessianDiagonal:
        """The same times a number, with standard errors."""

        def named(parts: Iterable[Tensor]) -> dict[str, Tensor]:
            return dict(zip(target.names, parts, strict=True))

        values = named(scale * each for each in self.values)
        if self.variances is None or self.of_trace is None:
            return HessianDiagonal(values, method=method, matrix=target.matrix)
        stderr = named(scale * each.sqrt() for each in self.variances)
        of_trace = scale * self.of_trace.sqrt()
        return HessianDiagonal(values, stderr, of_trace, method, target.matrix)


_Way = Callable[[Objective, Estimation], _Found]


def _weighed(target: Objective, loader: Any, weigh: Weights) -> Iterator[tuple[float, Objective]]:
    """The loss on each batch where the parameters are, and what the batch counts."""
    for x, y in checked(as_batches(loader, again=False)):
        weight = weigh(x, y)
        if weight:  # else all of its targets are ignored, and its loss is no number
            yield weight, target.on((to_device(x, target.device), to_device(y, target.device)))


def _choose(part: Objective, method: Method, settings: Estimation) -> tuple[_Way, Estimation, str]:
    """How the diagonal is found, with which settings, and what that is called; by one batch."""
    if method in ("auto", "exact"):
        try:
            ExactEngine.read(part, settings)
        except UnsupportedModelError:
            if method == "exact":
                raise
        else:
            return _by_closed_form, settings, "exact"
    by_matrix, chosen, name = without_closed_form(part, method, settings)
    return _by_matrix if by_matrix else _by_probes, chosen, name


def _by_closed_form(part: Objective, settings: Estimation) -> _Found:
    with torch.enable_grad():
        setup = ExactEngine.read(part, settings).setup
        given = setup.weights
    pairs = zip(given, setup.diagonal(settings.memory_budget), strict=True)
    used = [(weight, each.view_as(weight)) for weight, each in pairs if weight.requires_grad]
    # The weights are the parameters in another order, and a gradient takes what belongs to them the
    # same way back.
    weights, entries = zip(*used, strict=True)
    return _Found(list(grad(weights, part.parameters, entries, materialize_grads=True)))


def _by_matrix(part: Objective, settings: Estimation) -> _Found:
    with torch.no_grad():
        entries = BruteForce(part, settings).hessian().diagonal()
    parts = entries.split([p.numel() for p in part.parameters])
    return _Found([each.reshape(p.shape) for each, p in zip(parts, part.parameters, strict=True)])


def _by_probes(part: Objective, settings: Estimation) -> _Found:
    generator = settings.generator
    if generator is None:  # one of its own: the model's passes all start from the same numbers
        generator = Generator().manual_seed(int(torch.randint(1 << 62, ())))
    again = part.remember()
    average, seen = _Average(part), 0
    while seen < settings.probes:
        some = [
            rademacher(part.parameters, generator, part.outer)
            for _ in range(min(_AT_ONCE, settings.probes - seen))
        ]
        seen += len(some)
        with again(), part.others_frozen():
            products = hessian_products(part, some, settings.products)
        for direction, product in zip(some, products, strict=True):
            average.add(direction, product)
    return average.found()


class _Average:
    """The mean of ``v o Hv`` over directions, and how far they are apart.

    Squares are taken of what is apart from the mean so far: of squares that are summed up before
    the mean's is taken off no digits of a small variance are left.
    """

    def __init__(self, part: Objective) -> None:
        self.mean = [torch.zeros_like(p) for p in part.parameters]
        self.apart = [torch.zeros_like(p) for p in part.parameters]
        self.traces: list[Tensor] = []

    @torch.no_grad()
    def add(self, direction: Vector, product: Vector) -> None:
        """One more direction."""
        found = torch._foreach_mul(direction, product)  # noqa: SLF001
        self.traces.append(torch.stack([each.sum() for each in found]).sum())
        step = torch._foreach_sub(found, self.mean)  # noqa: SLF001
        torch._foreach_add_(self.mean, step, alpha=1 / len(self.traces))
        torch._foreach_addcmul_(self.apart, step, torch._foreach_sub(found, self.mean))  # noqa: SLF001

    def found(self) -> _Found:
        """The mean, with variances of it; NaN of a single direction."""
        traces, count = torch.stack(self.traces), len(self.traces)
        if count == 1:
            unknown = [torch.full_like(each, math.nan) for each in self.apart]
            return _Found(self.mean, unknown, torch.full_like(traces[0], math.nan))
        variances = list(torch._foreach_div(self.apart, (count - 1) * count))  # noqa: SLF001
        return _Found(self.mean, variances, traces.var() / count)

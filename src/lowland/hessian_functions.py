"""One call for a function of the Hessian's eigenvalues, with its gradient."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args

from torch import Tensor, nn

from lowland._batches import as_batch
from lowland._limits import DEFAULT_MEMORY_BUDGET, DENSE_LIMIT
from lowland.criteria import Criterion
from lowland.dense import BruteForce, without_closed_form
from lowland.errors import ANY_MODULE, UnsupportedModelError
from lowland.estimation import Estimation
from lowland.exact.eigenvalues import evaluate
from lowland.exact.engine import ExactEngine
from lowland.matrices import Matrix
from lowland.objective import Objective, objective
from lowland.spectral_functions import Function, SpectralFunction, spectral_function

Method = Literal["auto", "exact", "dense"]


def hessian_function(
    model: nn.Module,
    criterion: Criterion,
    x: Any,
    y: Any = None,
    method: Method = "auto",
    *,
    f: Function,
    alpha: float | None = None,
    p: float | None = None,
    beta: float | None = None,
    tolerance: float | None = None,
    parameters: Iterable[Tensor] | None = None,
    matrix: Matrix = "hessian",
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
) -> Tensor:
    r"""A function of the eigenvalues of the Hessian of ``criterion(model(x), y)``.

    Args:
        model: As for :func:`lowland.hessian_moments`, like all that is not named here.
        criterion: The loss.
        x: Inputs of one batch; without ``y`` a pair of both, or a mapping or object that holds
            both.
        y: Targets.
        method: ``"exact"`` is the closed form. ``"dense"`` forms the matrix by automatic
            differentiation, row by row, of any module of a few thousand parameters; its gradient
            takes as long again. ``"auto"`` takes the closed form where it covers the model, else
            brute force where it is a matter of seconds.
        f: ``"lambda_max"``, ``"lambda_min"``, ``"spectral_norm"``, ``"log_det"``,
            ``"effective_dim"``, ``"nuclear"``, ``"schatten"``, ``"soft_max"``, or a pair of
            functions ``(f, f')``; with ``alpha``, ``p``, ``beta`` and ``tolerance`` as
            :func:`lowland.exact.spectral` says. Of the first three the closed form takes
            ``O(n P)`` memory and time for each of some products above 512 parameters.
        alpha: The shift of ``"log_det"`` and ``"effective_dim"``, above 0.
        p: The exponent of ``"schatten"``, at least 1.
        beta: Of ``"soft_max"``, above 0.
        tolerance: Up to which difference, relative to the largest magnitude, eigenvalues are equal.
        parameters: Those whose Hessian is meant, if not all that are trainable.
        matrix: ``"hessian"``, ``"ggn"``, ``"residual"`` or ``"fisher"``.
        memory_budget: Bytes of temporaries of the closed form.

    Returns:
        A scalar, differentiable (once) in the model's parameters: its gradient is
        :math:`\nabla \langle f'(H), H \rangle` with a constant ``f'(H)``, a subgradient where
        the function has a kink, and never NaN of a finite Hessian.

    Raises:
        UnsupportedModelError: If the closed form is asked for and does not cover the model; if
            brute force is not taken unasked; or of several batches or processes.
        TypeError, ValueError, RuntimeError: As :func:`lowland.exact.spectral` and
            :func:`lowland.hessian_moments`.

    Example:
        >>> import torch, lowland
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        >>> x, y = torch.randn(50, 3), torch.ones(50, dtype=torch.long)
        >>> batch = model, nn.CrossEntropyLoss(), x, y
        >>> top = lowland.hessian_function(*batch, f="lambda_max")
        >>> top.backward()  # the direction in which the largest eigenvalue falls fastest
        >>> bool(top <= lowland.hessian_moments(*batch).upper)
        True
        >>> evidence = lowland.hessian_function(*batch, f="log_det", alpha=0.1)
        >>> evidence.shape
        torch.Size([])
    """
    function = spectral_function(f, alpha=alpha, p=p, beta=beta, tolerance=tolerance)
    check_function_method(method)
    settings = Estimation(memory_budget=memory_budget)
    batch = (x, y) if y is not None else as_batch(x)
    if batch is None:
        raise UnsupportedModelError(
            "a function of eigenvalues is that of one batch: pass all samples as tensors x and y; "
            "lowland.spectrum(model, criterion, loader) gives eigenvalues over a loader"
        )
    target = objective(model, criterion, *batch, parameters, matrix=matrix)
    return function_of(target, function, method, settings)[0]


def check_function_method(method: str) -> None:
    """Refuse what is no way to all eigenvalues.

    Raises:
        ValueError: If there is no method of that name.
    """
    if method not in get_args(Method):
        raise ValueError(f"unknown method {method!r}: expected 'auto', 'exact' or 'dense'")


def function_of(
    target: Objective, function: SpectralFunction, method: Method, settings: Estimation
) -> tuple[Tensor, str]:
    """The function of the eigenvalues of one loss's matrix, and what has found it.

    Raises:
        UnsupportedModelError: As :func:`hessian_function`.
    """
    if target.parallel:
        raise UnsupportedModelError(
            "the model is a DistributedDataParallel module, and eigenvalues of each process's own "
            "samples are not those of all: give model.module and all samples in one process"
        )
    why = ""
    if method != "dense":
        try:
            exact = ExactEngine.read(target, settings)
        except UnsupportedModelError as error:
            why = str(error).replace(
                ANY_MODULE, "use method='dense', which takes any module of few parameters"
            )
            if method == "exact":
                raise UnsupportedModelError(why) from error
        else:
            return evaluate(exact.setup, function, "auto", settings.memory_budget), exact.name
    by_matrix, chosen, name = without_closed_form(target, method, settings, limit=DENSE_LIMIT)
    if not by_matrix:
        raise UnsupportedModelError(
            f"{why}; it is not taken unasked, since there are more than {DENSE_LIMIT} parameters, "
            "it would take long, or the model is another in each call. Without gradients "
            "lowland.spectrum finds eigenvalues of any model in evaluation mode"
        )
    return BruteForce(target, chosen, name=name).of_eigenvalues(function), name

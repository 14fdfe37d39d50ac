"""A function of the Hessian's eigenvalues as a penalty."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from lowland._limits import DEFAULT_MEMORY_BUDGET
from lowland._sampling import WHOLE, Part
from lowland.balance import LIMIT
from lowland.criteria import Criterion
from lowland.errors import UnsupportedModelError
from lowland.estimation import Estimation
from lowland.hessian_functions import Method, check_function_method, function_of
from lowland.objective import Objective
from lowland.penalty import Penalty
from lowland.spectral_functions import Function, spectral_function


class Spectral(Penalty):
    r"""``weight * F``: a function of the eigenvalues of the Hessian, by its exact gradient.

    For models that the closed form covers, and small ones of any kind. Each call finds the
    eigenvalues anew, to rounding, and nothing is estimated.

    Args:
        criterion: The loss whose curvature is penalized.
        weight: Factor of the penalty, at least zero; or none, with a ``strength``.
        f: The function, with ``alpha``, ``p``, ``beta`` and ``tolerance`` as for
            :func:`lowland.exact.spectral`.
        alpha: The shift of ``"log_det"`` and ``"effective_dim"``, above 0.
        p: The exponent of ``"schatten"``, at least 1.
        beta: Of ``"soft_max"``, above 0.
        tolerance: Up to which difference, relative to the largest magnitude, eigenvalues are equal.
        method: ``"exact"``, ``"dense"`` or ``"auto"``, as for :func:`lowland.hessian_function`.
            Which it was last is :attr:`used`.
        strength, limit, samples, parameters, every, active, total_steps: As of
            :class:`~lowland.penalties.CurvaturePenalty`.
        memory_budget: Bytes of temporaries of the closed form.

    Raises:
        TypeError, ValueError: As :class:`~lowland.penalties.Penalty` and
            :func:`lowland.spectral_functions.spectral_function`.

    Notes:
        A call raises what :func:`lowland.hessian_function` does. Above 512 parameters
        ``"lambda_max"`` costs a Lanczos iteration a call, some dozens of gradients.

    Example:
        >>> import torch, lowland
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        >>> x, y = torch.randn(50, 3), torch.ones(50, dtype=torch.long)
        >>> penalty = lowland.Spectral(nn.CrossEntropyLoss(), 0.01, f="soft_max", beta=10.0)
        >>> penalty.loss(model, x, y).backward()  # the criterion's loss and the penalty
        >>> penalty.used
        'exact'
    """

    def __init__(
        self,
        criterion: Criterion,
        weight: float | None = None,
        *,
        f: Function,
        alpha: float | None = None,
        p: float | None = None,
        beta: float | None = None,
        tolerance: float | None = None,
        method: Method = "auto",
        strength: float | None = None,
        limit: float | None = LIMIT,
        samples: float | None = None,
        parameters: Iterable[Tensor] | None = None,
        every: int = 1,
        active: tuple[float, float] = (0, math.inf),
        total_steps: int | None = None,
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
    ) -> None:
        super().__init__(
            criterion,
            weight,
            strength=strength,
            limit=limit,
            samples=samples,
            parameters=parameters,
            every=every,
            active=active,
            total_steps=total_steps,
        )
        self.function = spectral_function(f, alpha=alpha, p=p, beta=beta, tolerance=tolerance)
        check_function_method(method)
        self.method: Method = method
        self.estimation = Estimation(memory_budget=memory_budget)
        self._parameter = {"alpha": (alpha, None), "p": (p, None), "beta": (beta, None)}

    def _quantity(self, target: Objective) -> Tensor:
        quantity, self.used = function_of(target, self.function, self.method, self.estimation)
        return quantity

    def _loss_and_quantity(self, target: Objective, part: Part = WHOLE) -> tuple[Tensor, Tensor]:
        if float(part.scale) != 1:  # the eigenvalues are waited for anyway
            raise UnsupportedModelError(
                "a function of the eigenvalues of a part of the samples says nothing of the sum of "
                "all, or of a mean without ignored targets or by class weights: with samples= use "
                "a criterion that is a plain mean"
            )
        quantity = self._quantity(target)  # first: it leaves state and random numbers as they are
        return target.step_loss(), quantity

    def _settings(self) -> dict[str, tuple[Any, Any]]:
        return {"f": (self.function.name, None), **self._parameter, "method": (self.method, "auto")}

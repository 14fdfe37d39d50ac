"""How moments are to be found: the settings that every engine is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Generator

from lowland._limits import DEFAULT_MEMORY_BUDGET, DEFAULT_PROBES
from lowland.validation import check_budget, check_tolerance

Products = Literal["auto", "autograd", "differences", "exact", "finite"]

# Before there was an engine "exact" with which it is confused.
_FORMER = {"exact": "autograd", "finite": "differences"}


@dataclass(frozen=True)
class Estimation:
    """What an engine may spend, and how it estimates what it does not compute.

    Attributes:
        probes: Random directions, for estimates.
        products: How these are multiplied with the Hessian: ``"autograd"`` differentiates the
            gradient, ``"differences"`` takes differences of gradients, ``"auto"`` the former where
            PyTorch has it right.
        generator: Of the directions' signs; None for PyTorch's own.
        unbiased: Whether the samples are a batch of a larger data set, whose ``Tr H^2`` is meant.
        memory_budget: Bytes of temporaries of the closed form.
        prune: The relative tolerance up to which the closed form leaves out fitted samples; None
            for none of them.
        step: Of differences: how much longer than usual their steps are. None until it has been
            looked at which products are right.

    Raises:
        TypeError: If the generator is none, or the budget or the tolerance no number.
        ValueError: If there is no probe, no such way to a product, the budget is not finite, or the
            tolerance not between 0 and 1.

    Example:
        >>> from lowland.estimation import Estimation
        >>> Estimation(probes=4, products="finite").products
        'differences'
    """

    probes: int = DEFAULT_PROBES
    products: Products = "auto"
    generator: Generator | None = None
    unbiased: bool = False
    memory_budget: int = DEFAULT_MEMORY_BUDGET
    step: float | None = None
    prune: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.probes, int) or self.probes < 1:
            raise ValueError(f"probes must be a whole number of at least 1; got {self.probes!r}")
        if self.products not in get_args(Products):
            raise ValueError(
                f"unknown products {self.products!r}: expected 'auto', 'autograd' or 'differences'"
            )
        if not (self.generator is None or isinstance(self.generator, Generator)):
            raise TypeError(f"generator must be a torch.Generator; got {self.generator!r}")
        object.__setattr__(self, "products", _FORMER.get(self.products, self.products))
        object.__setattr__(self, "memory_budget", check_budget(self.memory_budget))
        if self.prune is not None:
            check_tolerance(self.prune)

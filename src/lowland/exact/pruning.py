r"""Moments without the samples that are certified to add next to nothing.

A sample that is fitted leaves the Hessian: its residual ``r`` and its curvature ``Q`` vanish, so
that it can be removed when the direction is computed (arXiv:2606.28662, section V-A, proposition 1,
which does not say how much that changes). Let ``H = K + D`` with the ``K`` of the samples that are
kept. With bounds on each dropped sample's share (:mod:`lowland.exact.sample_bounds`), summed to

    |Tr D| <= t,   ||D||_F <= h,   ||grad Tr D|| <= s,   ||D'||_F <= S,   ||H'||_F <= S_all

where the last two are derivatives along any unit vector of the weights,

    |Tr H - Tr K| <= t
    |Tr H^2 - Tr K^2| <= 2 ||K||_F h + h^2
    ||grad Tr H - grad Tr K|| <= s
    ||grad Tr H^2 - grad Tr K^2|| <= 2 (||K||_F S + h S_all)

since ``grad Tr H^2 = 2 <H, H'>`` and ``<H, H'> - <K, K'> = <K, D'> + <D, H'>``. How many samples
each of these allows is known once the kept ones' moments are: a first guess is looked at, at most
a sixteenth of the samples, and as many added as it takes. The gradients come with the moments,
since their sizes decide; a backward pass only adds them up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lowland.errors import UnsupportedModelError
from lowland.exact.plan import OrderChoice
from lowland.exact.problem import TWICE, Backend, join_layers
from lowland.exact.sample_bounds import SampleBounds, sample_bounds
from lowland.exact.setup import Setup
from lowland.moments import HessianMoments
from lowland.pruned import Pruned

# The first look takes at most this part of the samples. If no more than a tenth can be dropped,
# finding out which would cost more than it saves.
_FIRST, _MOST = 16, 0.9


def pruned_moments(
    setup: Setup,
    tolerance: float,
    order: OrderChoice,
    memory_budget: int,
    *,
    unbiased: bool = False,
    moments: int = 2,
) -> HessianMoments:
    """``Tr H`` and ``Tr H^2`` with a report, as :func:`lowland.exact.moments` gives them.

    Raises:
        UnsupportedModelError: If more is asked for than the certificates are of.
    """
    if moments != 2 or unbiased:
        raise UnsupportedModelError(
            "prune= certifies Tr H and Tr H^2 of all samples: leave it out, or use moments=2 and "
            "unbiased=False"
        )
    if setup.data.inputs_vary:
        raise UnsupportedModelError(
            "prune= certifies gradients in the weights, and x asks for one: leave prune= out, or "
            "use x.detach(), or torch.no_grad() for the values alone"
        )
    asking = torch.is_grad_enabled()
    wanted = tuple(asking and weight.requires_grad for weight in setup.weights)
    wish = _Settings(tolerance, order, memory_budget, wanted)
    kept, *found = _Search.apply(setup, wish, *setup.weights)  # type: ignore[no-untyped-call]
    samples = setup.size.samples
    if not found:
        result = setup.moments(order, memory_budget)
        nothing = [torch.zeros_like(result.trace.detach()) for _ in range(4)]
        return replace(result, pruned=Pruned(tolerance, samples, kept, *nothing))
    values, certificates, gradients = found[:2], found[2:6], found[6:]
    if any(wanted):
        values = _Linear.apply(  # type: ignore[no-untyped-call]
            wanted, *values, *gradients, *setup.weights
        )
    first, second = (value.view(setup.ensemble) for value in values)
    bounds = [each.view(setup.ensemble) for each in certificates]
    report = Pruned(tolerance, samples, kept, *bounds)
    return HessianMoments(setup.size.dim, first, second, matrix=setup.arch.matrix, pruned=report)


@dataclass(frozen=True)
class _Settings:
    """What is to be found.

    Attributes:
        tolerance: Relative, of moments and of gradients.
        order: Of summation.
        memory_budget: For everything.
        wanted: Of each layer whether the gradient in its weights is.
    """

    tolerance: float
    order: OrderChoice
    memory_budget: int
    wanted: tuple[bool, ...]


@dataclass(frozen=True)
class _Found:
    """Of some samples both moments, ``(networks,)``, and where wanted the gradient of each."""

    first: Tensor
    second: Tensor
    gradients: tuple[Sequence[Tensor], ...] = ()

    @property
    def norm(self) -> Tensor:
        """``||K||_F``, ``(networks, 1)``."""
        return self.second.clamp(min=0).sqrt()[:, None]

    @property
    def sizes(self) -> list[Tensor]:
        """Of both moments and of both gradients; zeros where these are not wanted."""
        slopes = [
            torch.stack([part.square().sum((1, 2)) for part in each]).sum(0).sqrt()
            for each in self.gradients
        ] or 2 * [torch.zeros_like(self.first)]
        return [each[:, None] for each in (self.first.abs(), self.second, *slopes)]


@dataclass(frozen=True)
class _Ledger:
    """What can be left out, of moments and gradients of given sizes.

    Attributes:
        bounds: Of each sample.
        part: Of each of the four quantities of the kept samples, how much its error may be;
            infinite for gradients that nobody wants.
    """

    bounds: SampleBounds
    part: Sequence[float]

    def guess(self) -> tuple[Tensor, list[Tensor]]:
        """``||K||_F`` and the four sizes if no bound could be improved, and nothing cancelled."""
        trace, norm, trace_slope, slope = (part.sum(1, keepdim=True) for part in self.bounds.parts)
        return norm, [trace, norm.square(), trace_slope, 2 * norm * slope]

    def limits(self, sizes: Sequence[Tensor]) -> list[Tensor]:
        """How large the four certificates may be."""
        # An infinite part of nothing is no limit either.
        return [
            part * size if math.isfinite(part) else torch.full_like(size, part)
            for part, size in zip(self.part, sizes, strict=True)
        ]

    def certificates(self, dropped: SampleBounds, norm: Tensor) -> list[Tensor]:
        """The four of sums over dropped samples."""
        every = self.bounds.slope.sum(1, keepdim=True)
        square = 2 * norm * dropped.norm + dropped.norm.square()
        in_square = 2 * (norm * dropped.slope + dropped.norm * every)
        return [dropped.trace, square, dropped.trace_slope, in_square]

    def choose(
        self, norm: Tensor, sizes: Sequence[Tensor], *, fewest: int = 1, most: int | None = None
    ) -> Tensor:
        """The fewest samples that need to be kept, ascending; the same for all networks."""
        limits = self.limits(sizes)
        alone = self.certificates(self.bounds, norm)
        shares = [_ratio(each, limit) for each, limit in zip(alone, limits, strict=True)]
        order = torch.stack(shares).amax((0, 1)).argsort()
        sums = SampleBounds(*(part[:, order].cumsum(1) for part in self.bounds.parts))
        dropped = int(_within(self.certificates(sums, norm), limits).int().cumprod(0).sum())
        kept = max(fewest, len(order) - dropped)
        return order[-min(kept, most or kept) :].sort().values

    def without(self, kept: Tensor) -> SampleBounds:
        """Sums over all samples but these."""
        left = torch.ones(self.bounds.trace.shape[1], dtype=torch.bool, device=kept.device)
        left[kept] = False
        return SampleBounds(*(part[:, left].sum(1, keepdim=True) for part in self.bounds.parts))


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Nothing is no part of nothing; what is no number is all of everything."""
    ratio = (numerator / denominator).nan_to_num(nan=math.inf, posinf=math.inf)
    return torch.where(numerator == 0, 0, ratio)


def _within(certificates: Sequence[Tensor], limits: Sequence[Tensor]) -> Tensor:
    """For each column, whether all four certificates are, for all networks."""
    pairs = zip(certificates, limits, strict=True)
    return torch.stack([(each <= limit).all(0) for each, limit in pairs]).all(0)


def _search(setup: Setup, wish: _Settings) -> tuple[Tensor, _Found, list[Tensor]] | None:
    """The samples to keep, their moments and the certificates; None if too few can be dropped."""
    samples = setup.size.samples
    # Of the kept part: the whole may be smaller, by what was dropped.
    part = wish.tolerance / (1 + wish.tolerance)
    slopes = part if any(wish.wanted) else math.inf
    ledger = _Ledger(sample_bounds(setup, wish.memory_budget), (part, part, slopes, slopes))
    norm, sizes = ledger.guess()
    if len(ledger.choose(norm, sizes)) > _MOST * samples:
        return None
    kept = ledger.choose(norm, sizes, most=max(1, samples // _FIRST))
    looked = len(kept)
    while looked <= samples and len(kept) <= _MOST * samples:
        found = _evaluate(setup.of_samples(kept), wish)
        certificates = ledger.certificates(ledger.without(kept), found.norm)
        if bool(_within(certificates, ledger.limits(found.sizes)).all()):
            return kept, found, certificates
        # What was seen is an estimate of what is to come: half of it is left to spare.
        sizes = [size / 2 for size in found.sizes]
        kept = ledger.choose(found.norm, sizes, fewest=len(kept) + max(1, len(kept) // 4))
        looked += len(kept)
    return None


def _evaluate(setup: Setup, wish: _Settings) -> _Found:
    """Both moments, and both gradients where they are wanted, in one pass for each."""
    problem = replace(
        setup.problem(wish.order, wish.memory_budget), differentiable=any(wish.wanted)
    )

    def look(_: slice, backend: Backend) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        first, second, kept = backend.moments()
        if not any(wish.wanted):
            return first, second, []
        one = torch.ones_like(second)
        return first, second, backend.gradient(torch.zeros_like(one), one, kept)

    first, second, slopes = zip(*problem.on_backend(setup.weights, look), strict=True)
    found = _Found(torch.cat(first), torch.cat(second))
    if not any(wish.wanted):
        return found
    of_square = join_layers(slopes, setup.weights)
    of_trace = join_layers([setup.trace_gradient(wish.memory_budget)], setup.weights)
    pairs = [list(compress(each, wish.wanted)) for each in (of_trace, of_square)]
    return replace(found, gradients=tuple(pairs))


class _Search(Function):
    """What :func:`_search` finds, of weights that ``torch.func`` has unwrapped."""

    @staticmethod
    def forward(setup: Setup, wish: _Settings, *weights: Tensor) -> tuple[Tensor, ...]:
        found = _search(setup.at(weights), wish)
        if found is None:
            return (torch.arange(setup.size.samples, device=weights[0].device),)
        kept, values, certificates = found
        gradients = [part for each in values.gradients for part in each]
        return kept, values.first, values.second, *certificates, *gradients

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG004
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:  # noqa: ARG004
        raise AssertionError("nothing here has a gradient")


class _Linear(Function):
    """Two moments whose gradients are known already."""

    @staticmethod
    def forward(
        wanted: Sequence[bool],  # noqa: ARG004
        first: Tensor,
        second: Tensor,
        *rest: Tensor,  # noqa: ARG004
    ) -> tuple[Tensor, Tensor]:
        return first.clone(), second.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG004
        wanted, _, _, *rest = inputs
        ctx.wanted = wanted
        ctx.save_for_backward(*rest[: 2 * sum(wanted)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        parts = iter(_Combination.apply(*grads, *saved))  # type: ignore[no-untyped-call]
        in_weights = [next(parts) if wanted else None for wanted in ctx.wanted]
        return None, None, None, *[None] * len(saved), *in_weights


class _Combination(Function):
    """Both gradients, each times a number; the moments are differentiable once."""

    @staticmethod
    def forward(by_trace: Tensor, by_square: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
        layers = len(gradients) // 2
        pairs = zip(gradients[:layers], gradients[layers:], strict=True)
        a, b = by_trace[:, None, None], by_square[:, None, None]
        return tuple(a * trace + b * square for trace, square in pairs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:  # noqa: ARG004
        raise RuntimeError(TWICE)

r"""How much each sample can add to both moments and to their gradients, without its blocks.

With the words of :mod:`lowland.exact.terms`, and with
:math:`U_l = (\partial a_L / \partial a_l)^T`, which a backward pass leads down through the layers,
a sample's blocks are made of

    B_lm = U_l Q U_m^T + sum over k >= m of J_lk diag(c_k) J_mk^T,    J_lk = (d a_k / d a_l)^T
    g_l = U_l r,    c_l = phi''_l * V_l+1 g_l+1,    D_lm = J_lm diag(phi'_m)

with the loss's derivatives ``r`` and ``Q`` in the logits. All vectors and the ``U`` are computed,
in a pass as long as a gradient for each output; products are bounded by their factors' norms, and
so are their derivatives in the weights, for which the third derivatives of activations and loss at
the sample are enough (:mod:`lowland.exact.majorants`). No ``M x M`` matrix of a sample is formed.

Source: the bound by ``q`` and ``r`` of arXiv:2606.28662, section V-A (proposition 1), says that a
sample vanishes as it is fitted; the bounds here, for any depth and loss, are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from lowland.exact.majorants import Majorant
from lowland.exact.setup import Setup
from lowland.exact.terms import Architecture, Data, Vectors, batched_matmul
from lowland.losses import LOSSES, Coupled, Loss, Separable, read_derivatives


@dataclass(frozen=True)
class SampleBounds:
    """Bounds for each sample's weighted Hessian ``H_i``, the sum of which is ``H``.

    All are ``(networks, samples)``, and gradients those in all weights.

    Attributes:
        trace: On ``|Tr H_i|``.
        norm: On the Frobenius norm of ``H_i``.
        trace_slope: On the norm of the gradient of ``Tr H_i``.
        slope: On the Frobenius norm of the derivative of ``H_i`` along any unit vector.
    """

    trace: Tensor
    norm: Tensor
    trace_slope: Tensor
    slope: Tensor

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """All four, in this order."""
        return self.trace, self.norm, self.trace_slope, self.slope


@torch.no_grad()
def sample_bounds(setup: Setup, memory_budget: int) -> SampleBounds:
    """The bounds of all samples, for some networks and some samples at a time."""
    size, arch = setup.size, setup.arch
    outputs = size.widths[-1]
    # By layer z, a, three derivatives, and their products with vectors; U and V U of two layers.
    floats = 10 * sum(size.widths) + 4 * outputs * (max(size.widths[1:]) + outputs)
    room = max(1, memory_budget // (2 * floats * size.itemsize))
    chunk = min(size.samples, room)
    networks = max(1, min(size.networks, room // chunk))
    rows = []
    for first in range(0, size.networks, networks):
        some = slice(first, first + networks)
        weights = [weight[some].detach() for weight in setup.weights]
        across = {layer: _matrix(weights[layer][:, 1:]) for layer in range(1, len(weights))}
        data = setup.data.of_networks(some)
        found = [
            _bound(arch, weights, across, data.of_samples(slice(start, start + chunk))).parts
            for start in range(0, size.samples, chunk)
        ]
        rows.append([torch.cat(part, 1) for part in zip(*found, strict=True)])
    # Where the networks overflow, zero times infinity is no bound.
    whole = [torch.cat(part).nan_to_num(nan=math.inf) for part in zip(*rows, strict=True)]
    return SampleBounds(*whole)


def _matrix(weight: Tensor) -> Majorant:
    """A layer's weights without biases, ``(networks, M, M')``, which change at most at rate 1."""
    gram = weight.mT @ weight if weight.shape[1] > weight.shape[2] else weight @ weight.mT
    if gram.isfinite().all():
        largest = torch.linalg.eigvalsh(gram)[:, -1:].clamp(min=0).sqrt()
    else:
        largest = weight.new_full((len(weight), 1), math.inf)
    return Majorant(largest, weight.square().sum((1, 2)).sqrt()[:, None], torch.ones_like(largest))


@dataclass(frozen=True)
class _Layer:
    """What a forward pass knows of a hidden layer.

    Attributes:
        slope, bend, twist: The activation's derivatives.
        rate: How fast its pre-activations change.
    """

    slope: Vectors
    bend: Vectors
    twist: Vectors
    rate: Tensor

    @property
    def steepest(self) -> Tensor:
        return _largest(self.slope)

    @property
    def slopes(self) -> Majorant:
        """``diag(phi')``."""
        return Majorant(self.steepest, _norm(self.slope), _largest(self.bend) * self.rate)


def _norm(vectors: Vectors) -> Tensor:
    # PyTorch's own norm is many times slower along a dimension that is not the last.
    return vectors.square().sum(1).sqrt()


def _largest(vectors: Vectors) -> Tensor:
    return vectors.abs().amax(1)


def _forward(
    arch: Architecture, weights: Sequence[Tensor], across: dict[int, Majorant], data: Data
) -> tuple[list[Majorant], list[Majorant], list[_Layer], Vectors, Tensor]:
    """By layer the inputs, all of them and those that meet trained rows; the rest; the logits."""
    whole, trained, layers = [], [], []
    z, entering = _augmented(data.x.mT), torch.zeros_like(data.x[..., 0])
    for layer, weight in enumerate(weights):
        whole.append(Majorant.vector(_norm(z), entering))
        trained.append(Majorant.vector(_norm(z[:, arch.rows[layer]]), entering))
        a = batched_matmul(weight.mT, z)
        rate = _norm(z)
        if layer:  # directions in its weights and in those below are orthogonal to each other
            rate = torch.hypot(rate, across[layer].operator * entering)
        if layer < len(arch.activations):
            value, slope, bend, twist = arch.activations[layer](a)
            layers.append(_Layer(slope, bend, twist, rate))
            z, entering = _augmented(value), layers[-1].steepest * rate
    return whole, trained, layers, a, rate


def _augmented(z: Vectors) -> Vectors:
    return torch.cat([z.new_ones(z.shape[0], 1, z.shape[2]), z], dim=1)


def _bound(
    arch: Architecture, weights: Sequence[Tensor], across: dict[int, Majorant], data: Data
) -> SampleBounds:
    whole, z, layers, logits, rate = _forward(arch, weights, across, data)
    last = len(layers)
    found = read_derivatives(arch.loss, logits.mT, data.y.to(logits.dtype))
    # Of fitted samples the squares would vanish before the numbers do.
    first, fitted = _unit((found.residual * data.scale).mT)
    outputs = logits.shape[1]
    one = torch.ones_like(rate)
    # U_l, of shape (networks, M_l, K, samples), and what is known of it.
    pulled = torch.eye(outputs, dtype=logits.dtype, device=logits.device)[None, :, :, None]
    U = {last: Majorant(one, math.sqrt(outputs) * one, 0 * one)}  # noqa: N806 - as in the formulas
    above: dict[int, tuple[Tensor, Tensor]] = {}
    for layer in range(last - 1, -1, -1):
        here, weight = layers[layer], weights[layer + 1][:, 1:]
        flat = pulled.expand(len(weight), -1, -1, logits.shape[2]).flatten(2)
        product = (weight @ flat).unflatten(2, (outputs, -1))  # V U
        pulled = here.slope.unsqueeze(2) * product
        rows = product.square().sum(2).sqrt()
        frobenius = _norm(pulled.flatten(1, 2))
        steep, weighed = here.steepest, across[layer + 1] @ U[layer + 1]
        U[layer] = Majorant(
            torch.minimum(frobenius, steep * weighed.operator),
            frobenius,
            _largest(here.bend * rows) * here.rate + steep * weighed.rate,
        )
        incoming = (product * first.unsqueeze(1)).sum(2)  # V g
        above[layer] = fitted * incoming, fitted.squeeze(1) * _norm(here.slope * incoming)
    # Of the logits two bounds on how fast they change.
    reach = torch.zeros_like(rate)
    for layer, entering in enumerate(whole):
        reach = torch.hypot(reach, entering.frobenius * U[layer].operator)
    rate = torch.minimum(rate, reach)
    r, Q = _at_logits(arch, found, data, rate)  # noqa: N806
    g, c = {last: r}, {}
    for layer in range(last - 1, -1, -1):
        here, (incoming, norm) = layers[layer], above[layer]
        if arch.matrix == "ggn":
            incoming, norm = torch.zeros_like(incoming), torch.zeros_like(norm)
        into = (across[layer + 1] @ g[layer + 1]).rate
        bent = here.bend * incoming
        g[layer] = Majorant.vector(norm, _largest(bent) * here.rate + here.steepest * into)
        turning = _largest(here.twist * incoming) * here.rate + _largest(here.bend) * into
        c[layer] = Majorant(_largest(bent), _norm(bent), turning)
    return _add_up(arch, z, across, layers, U, Q, g, c)


def _add_up(  # noqa: PLR0917 - what a sample's Hessian is made of
    arch: Architecture,
    z: Sequence[Majorant],
    across: dict[int, Majorant],
    layers: Sequence[_Layer],
    U: dict[int, Majorant],  # noqa: N803
    Q: Majorant,  # noqa: N803
    g: dict[int, Majorant],
    c: dict[int, Majorant],
) -> SampleBounds:
    """All blocks of trained layers, and the traces of those on the diagonal."""
    last = len(layers)
    J, D = _passages(across, layers)  # noqa: N806
    zero = torch.zeros_like(Q.rate)
    trace, norm, slope = Majorant.vector(zero, zero), zero, zero
    trained = [layer for layer in range(last + 1) if arch.trains(layer)]
    for low in trained:
        own = z[low].inner(z[low])
        trace += own.kron((U[low] @ Q).inner(U[low]))
        for k in range(low, last):
            trace += own.kron((J[low, k] @ c[k]).inner(J[low, k]))
        for high in trained:
            if high < low:
                continue
            B = U[low] @ Q @ U[high]  # noqa: N806
            for k in range(high, last):
                B += J[low, k] @ c[k] @ J[high, k]  # noqa: N806
            block = z[low].kron(z[high]).kron(B)
            if low < high and arch.trains_beyond_bias(high):
                block += z[low].kron(D[low, high - 1]).kron(g[high])
            twice = 1 if low == high else math.sqrt(2)
            norm = torch.hypot(norm, twice * block.frobenius)
            slope = torch.hypot(slope, twice * block.rate)
    return SampleBounds(trace.frobenius, norm, trace.rate, slope)


def _passages(
    across: dict[int, Majorant], layers: Sequence[_Layer]
) -> tuple[dict[tuple[int, int], Majorant], dict[tuple[int, int], Majorant]]:
    """``J`` and ``D`` from each hidden layer to each that is not below it."""
    J: dict[tuple[int, int], Majorant] = {}  # noqa: N806
    D: dict[tuple[int, int], Majorant] = {}  # noqa: N806
    for low, here in enumerate(layers):
        one = torch.ones_like(here.rate)
        J[low, low] = Majorant(one, math.sqrt(here.slope.shape[1]) * one, 0 * one)
        D[low, low] = here.slopes
        for high in range(low + 1, len(layers)):
            J[low, high] = D[low, high - 1] @ across[high]
            D[low, high] = J[low, high] @ layers[high].slopes
    return J, D


def _unit(vectors: Vectors) -> tuple[Vectors, Tensor]:
    """Vectors of largest entry 1, and what they are to be multiplied with."""
    largest = vectors.abs().amax(1, keepdim=True)
    return torch.where(largest == 0, 0, vectors / largest), largest


def _safe_norm(values: Tensor) -> Tensor:
    """The norm over ``K`` entries, last but for the samples before them, without underflow."""
    unit, largest = _unit(values.mT)
    return largest.squeeze(1) * _norm(unit)


def _at_logits(
    arch: Architecture, found: Separable | Coupled, data: Data, rate: Tensor
) -> tuple[Majorant, Majorant]:
    """``r`` and ``Q``, as far as the matrix is made of them."""
    scale = data.scale
    if isinstance(found, Separable):
        curvature, third = (each * scale for each in (found.curvature, found.third))
        largest, frobenius = curvature.abs().amax(-1), _safe_norm(curvature)
        turning = third.abs().amax(-1)
    else:
        factor = scale.abs().amax(-1) if isinstance(scale, Tensor) else abs(scale)
        frobenius = _safe_norm(found.curvature.flatten(-2))
        # Of a symmetric matrix no eigenvalue is above the largest sum of a row's magnitudes.
        largest = torch.minimum(frobenius, found.curvature.abs().sum(-1).amax(-1))
        turning = _third(arch.loss, found, largest)
        largest, frobenius, turning = (each * factor for each in (largest, frobenius, turning))
    residual = _safe_norm(found.residual * scale)
    r = Majorant.vector(residual, largest * rate)
    Q = Majorant(largest, frobenius, turning * rate)  # noqa: N806
    zero = Majorant.vector(0 * rate, 0 * rate)
    return (zero if arch.matrix == "ggn" else r), (zero if arch.matrix == "residual" else Q)


def _third(loss: Loss, found: Coupled, largest: Tensor) -> Tensor:
    r"""A bound on how fast ``Q`` changes, in Frobenius norm, with the logits.

    For the softmax, with :math:`\dot p = Q v` and :math:`Q = \mathrm{diag}(p) - p p^T`, it is that
    of :math:`\mathrm{diag}(\dot p) - \dot p p^T - p \dot p^T`, whose square
    :math:`\|\dot p\|^2 (1 + 2 \|p\|^2) + 2 (p^T \dot p)^2 - 4 \sum_j p_j \dot p_j^2` is at most 5
    times that of :math:`\|Q\|`. For any other loss all third derivatives are asked for, one
    symmetric matrix after another.
    """
    if loss is LOSSES["ce"]:
        return math.sqrt(5) * largest
    outputs = found.curvature.shape[-1]
    squares = torch.zeros_like(found.residual[..., 0])
    for row, column in (*combinations(range(outputs), 2), *((k, k) for k in range(outputs))):
        one = torch.zeros_like(found.curvature)
        one[..., row, column] = one[..., column, row] = 1 if row == column else math.sqrt(0.5)
        squares = squares + found.third(one).square().sum(-1)
    return squares.sqrt()

r"""``Tr H`` alone and its gradient, without any block of ``H``.

    Tr H = sum_i sum_l m_l Tr B_ll        m_l = |z~_l|^2 over trained rows
    B_ll = E_l B_l+1,l+1 E_l^T + diag(c_l)
    E_l = diag(phi'_l) V_l+1              c_l = phi''_l o V_l+1 g_l+1

with ``B`` of the logits their curvature ``Q``. Read from below, the same sum is
:math:`\langle S_L, Q \rangle + \sum_l c_l \cdot \mathrm{diag}(S_l)` of

    S_l+1 = m_l+1 I + E_l^T S_l E_l,      starting with m I at the lowest trained layer,

so that :math:`2 S_l E_l B_{l+1,l+1}` is the derivative in ``E_l``, ``diag(S_l)`` that in ``c_l``
and ``S_L`` that in ``Q``. Neither ``B`` nor ``S`` has to be formed where the rank is small: without
bends :math:`B_{ll} = J_l Q J_l^T` with the derivative ``J_l`` of the ``K`` logits, and all that the
gradient needs of ``S_l`` is :math:`A_l = S_l J_l`. That takes ``n K M_l M_l+1`` multiply-adds a
layer, and for one hidden layer ``n K M``. A bend is a matrix of full rank below the layer next to
it: two trained hidden layers get by with squared weights, and for more of smooth units whole ``B``
and ``S`` are carried along, ``n M_l M_l+1 (M_l + M_l+1)`` a layer.

The forward pass leaves the logits and the units too, so that a loss and its trace need one of it
together, and one product for both gradients in each layer's weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lowland.activations import Activation
from lowland.exact.logits import LogitCurvature, Matrices, Vectors, add_product, at_logits
from lowland.exact.terms import Architecture, Data, batched_matmul

PerNetwork = Float[Tensor, "*networks"]

# A layer's V^T, (networks, outputs, inputs), and its biases, (networks, outputs, 1), if it has any.
# Of a single network all tensors here come without that first dimension, which products of
# matrices are the slower with.
Layer = tuple[Tensor, Tensor | None]


def split(weight: Tensor) -> Layer:
    """A layer from weights with the biases in row 0."""
    return weight[:, 1:].mT, weight[:, :1].mT


def joined(layer: Layer) -> Tensor:
    """Weights with the biases in row 0: the inverse of :func:`split`."""
    matrix, bias = layer
    assert bias is not None  # noqa: S101 - as split gives it
    return torch.cat([bias, matrix], 2).mT


@dataclass
class _Units:
    """What a forward pass leaves, by layer: ``z``, and of all but the last what ``phi`` gives.

    Bends are None where there is none anywhere, and the curves' own below where none matters.
    """

    z: list[Vectors]
    slope: list[Vectors]
    bend: list[Tensor | None]
    twist: list[Tensor | None]
    outgoing: list[Tensor]  # V_l+1, (networks, M_l, M_l+1)
    zero_or_one: list[bool] = field(default_factory=list)  # whether all slopes are
    c: list[Tensor | None] = field(default_factory=list)

    def squared(self, layer: int) -> Vectors:
        """The squares of the slopes."""
        slope = self.slope[layer]
        return slope if self.zero_or_one[layer] else slope.square()

    def rows(self, layer: int) -> Tensor:
        """The slopes, as what multiplies the rows of matrices."""
        return self.slope[layer].unsqueeze(-2)


@dataclass
class _Adjoints:
    """Derivatives of the weighed trace, by layer: in slopes, in bends, in ``V``, and in ``Q``.

    Of what the trace is quadratic in half of them: a factor is free where they are added to others.
    """

    half_slope: dict[int, Tensor] = field(default_factory=dict)
    bend: dict[int, Tensor] = field(default_factory=dict)
    half_matrix: dict[int, Tensor] = field(default_factory=dict)
    diagonal: dict[int, Tensor] = field(default_factory=dict)  # of S_l, the derivative in c_l
    size: dict[int, Tensor] = field(default_factory=dict)  # in m_l
    inner: Any = None  # the part of S_L from below, as the loss takes it


class _Alone:
    """The one hidden layer below the logits, without a number for each unit and logit.

    Args:
        units: What the forward pass has left.
        loss: None for a matrix without ``Q``.
        layers: Those below the logits, from the lowest that is trained.
    """

    def __init__(self, units: _Units, loss: LogitCurvature | None, layers: range) -> None:
        self.units, self.loss, (self.layer,) = units, loss, layers
        c = units.c[self.layer]
        self.slopes = units.squared(self.layer)
        self.traces: dict[int, Vectors] = {}
        total = None
        if loss is not None:
            self.squares = loss.squares(units.outgoing[self.layer])
            total = self.slopes * self.squares
        if c is not None:
            total = _add(total, c)
        if total is not None:
            self.traces[self.layer] = total.sum(-2, keepdim=True)

    def rise(self, size: dict[int, Tensor], into: _Adjoints) -> None:
        """The adjoints, from the squared lengths ``m``."""
        units, layer, m = self.units, self.layer, size[self.layer]
        into.diagonal[layer] = m
        if self.loss is None:
            return
        if units.bend[layer] is not None:
            into.half_slope[layer] = m * units.slope[layer] * self.squares
        outgoing = units.outgoing[layer]
        half, into.inner = self.loss.weigh(outgoing, m * self.slopes)
        into.half_matrix[layer + 1] = half


class _InFactors:
    """``B = J Q J^T``, and next to a bend what that adds to the diagonal.

    The arguments are those of :class:`_Alone`, of none or several layers with bends in the two
    lowest at most.
    """

    def __init__(self, units: _Units, loss: LogitCurvature | None, layers: range) -> None:
        self.units, self.loss, self.layers = units, loss, layers
        # By layer P = V J; and above the lowest J = diag(phi') P.
        self.pulled: dict[int, Matrices] = {}
        self.jacobian: dict[int, Matrices] = {}
        self.near: dict[int, Vectors] = {}  # (V o V) c of the layer above
        self.traces: dict[int, Vectors] = {}
        for layer in reversed(layers):
            outgoing, c, total = units.outgoing[layer], units.c[layer], None
            if loss is not None:
                if layer == layers[-1]:
                    pulled = loss.columns(outgoing)
                else:
                    pulled = _product(outgoing, self.jacobian[layer + 1])
                self.pulled[layer] = pulled
                if layer > layers[0]:
                    self.jacobian[layer] = units.rows(layer) * pulled
                total = self.squares = loss.quadratic(pulled)  # kept of the lowest
            if layer < layers[-1] and (above := units.c[layer + 1]) is not None:
                self.near[layer] = outgoing.square() @ above
                total = _add(total, self.near[layer])
            if total is not None:
                total = units.squared(layer) * total
            if c is not None:
                total = _add(total, c)
            if total is not None:
                self.traces[layer] = total.sum(-2, keepdim=True)

    def rise(self, size: dict[int, Tensor], into: _Adjoints) -> None:
        """Go up with ``A = S J``, from the squared lengths ``m``."""
        units, last = self.units, self.layers[-1] if self.layers else -1
        carried: Matrices | None = None  # E^T A of the layer below
        diagonal: Tensor | None = None  # what the layer below adds to that of S, next to a bend
        for layer in self.layers:
            slope, rows, outgoing = units.slope[layer], units.rows(layer), units.outgoing[layer]
            curves, m = units.bend[layer] is not None, size[layer]
            into.diagonal[layer] = m if diagonal is None else m + diagonal
            if self.loss is not None:
                pulled, own = self.pulled[layer], m * slope
                if carried is None:  # the lowest layer, where A = m J
                    if curves:
                        into.half_slope[layer] = own * self.squares
                    scaled = (own * slope).unsqueeze(-2) * pulled
                else:
                    product = torch.addcmul(carried, own.unsqueeze(-2), pulled)
                    scaled = rows * product
                    if curves:
                        weighed = self.loss.times(product)
                        into.half_slope[layer] = (weighed * pulled).sum(-2)
                if layer == last:
                    weighed = self.loss.times(scaled)
                    into.half_matrix[layer + 1] = self.loss.in_outgoing(weighed)
                    into.inner = self.loss.between(pulled, scaled)
                else:
                    above = self.loss.times(self.jacobian[layer + 1])
                    into.half_matrix[layer + 1] = _gram(scaled, above)
                    carried = _product(outgoing.mT, scaled)
            if layer == last:
                break
            diagonal = None
            if units.c[layer + 1] is not None:
                diagonal = self._rise_beside_a_bend(layer, m, into)

    def _rise_beside_a_bend(self, layer: int, m: Tensor, into: _Adjoints) -> Tensor:
        """Of ``E_l diag(c_l+1) E_l^T``, where ``S_l`` is ``m_l I``; and ``diag(E_l^T S_l E_l)``."""
        units, outgoing, slope = self.units, self.units.outgoing[layer], self.units.slope[layer]
        squares, above = slope.square() * m, units.c[layer + 1]
        assert above is not None  # noqa: S101 - which is why it is called
        if units.bend[layer] is not None:
            more = m * slope * self.near[layer]
            into.half_slope[layer] = _add(into.half_slope.get(layer), more)
        more = outgoing * _matmul(squares, above.mT)
        into.half_matrix[layer + 1] = _add(into.half_matrix.get(layer + 1), more)
        return outgoing.square().mT @ squares


class _InFull:
    """``B`` of whole matrices: the arguments are those of :class:`_Alone`, with any bends."""

    def __init__(self, units: _Units, loss: LogitCurvature | None, layers: range) -> None:
        self.units, self.loss, self.layers = units, loss, layers
        self.whole: dict[int, Matrices] = {}  # B
        self.across: dict[int, Matrices] = {}  # V B V^T of the layer above
        self.traces: dict[int, Vectors] = {}
        last = layers[-1]
        for layer in reversed(layers):
            outgoing, c, rows = units.outgoing[layer], units.c[layer], units.rows(layer)
            if layer < last:
                half = _product(outgoing, self.whole[layer + 1])
                across = self.across[layer] = _product(outgoing, half.transpose(-3, -2))
                matrices = rows * across * rows.transpose(-3, -2)
            elif loss is not None:
                self.pulled = loss.columns(outgoing)
                left = rows * self.pulled
                matrices = _by_sample(left, loss.times(left).transpose(-3, -2))
            else:
                matrices = torch.zeros_like(rows * rows.transpose(-3, -2))
            if c is not None:
                matrices.diagonal(dim1=-3, dim2=-2).add_(c.mT)
            self.whole[layer] = matrices
            self.traces[layer] = matrices.diagonal(dim1=-3, dim2=-2).sum(-1).unsqueeze(-2)

    def rise(self, size: dict[int, Tensor], into: _Adjoints) -> None:
        """Go up with ``S``, from the squared lengths ``m``."""
        units, last = self.units, self.layers[-1]
        lowest = self.layers[0]
        matrices = torch.diag_embed(size[lowest].expand_as(units.slope[lowest]).mT)
        matrices = matrices.movedim(-3, -1)
        for layer in self.layers:
            rows, outgoing = units.rows(layer), units.outgoing[layer]
            curves = units.bend[layer] is not None
            into.diagonal[layer] = matrices.diagonal(dim1=-3, dim2=-2).mT
            if layer == last:
                break
            scaled = matrices * rows.transpose(-3, -2)  # S diag(phi')
            if curves:
                into.half_slope[layer] = (scaled * self.across[layer]).sum(-2)
            # V^T diag(phi') S diag(phi')
            half = _product(outgoing.mT, rows * scaled)
            into.half_matrix[layer + 1] = _gram(half.transpose(-3, -2), self.whole[layer + 1])
            matrices = _product(outgoing.mT, half.transpose(-3, -2))
            matrices.diagonal(dim1=-3, dim2=-2).add_(size[layer + 1].mT)
        if self.loss is None:
            return
        jacobian = units.rows(last) * self.pulled
        product = _by_sample(matrices, jacobian)
        weighed = self.loss.times(product)
        if units.bend[last] is not None:
            into.half_slope[last] = (weighed * self.pulled).sum(-2)
        into.half_matrix[last + 1] = self.loss.in_outgoing(units.rows(last) * weighed)
        into.inner = self.loss.between(jacobian, product)


def bends_in_full(arch: Architecture) -> bool:
    """Whether whole ``B`` are needed: for a bend two layers or more above a trained one."""
    far = arch.activations[arch.lowest + 2 :]
    return arch.matrix != "ggn" and any(each.negative_slope is None for each in far)


@torch.no_grad()
def trace(
    arch: Architecture, weights: Sequence[Tensor], data: Data, *, gradient: bool
) -> tuple[PerNetwork, Sequence[Tensor | None]]:
    """These samples' share of ``Tr H``, and its gradient in each layer's weights if wanted.

    In those that are not trained, too. That in the data comes last, if these vary.
    """
    passed = TracePass(arch, [split(weight) for weight in weights], data)
    if not gradient:
        return passed.trace, []
    parts, inputs = passed.gradient(torch.ones_like(passed.trace), everywhere=True)
    found = [None if part is None else joined(part) for part in parts]
    return passed.trace, [*found, inputs.mT] if data.inputs_vary and inputs is not None else found


class TracePass:
    """A pass through some networks: their logits, ``Tr H``, and what its gradient is made of.

    Args:
        arch: What the networks share.
        layers: Their weights.
        data: The samples.

    Attributes:
        logits: ``(networks, samples, K)``. What is made of them here does not hold them.
        trace: These samples' share of ``Tr H``, ``(networks,)``.
    """

    def __init__(self, arch: Architecture, layers: Sequence[Layer], data: Data) -> None:
        self.arch, self.layers = arch, layers
        self.top, self.lowest = len(layers) - 1, arch.lowest
        if layers[0][0].ndim == 2:
            data = data.of_the_one_network()
        self.units = units = _Units([data.x.mT], [], [], [], [v.mT for v, _ in layers[1:]])
        for activation, layer in zip(arch.activations, layers[:-1], strict=True):
            value, slope, bend, twist = _activate(activation, _affine(layer, units.z[-1]))
            units.z.append(value)
            units.slope.append(slope)
            units.bend.append(bend)
            units.twist.append(twist)
            units.zero_or_one.append(activation.negative_slope == 0)
        self.logits = _logits(layers[-1], units.z[-1])
        self.loss = at_logits(arch.loss, self.logits.mT, data)
        self._bend_down()
        between = range(self.lowest, self.top)
        far = bends_in_full(arch)
        curvature = None if arch.matrix == "residual" else self.loss
        kind = _InFull if far else _Alone if len(between) == 1 else _InFactors
        self.curves = kind(units, curvature, between)
        self.traces = dict(self.curves.traces)
        if curvature is not None:
            self.traces[self.top] = curvature.trace()
        self.sizes = {layer: self._size(layer) for layer in range(self.lowest, self.top + 1)}
        shares = [(self.sizes[layer] * trace).sum((-2, -1)) for layer, trace in self.traces.items()]
        total = shares[0] if shares else self.logits.new_zeros(self.logits.shape[:-2])
        for share in shares[1:]:
            total = total + share
        self.trace: PerNetwork = total

    def hand_out(self) -> tuple[Tensor, PerNetwork]:
        """The logits and the trace, which the pass no longer holds.

        As outputs of a function that holds the pass they would be in a circle with it, until these
        are collected.
        """
        logits, trace = self.logits, self.trace
        del self.logits, self.trace
        return logits, trace

    def _size(self, layer: int) -> Vectors:
        """``m_l``."""
        z, arch = self.units.z[layer], self.arch
        bias = float(arch.rows[layer].start == 0 and arch.trains(layer))
        if not arch.trains_beyond_bias(layer):
            return z.new_full((1, z.shape[-1]), bias)
        if layer:
            return z.square().sum(-2, keepdim=True).add_(bias)
        # No temporary of all inputs, as their squares would be. Across rows it takes far longer.
        length: Tensor = torch.linalg.vector_norm(z, dim=-2, keepdim=True)
        return length.square_().add_(bias)

    def _bend_down(self) -> None:
        """``c_l``, and ``beta_l = V_l+1 g_l+1`` of which it is made, down to the lowest bend."""
        units, top = self.units, self.top
        units.c = [None] * top
        self.g: dict[int, Vectors] = {}
        self.beta: dict[int, Vectors] = {}
        curved = [layer for layer in range(self.lowest, top) if units.bend[layer] is not None]
        if not curved or self.arch.matrix == "ggn":
            return
        self.g[top] = self.loss.residual()
        for layer in range(top - 1, curved[0] - 1, -1):
            beta = self.beta[layer] = units.outgoing[layer] @ self.g[layer + 1]
            self.g[layer] = units.slope[layer] * beta
            bend = units.bend[layer]
            units.c[layer] = None if bend is None else bend * beta

    def gradient(
        self,
        weight: PerNetwork | None,
        logits: Vectors | None = None,
        *,
        everywhere: bool = False,
    ) -> tuple[list[Layer | None], Vectors | None]:
        """The gradient of ``weight Tr H``, and of ``<logits, the logits>`` beside it.

        Args:
            weight: One for each network. Without it, this is the backward pass of the logits.
            logits: An adjoint of the logits, samples last.
            everywhere: Whether that in layers below all that are trained, and in the data, is
                wanted, too; else it is None.

        Returns:
            For each layer, and that in the data.
        """
        units, adjoints, a = self.units, _Adjoints(), logits
        if weight is not None:
            a = self._rise(weight, adjoints, everywhere=everywhere)
            a = a if logits is None else a.add_(logits)
        assert a is not None  # noqa: S101 - there is something to differentiate
        result: list[Layer | None] = [None] * (self.top + 1)
        for layer in range(self.top, -1, -1):
            (matrix, bias), z = self.layers[layer], units.z[layer]
            if layer in adjoints.half_matrix:
                part = _add_outer(adjoints.half_matrix[layer].mT, a, z)
            else:
                part = _matmul(a, z.mT)
            result[layer] = part, None if bias is None else a.sum(-1, keepdim=True)
            if layer == self.lowest and not everywhere:
                break
            below = matrix.mT @ a
            if layer in adjoints.size:
                below.addcmul_(adjoints.size[layer], z, value=2)
            if layer == 0:
                return result, below
            a = below.mul_(units.slope[layer - 1])
            bend, twist = units.bend[layer - 1], units.twist[layer - 1]
            if bend is not None and layer - 1 in adjoints.half_slope:
                a.addcmul_(adjoints.half_slope[layer - 1], bend, value=2)
            if twist is not None and layer - 1 in adjoints.bend:
                a.addcmul_(adjoints.bend[layer - 1], twist)
        return result, None

    def _rise(self, weight: PerNetwork, adjoints: _Adjoints, *, everywhere: bool) -> Vectors:
        """The adjoint of the logits from that of the trace, and all others on the way."""
        weight = weight[..., None, None]
        sizes = {layer: weight * size for layer, size in self.sizes.items()}
        self.curves.rise(sizes, adjoints)
        for layer, trace in self.traces.items():
            # The units that come into the lowest layer are no function of what is trained.
            if self.arch.trains_beyond_bias(layer) and (everywhere or layer > self.lowest):
                adjoints.size[layer] = weight * trace
        alone = sizes[self.top]
        if self.arch.matrix == "residual":
            alone = torch.zeros_like(alone)
        return self.loss.chain(self._bend_up(adjoints), alone, adjoints.inner)

    def _bend_up(self, adjoints: _Adjoints) -> Vectors | None:
        """The adjoint of ``r``, and on the way to it those of slopes, bends and weights."""
        units, in_g = self.units, None
        for layer in sorted(self.beta):
            beta, bend = self.beta[layer], units.bend[layer]
            in_beta = None if in_g is None else units.slope[layer] * in_g
            if bend is not None:
                in_c = adjoints.diagonal[layer]
                adjoints.bend[layer] = in_c * beta
                in_beta = _add(in_beta, in_c * bend)
                if in_g is not None:
                    more = beta * in_g
                    adjoints.half_slope[layer] = _add_half(adjoints.half_slope.get(layer), more)
            assert in_beta is not None  # noqa: S101 - the lowest has a bend
            in_g = units.outgoing[layer].mT @ in_beta
            more = in_beta @ self.g[layer + 1].mT
            adjoints.half_matrix[layer + 1] = _add_half(adjoints.half_matrix.get(layer + 1), more)
        return in_g


def _activate(
    activation: Activation, a: Vectors
) -> tuple[Vectors, Vectors, Tensor | None, Tensor | None]:
    """An activation and its derivatives, without the zeros of straight pieces."""
    below = activation.negative_slope
    if below is None:
        return activation(a)
    if below == 0:
        value = a.relu()
        return value, value.sign(), None, None
    # Far faster than a comparison, whose result is of another type.
    slope = a.sign().clamp_min_(0)
    slope = torch.where(slope == 0, below, slope) if below != 1 else torch.ones_like(slope)
    return a * slope, slope, None, None


def _affine(layer: Layer, z: Vectors) -> Vectors:
    matrix, bias = layer
    if bias is not None and z.ndim == 2:
        return torch.addmm(bias, matrix, z)
    a = _matmul(matrix, z)
    return a if bias is None else a.add_(bias)


def _logits(layer: Layer, z: Vectors) -> Tensor:
    """The last layer's, sample after sample, as a criterion takes them."""
    matrix, bias = layer
    return _affine((z.mT, None if bias is None else bias.mT), matrix.mT)


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    return left @ right if left.ndim == 2 else batched_matmul(left, right)


def _add_outer(total: Tensor, a: Vectors, z: Vectors) -> Tensor:
    """``2 total + a @ z^T``, where ``z`` may be shared by all networks."""
    if a.shape[:-2] == z.shape[:-2]:
        return add_product(total, a, z.mT, beta=2)
    return torch.add(batched_matmul(a, z.mT), total, alpha=2)


def _add(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total + more


def _add_half(total: Tensor | None, more: Tensor) -> Tensor:
    return 0.5 * more if total is None else torch.add(total, more, alpha=0.5)


def _product(left: Tensor, right: Matrices) -> Matrices:
    """``left @ right`` of each sample, with one ``left`` for all."""
    return (left @ right.flatten(-2)).view(*left.shape[:-1], *right.shape[-2:])


def _by_sample(left: Matrices, right: Matrices) -> Matrices:
    """``left @ right`` of each sample."""
    return (left.movedim(-1, -3) @ right.movedim(-1, -3)).movedim(-3, -1)


def _gram(left: Matrices, right: Matrices) -> Tensor:
    """``left @ right^T`` of each sample, summed."""
    return left.flatten(-2) @ right.flatten(-2).mT

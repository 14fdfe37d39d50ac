r"""Per-sample terms of a three-layer network, and the reverse pass through them.

With the augmented input :math:`\tilde x = [1; x]`, hidden units :math:`z = \phi(a)`,
:math:`a = W^T \tilde x`, and the logit :math:`s = v^T [1; z]`, one sample's Hessian blocks are

    WW:  (x~ x~^T) (x) (q u u^T + r diag(c))      u = v' phi'(a),  c = v' phi''(a)
    Wv:  x~ (x) (q u z~^T + r [0 | diag(phi')])    r, q, t: derivatives 1 to 3 of the loss in s
    vv:  q z~ z~^T

Everything is laid out features first, samples last: a row is one quantity over consecutive
samples, so that the scalars of a sample broadcast along contiguous memory.

Source: arXiv:2606.28662, section IV.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lowland.activations import Activation
from lowland.losses import Loss

Rows = Float[Tensor, "#networks _ samples"]
PerNetwork = Float[Tensor, "networks 1 1"]

# What is wanted of a network: both traces, Tr H alone, or only the loss's own gradient.
Quantity = Literal["moments", "trace", "loss"]


@dataclass(frozen=True)
class Data:
    """Samples as the caller holds them; a leading dimension of 1 is shared by all networks.

    Attributes:
        x: Shape ``(1 | networks, samples, inputs)``.
        y: Shape ``(1 | networks, samples)``.
        scale: Weight of each sample in the loss: ``1 / samples`` for a mean, 1 for a sum, or a
            tensor of ``y``'s shape.
    """

    x: Tensor
    y: Tensor
    scale: float | Tensor

    @property
    def samples(self) -> int:
        """The number of samples."""
        return self.x.shape[-2]

    def of_networks(self, networks: slice) -> Data:
        """The data of some networks of an ensemble."""

        def pick(tensor: Tensor) -> Tensor:
            return tensor if tensor.shape[0] == 1 else tensor[networks]

        scale = pick(self.scale) if isinstance(self.scale, Tensor) else self.scale
        return Data(pick(self.x), pick(self.y), scale)

    def rows(self, samples: slice) -> tuple[Tensor, Tensor, float | Tensor]:
        """Some samples as rows: ``[1; x]``, the targets and the weights.

        They are laid out anew for each run of samples, so that no copy grows with the data.
        """
        x = self.x[:, samples].mT
        inputs = torch.cat([x.new_ones(x.shape[0], 1, x.shape[2]), x], dim=1)
        scale = self.scale
        if isinstance(scale, Tensor):
            scale = scale[:, samples].unsqueeze(1)
        return inputs, self.y[:, samples].unsqueeze(1).to(x.dtype), scale


@dataclass(frozen=True)
class Architecture:
    """What stays fixed while weights and data vary.

    Attributes:
        activation: Of the hidden layer.
        loss: Of the logit.
        input_rows: The rows of ``W`` that are trained; row 0 holds the biases.
        output_rows: The rows of ``v`` that are trained; row 0 holds the bias.

    The Hessian is that of the trained rows alone.
    """

    activation: Activation
    loss: Loss
    input_rows: slice
    output_rows: slice

    @property
    def trains_output_weights(self) -> bool:
        """Whether ``v`` is trained beyond its bias."""
        return bool(self.output_rows.stop > 1)


@dataclass(frozen=True)
class Terms:
    """The factors of the Hessian blocks for a run of samples (symbols in the module's docstring).

    ``x`` and ``z`` hold the trained rows of the augmented inputs and hidden units. Residual,
    curvature and third derivative carry the samples' weights.
    """

    inputs: Rows
    hidden: Rows
    x: Rows
    z: Rows
    slope: Rows
    bend: Rows
    twist: Rows
    u: Rows
    c: Rows
    residual: Rows
    curvature: Rows
    third: Rows


@dataclass(frozen=True)
class Adjoint:
    r"""Derivatives of a scalar :math:`\langle C, H\rangle` in the factors of each sample's blocks.

    Attributes:
        u: Derivative in ``u`` of the part that is quadratic in ``(u, z~)``, per unit of ``q``.
        z: The same in the trained rows of ``z~``.
        rc: Derivative in ``r c``.
        rslope: Derivative in ``r phi'``, or None where it has no part.
    """

    u: Rows
    z: Rows
    rc: Tensor
    rslope: Tensor | None

    def __add__(self, other: Adjoint) -> Adjoint:
        rslope = self.rslope
        if rslope is not None and other.rslope is not None:
            rslope = rslope + other.rslope
        return Adjoint(self.u + other.u, self.z + other.z, self.rc + other.rc, rslope)


def compute_terms(
    arch: Architecture,
    weight: Float[Tensor, "networks inputs1 hidden"],
    output: Float[Tensor, "networks hidden1"],
    data: Data,
    samples: slice,
) -> Terms:
    """Run some samples through the networks and collect the factors of their Hessian blocks."""
    inputs, targets, scale = data.rows(samples)
    value, slope, bend, twist = arch.activation(batched_matmul(weight.mT, inputs))
    networks, _, count = value.shape
    hidden = torch.cat([value.new_ones(networks, 1, count), value], dim=1)
    residual, curvature, third = arch.loss.derivatives(output.unsqueeze(1) @ hidden, targets)
    gain = output[:, 1:, None]
    return Terms(
        inputs=inputs,
        hidden=hidden,
        x=inputs[:, arch.input_rows],
        z=hidden[:, arch.output_rows],
        slope=slope,
        bend=bend,
        twist=twist,
        u=gain * slope,
        c=gain * bend,
        residual=residual * scale,
        curvature=curvature * scale,
        third=third * scale,
    )


def trace(terms: Terms) -> Float[Tensor, " networks"]:
    r"""These samples' share of ``Tr H``: ``|x~|^2 (q |u|^2 + r sum(c)) + q |z~|^2``."""
    x_sq = terms.x.square().sum(1, keepdim=True)
    ww = terms.curvature * terms.u.square().sum(1, keepdim=True)
    ww = ww + terms.residual * terms.c.sum(1, keepdim=True)
    vv = terms.curvature * terms.z.square().sum(1, keepdim=True)
    return (x_sq * ww + vv).sum((1, 2))


def trace_adjoint(
    terms: Terms,
    weight: PerNetwork,
    square: Adjoint | None = None,
    square_weight: PerNetwork | None = None,
) -> Adjoint:
    """The adjoint of ``weight * Tr H``, plus ``square_weight`` times another one."""
    x_sq = weight * terms.x.square().sum(1, keepdim=True)
    in_u, in_z = 2 * x_sq * terms.u, 2 * weight * terms.z
    if square is None or square_weight is None:
        return Adjoint(in_u, in_z, x_sq, None)
    return Adjoint(
        in_u.addcmul_(square_weight, square.u),
        in_z.addcmul_(square_weight, square.z),
        torch.addcmul(x_sq, square_weight, square.rc),
        None if square.rslope is None else square_weight * square.rslope,
    )


def sensitivities(
    arch: Architecture, output: Float[Tensor, "networks hidden1"], terms: Terms, adjoint: Adjoint
) -> tuple[Rows, Rows]:
    """Each sample's derivatives in the pre-activations and in the output weights.

    This is the reverse pass of math.md, section 2: the factors' adjoints chain through the loss
    into the logit, and through the activation into ``a``.

    Returns:
        The derivatives in ``a``, ``(networks, hidden, samples)``, and in ``v``,
        ``(networks, hidden + 1, samples)``.
    """
    gain = output[:, 1:, None]
    q, r = terms.curvature, terms.residual
    # The quadratic part is homogeneous of degree two in (u, z~), so Euler's theorem gives its
    # derivative in q without a division by q, which may have underflowed.
    unit_q = (terms.u * adjoint.u).sum(1, keepdim=True) + (terms.z * adjoint.z).sum(1, keepdim=True)
    unit_r = (terms.c * adjoint.rc).sum(1, keepdim=True)
    in_u, in_c = q * adjoint.u, r * adjoint.rc
    in_slope = gain * in_u
    if adjoint.rslope is not None:
        unit_r = unit_r + (terms.slope * adjoint.rslope).sum(1, keepdim=True)
        in_slope = in_slope.addcmul_(r, adjoint.rslope)
    # unit_q and unit_r multiply dq/ds and dr/ds, which carry the sample's weight already.
    in_logit = 0.5 * unit_q * terms.third + unit_r * q
    in_value = gain * in_logit
    if arch.trains_output_weights:
        in_value = in_value.addcmul_(q, adjoint.z[:, -gain.shape[1] :])
    in_a = terms.slope * in_value
    in_a = in_a.addcmul_(terms.bend, in_slope).addcmul_(terms.twist, gain * in_c)
    in_output = terms.hidden * in_logit
    in_output[:, 1:].addcmul_(in_u, terms.slope).addcmul_(in_c, terms.bend)
    return in_a, in_output


def pull_back(
    arch: Architecture, output: Float[Tensor, "networks hidden1"], terms: Terms, adjoint: Adjoint
) -> tuple[Float[Tensor, "networks inputs1 hidden"], Float[Tensor, "networks hidden1"]]:
    """The gradient in ``W`` and ``v``, summed over the samples of ``terms``."""
    in_a, in_output = sensitivities(arch, output, terms, adjoint)
    return batched_matmul(in_a, terms.inputs.mT).mT, in_output.sum(-1)


def loss_gradient(
    output: Float[Tensor, "networks hidden1"], terms: Terms
) -> tuple[Float[Tensor, "networks inputs1 hidden"], Float[Tensor, "networks hidden1"]]:
    """The gradient of the loss itself in ``W`` and ``v``, summed over the samples of ``terms``."""
    in_a = output[:, 1:, None] * terms.slope * terms.residual
    in_output = (terms.hidden * terms.residual).sum(-1)
    return batched_matmul(in_a, terms.inputs.mT).mT, in_output


def batched_matmul(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` where ``right`` may be shared by all networks: then one flat product."""
    if right.shape[0] == 1:
        return torch.matmul(left, right.squeeze(0))
    return torch.matmul(left, right)

r"""Per-sample terms of a multilayer perceptron: everything that its Hessian is made of.

Layer ``l`` (from 0) maps :math:`\tilde z_l = [1; z_l]` to :math:`a_l = W_l^T \tilde z_l`, and
:math:`z_{l+1} = \phi_l(a_l)`; the last ``a`` are the logits. With a sample's loss :math:`\ell`,
:math:`g_l = \partial\ell / \partial a_l`, :math:`B_{lm}` its second derivative in shifts of
:math:`a_l` and :math:`a_m`, and :math:`D_{lm} = \partial z_{m+1} / \partial a_l`, the blocks are

    H[W_l (k,j), W_m (k',j')] = z~_lk ( z~_mk' B_lm[j,j'] + [l < m, k' > 0] D_l,m-1[j,k'] g_m[j'] )

and all three come from the layer above by one rule: multiply by the weights between, then by the
activation's slope. What is new in a layer is the diagonal that its own bend adds to ``B``.

Everything is laid out features first, samples last: a row is one quantity over consecutive
samples, so that blocks add up over samples by matrix products. What is computed here is made of
operations that autograd knows, so that the gradient needs no second set of formulas.

Source: arXiv:2606.28662, section IV, for three layers and one output; beyond, our derivation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function

from lowland.activations import Activation
from lowland.losses import Loss, logit_derivatives

Rows = Float[Tensor, "#networks _ samples"]
Matrices = Float[Tensor, "networks _ _ samples"]

# A factor and its layer or layers.
Name = tuple[str, int | tuple[int, int]]

# What is wanted of a network: both traces, Tr H alone, or only the loss's own gradient.
Quantity = Literal["moments", "trace", "loss"]


@dataclass(frozen=True)
class Data:
    """Samples as the caller holds them; a leading dimension of 1 is shared by all networks.

    Attributes:
        x: Shape ``(1 | networks, samples, inputs)``.
        y: Shape ``(1 | networks, samples, outputs)``; for classes a distribution.
        scale: Weight of each sample in the loss: ``1 / samples`` for a mean, 1 for a sum, or a
            tensor of shape ``(1 | networks, samples, 1 | outputs)``.
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

    def of_samples(self, samples: slice) -> Data:
        """Some of the samples."""
        scale = self.scale[:, samples] if isinstance(self.scale, Tensor) else self.scale
        return Data(self.x[:, samples], self.y[:, samples], scale)

    def one_by_one(self, networks: int) -> Data:
        """Each sample as the only one of a network of its own, network after network."""

        def split(tensor: Tensor) -> Tensor:
            return tensor.expand(networks, -1, -1).reshape(-1, 1, tensor.shape[2])

        scale = split(self.scale) if isinstance(self.scale, Tensor) else self.scale
        return Data(split(self.x), split(self.y), scale)


@dataclass(frozen=True)
class Architecture:
    """What stays fixed while weights and data vary.

    Attributes:
        activations: Of each layer but the last.
        loss: Of the logits.
        rows: The trained rows of each layer's weights; row 0 holds the biases. The Hessian is that
            of the trained rows alone.
    """

    activations: tuple[Activation, ...]
    loss: Loss
    rows: tuple[slice, ...]

    def trains(self, layer: int) -> bool:
        """Whether any row of a layer is trained."""
        return bool(self.rows[layer].stop > self.rows[layer].start)

    def trains_beyond_bias(self, layer: int) -> bool:
        """Whether the rows that multiply hidden units are."""
        return bool(self.rows[layer].stop > 1)

    def first_beyond_bias(self, layer: int) -> int:
        """The first trained row, counted from the first trained one, that multiplies a unit."""
        return 1 if self.rows[layer].start == 0 else 0

    @property
    def lowest(self) -> int:
        """The first layer with a trained row."""
        return next(layer for layer in range(len(self.rows)) if self.trains(layer))


@dataclass(frozen=True)
class Terms:
    r"""The factors of the Hessian's blocks for a run of samples (symbols as above).

    Attributes:
        z: The trained rows of each layer's augmented inputs.
        slope: :math:`\phi'_l(a_l)`.
        g: By layer; carries the samples' weights, as ``B`` does.
        B: By pair of layers ``l <= m``.
        D: By pair of layers ``l < m``; where ``l = m`` it is the diagonal matrix of slopes.
        gain: Where ``B_ll`` is not formed, the ``U`` of :math:`B_{ll} = U Q U^T + diag(c)` with
            the ``Q`` of the logits; ``B`` of this layer and the logits' is :math:`U Q`.
        bend: There, the ``c``.
    """

    z: list[Rows]
    slope: list[Rows]
    g: dict[int, Rows]
    B: dict[tuple[int, int], Matrices]
    D: dict[tuple[int, int], Matrices]
    gain: dict[int, Matrices] = field(default_factory=dict)
    bend: dict[int, Rows] = field(default_factory=dict)

    @property
    def named(self) -> dict[Name, Tensor]:
        """All of them but the data, which depend on no weights."""
        return {
            **{("z", layer): z for layer, z in enumerate(self.z) if layer},
            **{("slope", layer): slope for layer, slope in enumerate(self.slope)},
            **{("g", layer): g for layer, g in self.g.items()},
            **{("B", pair): matrices for pair, matrices in self.B.items()},
            **{("D", pair): matrices for pair, matrices in self.D.items()},
            **{("gain", layer): matrices for layer, matrices in self.gain.items()},
            **{("bend", layer): bend for layer, bend in self.bend.items()},
        }

    @property
    def samples(self) -> int:
        """How many there are."""
        return self.z[0].shape[-1]

    def of_samples(self, samples: slice) -> Terms:
        """Those of some samples."""
        return Terms(
            [z[..., samples] for z in self.z],
            [slope[..., samples] for slope in self.slope],
            {layer: g[..., samples] for layer, g in self.g.items()},
            {pair: matrices[..., samples] for pair, matrices in self.B.items()},
            {pair: matrices[..., samples] for pair, matrices in self.D.items()},
            {layer: matrices[..., samples] for layer, matrices in self.gain.items()},
            {layer: bend[..., samples] for layer, bend in self.bend.items()},
        )

    def like(self, named: Mapping[Name, Tensor]) -> Terms:
        """Other tensors in the places of :attr:`named`."""
        return Terms(
            [self.z[0], *(named["z", layer] for layer in range(1, len(self.z)))],
            [named["slope", layer] for layer in range(len(self.slope))],
            {layer: named["g", layer] for layer in self.g},
            {pair: named["B", pair] for pair in self.B},
            {pair: named["D", pair] for pair in self.D},
            {layer: named["gain", layer] for layer in self.gain},
            {layer: named["bend", layer] for layer in self.bend},
        )


class _Activate(Function):
    """An activation and its first two derivatives, which autograd can differentiate once more."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, activation: Activation) -> tuple[Tensor, Tensor, Tensor]:
        value, slope, bend, twist = activation(a)
        ctx.save_for_backward(slope, bend, twist)
        return value, slope, bend

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        slope, bend, twist = ctx.saved_tensors
        return (grads[0] * slope).addcmul_(grads[1], bend).addcmul_(grads[2], twist), None


class _AddDiagonal(Function):
    """Add to the diagonal of matrices that nobody else has seen, in their place."""

    @staticmethod
    def forward(ctx: Any, matrices: Matrices, diagonal: Rows) -> Matrices:
        matrices.diagonal(dim1=1, dim2=2).add_(diagonal.mT)
        ctx.mark_dirty(matrices)
        return matrices

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG004
        return grads[0], grads[0].diagonal(dim1=1, dim2=2).mT


@dataclass(frozen=True)
class ForwardPass:
    """Samples run through the networks: augmented inputs, logits, and the activations' derivatives.

    ``slope`` and ``bend`` have one entry fewer than there are layers.
    """

    inputs: list[Rows]
    logits: Rows
    slope: list[Rows]
    bend: list[Rows]


def forward(arch: Architecture, weights: Sequence[Tensor], data: Data) -> ForwardPass:
    """Run samples through the networks."""
    rows = data.x.mT
    inputs, slopes, bends = [_augment(rows)], [], []
    a = batched_matmul(weights[0].mT, inputs[0])
    for activation, weight in zip(arch.activations, weights[1:], strict=True):
        value, slope, bend = _Activate.apply(a, activation)  # type: ignore[no-untyped-call]
        inputs.append(_augment(value))
        slopes.append(slope)
        bends.append(bend)
        a = weight.mT @ inputs[-1]
    return ForwardPass(inputs, a, slopes, bends)


def _augment(rows: Rows) -> Rows:
    return torch.cat([rows.new_ones(rows.shape[0], 1, rows.shape[2]), rows], dim=1)


def top(arch: Architecture, logits: Rows, data: Data) -> tuple[Rows, Matrices]:
    """``g`` and ``B`` of the logits."""
    residual, curvature = logit_derivatives(
        arch.loss, logits.mT, data.y.to(logits.dtype), data.scale
    )
    if curvature.ndim == residual.ndim:
        return residual.mT, torch.diag_embed(curvature).permute(0, 2, 3, 1)
    return residual.mT, curvature.permute(0, 2, 3, 1)


def compute_terms(
    arch: Architecture,
    weights: Sequence[Tensor],
    data: Data,
    *,
    last_in_factors: bool = False,
) -> Terms:
    """Run samples through the networks and collect the factors of their Hessian's blocks.

    Args:
        arch: What the networks share.
        weights: Of each layer, ``(networks, inputs + 1, outputs)``.
        data: The samples.
        last_in_factors: Do not form the last hidden layer's ``B``; it must be the lowest trained.
    """
    last = len(weights) - 1
    run = forward(arch, weights, data)
    g: dict[int, Rows] = {}
    B: dict[tuple[int, int], Matrices] = {}  # noqa: N806 - as in the formulas
    D: dict[tuple[int, int], Matrices] = {}  # noqa: N806
    gains: dict[int, Matrices] = {}
    bends: dict[int, Rows] = {}
    g[last], B[last, last] = top(arch, run.logits, data)
    for layer in range(last - 1, arch.lowest - 1, -1):
        above = layer + 1
        slope, gain = run.slope[layer], weights[above][:, 1:]
        # The diagonal block below needs the one above; other layers' matter where they are trained.
        seconds = [m for m in range(above, last + 1) if m == above or arch.trains(m)]
        firsts = [m for m in range(above + 1, last) if arch.trains_beyond_bias(m + 1)]
        parts = [g[above].unsqueeze(2)]
        parts += [B[above, m] for m in seconds] + [D[above, m] for m in firsts]
        widths = [part.shape[2] for part in parts]
        pulled = gain @ torch.cat(parts, 2).flatten(2)
        pulled = pulled.unflatten(2, (-1, slope.shape[2]))
        into_g, *into = (slope.unsqueeze(2) * pulled).split(widths, 2)
        g[layer] = into_g.squeeze(2)
        for m, part in zip(seconds, into, strict=False):
            B[layer, m] = part
        for m, part in zip(firsts, into[len(seconds) :], strict=True):
            D[layer, m] = part
        if above < last and arch.trains_beyond_bias(above + 1):
            between = gain.unsqueeze(3) * run.slope[above].unsqueeze(1)
            D[layer, above] = slope.unsqueeze(2) * between
        bend = run.bend[layer] * pulled[:, :, 0]
        if last_in_factors:
            gains[layer], bends[layer] = slope.unsqueeze(2) * gain.unsqueeze(3), bend
            break
        # B_l,l+1 V^T, transposed: it is symmetric up to the slopes.
        across = gain @ B[layer, above].transpose(1, 2).flatten(2)
        across = across.unflatten(2, (-1, slope.shape[2])) * slope.unsqueeze(2)
        B[layer, layer] = _AddDiagonal.apply(across, bend)  # type: ignore[no-untyped-call]
    z = [inputs[:, rows] for inputs, rows in zip(run.inputs, arch.rows, strict=True)]
    return Terms(z, run.slope, g, B, D, gains, bends)


def loss_gradient(arch: Architecture, weights: Sequence[Tensor], data: Data) -> list[Tensor]:
    """The gradient of the loss itself, summed over the samples."""
    run = forward(arch, weights, data)
    g, _ = logit_derivatives(arch.loss, run.logits.mT, data.y.to(run.logits.dtype), data.scale)
    g = g.mT
    result = [batched_matmul(g, run.inputs[-1].mT).mT]
    for layer in range(len(weights) - 2, -1, -1):
        g = run.slope[layer] * (weights[layer + 1][:, 1:] @ g)
        result.append(batched_matmul(g, run.inputs[layer].mT).mT)
    return result[::-1]


def batched_matmul(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` where ``right`` may be shared by all networks: then one flat product."""
    if right.shape[0] == 1:
        return torch.matmul(left, right.squeeze(0))
    return torch.matmul(left, right)

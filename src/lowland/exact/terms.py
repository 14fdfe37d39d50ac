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

Words of this package: a *block* of ``H`` is that of two layers' weights, a *tile* some rows of a
block; a *trained row* is a row of some ``W_l`` that is trained; a *chunk* is some consecutive
samples that are handled together; an *adjoint* is the derivative, in a term, of a scalar; a
*backend*, in PyTorch or in C, does the work for some networks at a time, as a *plan* says.

Source: arXiv:2606.28662, section IV, for three layers and one output; beyond, our derivation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function

from lowland.activations import Activation
from lowland.losses import Loss, logit_derivatives

# A vector or a matrix for each sample, the samples last.
Vectors = Float[Tensor, "#networks _ samples"]
Matrices = Float[Tensor, "networks _ _ samples"]

# A term by its symbol and its layer or pair of layers: ("g", 1), ("B", (0, 2)).
Name = tuple[str, int | tuple[int, int]]

# The Gauss-Newton matrix is linear in the loss's second derivatives in the logits, what the Hessian
# has beyond it in the first: either is the Hessian of a loss without the other ones.
ExactMatrix = Literal["hessian", "ggn", "residual"]

# What is wanted of a network: both traces, Tr H alone, the diagonal that it is the sum of, or only
# the loss's own gradient.
Quantity = Literal["moments", "trace", "diagonal", "loss"]


@dataclass(frozen=True)
class Data:
    """Samples as the caller holds them; a leading dimension of 1 is shared by all networks.

    Attributes:
        x: Shape ``(1 | networks, samples, inputs)``.
        y: Shape ``(1 | networks, samples, outputs)``; for classes a distribution.
        scale: Weight of each sample in the loss: ``1 / samples`` for a mean, 1 for a sum, or a
            tensor of shape ``(1 | networks, samples, 1 | outputs)``.
        inputs_vary: Whether derivatives in ``x`` are wanted, too; each network then has its own.
    """

    x: Tensor
    y: Tensor
    scale: float | Tensor
    inputs_vary: bool = False

    @property
    def samples(self) -> int:
        """The number of samples."""
        return self.x.shape[-2]

    def of_networks(self, networks: slice) -> Data:
        """The data of some networks of an ensemble."""

        def pick(tensor: Tensor) -> Tensor:
            return tensor if tensor.shape[0] == 1 else tensor[networks]

        scale = pick(self.scale) if isinstance(self.scale, Tensor) else self.scale
        return replace(self, x=pick(self.x), y=pick(self.y), scale=scale)

    def of_the_one_network(self) -> Data:
        """The data of a single network, without the dimension of networks."""
        scale = self.scale[0] if isinstance(self.scale, Tensor) else self.scale
        return Data(self.x[0], self.y[0], scale)

    def of_samples(self, samples: slice | Tensor) -> Data:
        """Some of the samples, by their places."""
        scale = self.scale[:, samples] if isinstance(self.scale, Tensor) else self.scale
        return replace(self, x=self.x[:, samples], y=self.y[:, samples], scale=scale)

    def one_by_one(self, networks: int) -> Data:
        """Each sample as the only one of a network of its own, network after network."""

        def split(tensor: Tensor) -> Tensor:
            return tensor.expand(networks, -1, -1).reshape(-1, 1, tensor.shape[2])

        scale = split(self.scale) if isinstance(self.scale, Tensor) else self.scale
        return Data(split(self.x), split(self.y), scale)


@dataclass(frozen=True)
class Architecture:
    """What stays fixed while weights and data vary: activations, loss, and which rows are trained.

    Attributes:
        activations: Of each layer but the last.
        loss: Of the logits.
        rows: The trained rows of each layer's weights; row 0 holds the biases. The Hessian is that
            of the trained rows alone.
        matrix: The Hessian, or one of the two that it is the sum of.
    """

    activations: tuple[Activation, ...]
    loss: Loss
    rows: tuple[slice, ...]
    matrix: ExactMatrix = "hessian"

    def trains(self, layer: int) -> bool:
        """Whether any row of a layer is trained."""
        return bool(self.rows[layer].stop > self.rows[layer].start)

    def trains_beyond_bias(self, layer: int) -> bool:
        """Whether any row below the biases is trained: only such a row multiplies a unit."""
        return bool(self.rows[layer].stop > 1)

    def first_beyond_bias(self, layer: int) -> int:
        """The place, among the trained rows, of the first that multiplies a unit."""
        return 1 if self.rows[layer].start == 0 else 0

    @property
    def lowest(self) -> int:
        """The first layer with a trained row."""
        return next(layer for layer in range(len(self.rows)) if self.trains(layer))


@dataclass(frozen=True)
class Terms:
    r"""What the Hessian's blocks are made of, for a chunk of samples (symbols as above).

    Attributes:
        z: By layer, the entries of :math:`\tilde z_l` that meet trained rows of :math:`W_l`.
        slope: By layer, :math:`\phi'_l(a_l)`.
        g: By layer; carries the samples' weights in the loss, as ``B`` does.
        B: By pair of layers ``l <= m``, ``(networks, width_l, width_m, samples)``.
        D: By pair of layers ``l < m``, of that shape; ``D_ll`` is the diagonal matrix of slopes.
        gain: By layer, where ``B_ll`` is not formed, the ``U`` of
            :math:`B_{ll} = U Q U^T + \mathrm{diag}(c)` with the ``Q`` of the logits; ``B`` of this
            layer and the logits' is :math:`U Q`.
        bend: By the same layers, the ``c``.
        inputs_vary: Whether derivatives in the data are wanted, too.
    """

    z: list[Vectors]
    slope: list[Vectors]
    g: dict[int, Vectors]
    B: dict[tuple[int, int], Matrices]
    D: dict[tuple[int, int], Matrices]
    gain: dict[int, Matrices] = field(default_factory=dict)
    bend: dict[int, Vectors] = field(default_factory=dict)
    inputs_vary: bool = False

    @property
    def named(self) -> dict[Name, Tensor]:
        """By name, all terms that are no constants; ``z`` of layer 0 is the data."""
        return {
            **{("z", layer): z for layer, z in enumerate(self.z) if self.varies(layer)},
            **{("slope", layer): slope for layer, slope in enumerate(self.slope)},
            **{("g", layer): g for layer, g in self.g.items()},
            **{("B", pair): matrices for pair, matrices in self.B.items()},
            **{("D", pair): matrices for pair, matrices in self.D.items()},
            **{("gain", layer): matrices for layer, matrices in self.gain.items()},
            **{("bend", layer): bend for layer, bend in self.bend.items()},
        }

    def varies(self, layer: int) -> bool:
        """Whether what comes into a layer is no constant."""
        return layer > 0 or self.inputs_vary

    @property
    def samples(self) -> int:
        """The number of samples in the chunk."""
        return self.z[0].shape[-1]

    def of_samples(self, samples: slice) -> Terms:
        """The terms of some of the samples."""
        return Terms(
            [z[..., samples] for z in self.z],
            [slope[..., samples] for slope in self.slope],
            {layer: g[..., samples] for layer, g in self.g.items()},
            {pair: matrices[..., samples] for pair, matrices in self.B.items()},
            {pair: matrices[..., samples] for pair, matrices in self.D.items()},
            {layer: matrices[..., samples] for layer, matrices in self.gain.items()},
            {layer: bend[..., samples] for layer, bend in self.bend.items()},
            self.inputs_vary,
        )

    def like(self, named: Mapping[Name, Tensor]) -> Terms:
        """Terms laid out as these, of other tensors: the inverse of :attr:`named`."""
        return Terms(
            [named.get(("z", layer), z) for layer, z in enumerate(self.z)],
            [named["slope", layer] for layer in range(len(self.slope))],
            {layer: named["g", layer] for layer in self.g},
            {pair: named["B", pair] for pair in self.B},
            {pair: named["D", pair] for pair in self.D},
            {layer: named["gain", layer] for layer in self.gain},
            {layer: named["bend", layer] for layer in self.bend},
            self.inputs_vary,
        )


class _Activate(Function):
    """An activation and its first two derivatives; differentiated by the third that comes along."""

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
    """``matrices + diag(diagonal)`` in place, where no other operation has saved the matrices.

    They are the largest of all terms, and autograd's own way would copy them.
    """

    @staticmethod
    def forward(ctx: Any, matrices: Matrices, diagonal: Vectors) -> Matrices:
        matrices.diagonal(dim1=1, dim2=2).add_(diagonal.mT)
        ctx.mark_dirty(matrices)
        return matrices

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG004
        return grads[0], grads[0].diagonal(dim1=1, dim2=2).mT


@dataclass(frozen=True)
class ForwardPass:
    r"""What a forward pass through the networks leaves at each layer.

    Attributes:
        inputs: By layer, :math:`\tilde z_l`.
        logits: The last layer's ``a``.
        slope: By layer but the last, :math:`\phi'_l(a_l)`.
        bend: By layer but the last, :math:`\phi''_l(a_l)`.
    """

    inputs: list[Vectors]
    logits: Vectors
    slope: list[Vectors]
    bend: list[Vectors]


def forward(arch: Architecture, weights: Sequence[Tensor], data: Data) -> ForwardPass:
    """The networks' forward pass, layer by layer."""
    inputs, slopes, bends = [_augment(data.x.mT)], [], []
    a = batched_matmul(weights[0].mT, inputs[0])
    for activation, weight in zip(arch.activations, weights[1:], strict=True):
        value, slope, bend = activate(a, activation)
        inputs.append(_augment(value))
        slopes.append(slope)
        bends.append(bend)
        a = weight.mT @ inputs[-1]
    return ForwardPass(inputs, a, slopes, bends)


def activate(a: Tensor, activation: Activation) -> tuple[Tensor, Tensor, Tensor]:
    """An activation and its first two derivatives, which autograd can differentiate."""
    found: tuple[Tensor, Tensor, Tensor] = _Activate.apply(a, activation)  # type: ignore[no-untyped-call]
    return found


def _augment(z: Vectors) -> Vectors:
    """``[1; z]``: the 1 meets the biases."""
    return torch.cat([z.new_ones(z.shape[0], 1, z.shape[2]), z], dim=1)


def at_logits(arch: Architecture, logits: Vectors, data: Data) -> tuple[Tensor, Tensor]:
    """The loss's derivatives in the logits, as far as the matrix is made of them.

    As :func:`lowland.losses.logit_derivatives` gives them; zeros for the others.
    """
    residual, curvature = logit_derivatives(
        arch.loss, logits.mT, data.y.to(logits.dtype), data.scale
    )
    if arch.matrix == "ggn":
        residual = torch.zeros_like(residual)
    if arch.matrix == "residual":
        curvature = torch.zeros_like(curvature)
    return residual, curvature


def _at_logits(arch: Architecture, logits: Vectors, data: Data) -> tuple[Vectors, Matrices]:
    """``g`` and ``B`` of the last layer."""
    residual, curvature = at_logits(arch, logits, data)
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
    """A forward pass, then ``g``, ``B`` and ``D`` of each layer from those of the layer above.

    Args:
        arch: What the networks share.
        weights: Of each layer, ``(networks, inputs + 1, outputs)``.
        data: The samples.
        last_in_factors: Leave the last hidden layer's ``B`` in the factors ``gain`` and ``bend``.
            It must be the lowest trained layer: those below would need the whole.
    """
    last = len(weights) - 1
    passed = forward(arch, weights, data)
    g: dict[int, Vectors] = {}
    B: dict[tuple[int, int], Matrices] = {}  # noqa: N806 - as in the formulas
    D: dict[tuple[int, int], Matrices] = {}  # noqa: N806
    gains: dict[int, Matrices] = {}
    bends: dict[int, Vectors] = {}
    g[last], B[last, last] = _at_logits(arch, passed.logits, data)
    for layer in range(last - 1, arch.lowest - 1, -1):
        above = layer + 1
        # V = V_l+1, (networks, M_l, M_l+1): W_l+1 without the biases, which meet no unit.
        slope, outgoing = passed.slope[layer], weights[above][:, 1:]
        # B_ll is made of B_l+1,l+1, whether that layer is trained or not. The others are for blocks
        # alone: B_lm for that of W_l and W_m, D_lm for that of W_l and V_m+1.
        seconds = [m for m in range(above, last + 1) if m == above or arch.trains(m)]
        firsts = [m for m in range(above + 1, last) if arch.trains_beyond_bias(m + 1)]
        # g_l = diag(phi'_l) V g_l+1, B_lm = diag(phi'_l) V B_l+1,m, D_lm = diag(phi'_l) V D_l+1,m:
        # one product of V, with the columns of all three side by side.
        columns = [g[above].unsqueeze(2)]
        columns += [B[above, m] for m in seconds] + [D[above, m] for m in firsts]
        widths = [each.shape[2] for each in columns]
        pulled = outgoing @ torch.cat(columns, 2).flatten(2)
        pulled = pulled.unflatten(2, (-1, slope.shape[2]))
        g_below, *below = (slope.unsqueeze(2) * pulled).split(widths, 2)
        g[layer] = g_below.squeeze(2)
        for m, matrices in zip(seconds, below, strict=False):
            B[layer, m] = matrices
        for m, matrices in zip(firsts, below[len(seconds) :], strict=True):
            D[layer, m] = matrices
        if above < last and arch.trains_beyond_bias(above + 1):
            # D_l,l+1 = diag(phi'_l) V diag(phi'_l+1), where the rule for D begins.
            between = outgoing.unsqueeze(3) * passed.slope[above].unsqueeze(1)
            D[layer, above] = slope.unsqueeze(2) * between
        # c = phi''_l * V g_l+1, and V g_l+1 is the first column, before the slopes.
        bend = passed.bend[layer] * pulled[:, :, 0]
        if last_in_factors:
            # U = diag(phi'_l) V, (networks, M_l, K, samples).
            gains[layer], bends[layer] = slope.unsqueeze(2) * outgoing.unsqueeze(3), bend
            break
        # B_ll = diag(phi'_l) V B_l,l+1^T + diag(c), since B_l,l+1 = diag(phi'_l) V B_l+1,l+1 holds
        # one V and one slope already. It is symmetric, so the slopes may multiply rows.
        across = outgoing @ B[layer, above].transpose(1, 2).flatten(2)
        across = across.unflatten(2, (-1, slope.shape[2])) * slope.unsqueeze(2)
        B[layer, layer] = _AddDiagonal.apply(across, bend)  # type: ignore[no-untyped-call]
    z = [inputs[:, rows] for inputs, rows in zip(passed.inputs, arch.rows, strict=True)]
    return Terms(z, passed.slope, g, B, D, gains, bends, data.inputs_vary)


def loss_gradient(arch: Architecture, weights: Sequence[Tensor], data: Data) -> list[Tensor]:
    r"""The gradient of the loss in each layer's weights, :math:`\sum_i \tilde z_l g_l^T`.

    All rows have one, trained or not: ``(networks, inputs + 1, outputs)`` a layer.
    """
    passed = forward(arch, weights, data)
    logits = passed.logits
    g, _ = logit_derivatives(arch.loss, logits.mT, data.y.to(logits.dtype), data.scale)
    g = g.mT
    result = [batched_matmul(g, passed.inputs[-1].mT).mT]
    for layer in range(len(weights) - 2, -1, -1):
        g = passed.slope[layer] * (weights[layer + 1][:, 1:] @ g)
        result.append(batched_matmul(g, passed.inputs[layer].mT).mT)
    return result[::-1]


def batched_matmul(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``, where ``right`` may be shared by all networks.

    Without its leading 1 PyTorch makes one tall product of a batch of small ones.
    """
    if right.shape[0] == 1:
        return torch.matmul(left, right.squeeze(0))
    return torch.matmul(left, right)

"""The pair proxy of weakness: which classes unseen points could still be put into."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lowland.display import DataFrame, frame
from lowland.threads import one_blas_thread
from lowland.weakness.cone import build_cone
from lowland.weakness.findings import Findings, Proof
from lowland.weakness.search import search
from lowland.weakness.solver import need_highs


@dataclass(frozen=True, eq=False)
class Witness:
    """A last layer that classifies all training points correctly.

    Attributes:
        weight: Shape ``(classes, features)``.
        bias: Shape ``(classes,)``.
        center: Subtracted from the features first: at a large offset a bias alone, rounded, would
            move the scores.

    Example:
        >>> import torch
        >>> from lowland.weakness import pair_proxy
        >>> train, labels = torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1])
        >>> unseen = torch.tensor([[2.0], [0.0]])  # beyond both of them, and between
        >>> proxy = pair_proxy(train, labels, unseen, num_classes=2)
        >>> witness = proxy.witness(1, 0)  # puts the point between into class 0
        >>> witness.scores(train).argmax(1), witness.scores(unseen).argmax(1)
        (tensor([0, 1]), tensor([1, 0]))
    """

    weight: Float[Tensor, "classes features"] = field(repr=False)
    bias: Float[Tensor, " classes"] = field(repr=False)
    center: Float[Tensor, " features"] = field(repr=False)

    def scores(self, features: Float[Tensor, "points features"]) -> Float[Tensor, "points classes"]:
        """The logits of points, in float64."""
        return (features.double().cpu() - self.center) @ self.weight.T + self.bias


@dataclass(frozen=True, eq=False)
class Certificate:
    r"""Weights that prove, after Farkas, that inequalities have no common solution.

    .. math::
        \sum_j \lambda_j (e_{y_j} - e_{k_j}) \otimes z_j
        + \sum_k \mu_k (e_c - e_k) \otimes z = 0

    with ``z`` a point's features and a one behind them: if all of ``(W_y - W_k) z`` were positive,
    so would be zero. The weights here are floats, and exact ones are close by; that these exist and
    are positive was verified.

    Attributes:
        samples: The training points ``j``.
        against: The classes ``k_j``.
        weights: Positive, ``lambda``.
        rivals: The classes ``k`` that the unseen point cannot be put before all of; empty for a
            certificate that the training points alone cannot be classified.
        rival_weights: Positive, ``mu``.

    Example:
        >>> import torch
        >>> from lowland.weakness import pair_proxy
        >>> train, labels = torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1])
        >>> unseen = torch.tensor([[2.0], [0.0]])  # beyond both of them, and between
        >>> proxy = pair_proxy(train, labels, unseen, num_classes=2)
        >>> certificate = proxy.certificate(0, 0)  # the point beyond is never of class 0
        >>> certificate.samples, certificate.rivals
        (tensor([0, 1]), tensor([1]))
        >>> bool((certificate.weights > 0).all())
        True
    """

    samples: Int[Tensor, " rows"]
    against: Int[Tensor, " rows"]
    weights: Float[Tensor, " rows"]
    rivals: Int[Tensor, " rivals"]
    rival_weights: Float[Tensor, " rivals"]


@dataclass(frozen=True, eq=False)
class PairProxy:
    """Which classes each unseen point could be put into; from :func:`pair_proxy`.

    Attributes:
        feasible: Whether some last layer classifies all training points correctly and puts the
            unseen point into the class.
        undecided: Pairs that neither a witness nor a certificate settled; not counted as feasible.
            Expect none, unless points lie within about 1e-12, relatively, of a border without
            lying on it: as do those that rounding moved off a border, or out of the hull of
            features that depend on one another up to rounding.
        separable: Whether any last layer classifies all training points correctly; None if that
            was not settled. If there is none, no pair is feasible.

    Example:
        >>> import torch
        >>> from lowland.weakness import pair_proxy
        >>> train, labels = torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1])
        >>> unseen = torch.tensor([[2.0], [0.0]])  # beyond both of them, and between
        >>> proxy = pair_proxy(train, labels, unseen, num_classes=2)
        >>> proxy.count, proxy.total, proxy.verify()
        (3, 4, True)
    """

    feasible: Bool[Tensor, "unseen classes"] = field(repr=False)
    undecided: Bool[Tensor, "unseen classes"] = field(repr=False)
    separable: bool | None
    findings: Findings = field(repr=False)

    @property
    def count(self) -> int:
        """The pair proxy: how many pairs are feasible."""
        return int(self.feasible.sum())

    def __repr__(self) -> str:
        open_ = int(self.undecided.sum())
        return (
            f"PairProxy(count={self.count}, total={self.total}, undecided={open_}, "
            f"separable={self.separable})"
        )

    @property
    def total(self) -> int:
        """How many pairs there are."""
        return self.feasible.numel()

    def witness(self, unseen: int, label: int) -> Witness:
        """A last layer that puts an unseen point into a class.

        It is one of features less :attr:`Witness.center`; :meth:`Witness.scores` sees to that.

        Raises:
            ValueError: If the pair is not known to be feasible.
        """
        index = int(self.findings.witness[self._pair(unseen, label)])
        if index < 0:
            raise ValueError(
                f"expected a feasible pair; unseen point {unseen} and class {label} are not known "
                "to be one: see feasible[unseen, label]"
            )
        layer = self.findings.layers[index]
        return Witness(
            weight=torch.from_numpy(layer[:, :-1] / self.findings.cone.scale),
            bias=torch.from_numpy(layer[:, -1].copy()),
            center=torch.from_numpy(self.findings.cone.center),
        )

    def certificate(self, unseen: int, label: int) -> Certificate:
        """Why no last layer puts an unseen point into a class.

        If the training points cannot be classified at all, the certificate for that.

        Raises:
            ValueError: If the pair is not known to be infeasible.
        """
        pair = self._pair(unseen, label)
        proof = self.findings.refutation or self.findings.proofs.get(pair)
        if proof is None:
            raise ValueError(
                f"expected an infeasible pair; unseen point {unseen} and class {label} are not "
                "known to be one: see feasible[unseen, label] and undecided[unseen, label]"
            )
        return _certificate(proof)

    def verify(self) -> bool:
        """Check every witness and every certificate once more, without a solver.

        Witnesses by bounds on all roundings, or in rational numbers; certificates by the existence
        of an exact one close by. :func:`pair_proxy` has done so on the way.
        """
        return self.findings.hold()

    def to_frame(self) -> DataFrame:
        """A row for each unseen point: ``unseen``, ``feasible`` (how many classes), ``undecided``.

        Raises:
            ImportError: Without pandas, ``pip install 'lowland[cli]'``.
        """
        return frame(
            {
                "unseen": range(len(self.feasible)),
                "feasible": self.feasible.sum(dim=1).numpy(),
                "undecided": self.undecided.sum(dim=1).numpy(),
            }
        )

    def _pair(self, unseen: int, label: int) -> tuple[int, int]:
        points, classes = self.feasible.shape
        if not (0 <= unseen < points and 0 <= label < classes):
            raise ValueError(
                f"expected an unseen point from 0 to {points - 1} and a class from 0 to "
                f"{classes - 1}; got {unseen} and {label}"
            )
        return unseen, label


def pair_proxy(
    features_train: Float[Tensor, "train features"],
    y_train: Tensor,
    features_unseen: Float[Tensor, "unseen features"],
    num_classes: int,
) -> PairProxy:
    r"""How many pairs of an unseen point and a class some last layer still allows.

    A pair (x, c) is feasible if there is a last layer ``(W, b)`` that classifies every training
    point correctly, :math:`(W_{y_i} - W_k) \phi_i + b_{y_i} - b_k > 0` for all i and
    :math:`k \ne y_i`, and puts x into c in the same way. Invertible affine maps of the features
    change nothing about that.

    Every answer is proved: a feasible pair by a layer whose scores no rounding could swap, an
    infeasible one by Farkas' lemma. A pair that floating point cannot decide either way is
    ``undecided`` instead of guessed. What lies that close to a border takes longer; after 20 such
    pairs in a row that stay undecided, so do all that are left.

    Args:
        features_train: The last hidden layer's outputs at the training points.
        y_train: Their classes, shape ``(train,)``.
        features_unseen: The last hidden layer's outputs at the unseen points.
        num_classes: ``K``, at least 2.

    Raises:
        TypeError: If features are no floating-point tensors of one type.
        ValueError: If shapes do not match, or labels or values are out of range.
        ImportError: Without HiGHS, ``pip install 'lowland[weakness]'``.

    References:
        arXiv:2605.05209, tables 4 and 5.

    Example:
        >>> import torch
        >>> from lowland.weakness import pair_proxy
        >>> train, labels = torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1])
        >>> unseen = torch.tensor([[2.0], [0.0]])  # beyond both of them, and between
        >>> proxy = pair_proxy(train, labels, unseen, num_classes=2)
        >>> proxy
        PairProxy(count=3, total=4, undecided=0, separable=True)
        >>> proxy.feasible
        tensor([[False,  True],
                [ True,  True]])
    """
    cone = build_cone(features_train, y_train, features_unseen, num_classes)
    need_highs()
    with one_blas_thread():  # for its matrices are small
        findings = search(cone)
    return PairProxy(
        feasible=torch.from_numpy(np.asarray(findings.witness >= 0)),
        undecided=torch.from_numpy(findings.open),
        separable=findings.separable,
        findings=findings,
    )


def _certificate(proof: Proof) -> Certificate:
    new = proof.point < 0
    return Certificate(
        samples=torch.from_numpy(proof.point[~new]),
        against=torch.from_numpy(proof.against[~new]),
        weights=torch.from_numpy(proof.weight[~new]),
        rivals=torch.from_numpy(proof.against[new]),
        rival_weights=torch.from_numpy(proof.weight[new]),
    )

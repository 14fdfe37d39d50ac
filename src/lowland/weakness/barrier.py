r"""Steps through the cone's interior toward pairs, many pairs at a time.

In the cone every inequality of the training points has a positive slack ``s``. A pair's own
inequalities get there by adding a deficit to each. A step of affine scaling lowers the deficit in
the direction that is best within the ellipsoid :math:`\sum (\delta s / s)^2 \le 1`, and goes on in
it almost to the boundary (I. I. Dikin, Doklady Akademii Nauk SSSR 174 (1967)). Once the deficit is
negative, the layer puts the point into the class. Every layer on the way is in the cone.

Each inequality is about two classes, so the Hessian of :math:`-\sum \log s` has one block for each
two classes: the second moments of their points, weighted. No matrix of all inequalities is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from lowland.weakness.cone import Cone, Layer

Layers = Float[np.ndarray, "layers classes rank"]
Slacks = Float[np.ndarray, "points layers classes"]
Moments = Float[np.ndarray, "classes layers classes squares"]

# At a thin cone's boundary slacks round to zero; what comes of it is found out by who verifies.
_IGNORE = np.errstate(divide="ignore", over="ignore", invalid="ignore")
_NEWTON = 100  # steps to the center at most
_CENTERED = 0.1  # Newton decrement
_ALONG = np.array([0.3, 0.5, 0.7, 0.8, 0.9, 0.99])  # parts of the way to the boundary to look at
_REACH = 0.99  # of the way, where the next step begins
_DEFICIT = 1.01  # the first one, in multiples of what is missing
_LIKELY = 3e-4  # of the largest weight: inequalities below are left out
_TINY = 1e-12  # a rate that counts as none
_MEMORY = 2**28  # bytes that steps may take
_TOGETHER = 64  # attempts at most: what some find out saves the next ones
_RANK = 1e-12  # of the largest singular value: below is rounding
_OUTSIDE = 1e-13  # relative distance from the training points' hull beyond rounding


@dataclass(frozen=True, eq=False)
class Attempts:
    """Layers on their way, each toward one pair.

    Attributes:
        unseen: The point of each pair.
        label: Its class.
        layers: In coordinates of :class:`Interior`.
        deficit: What the pair's inequalities lack, and a little more.
    """

    unseen: Int[np.ndarray, " layers"]
    label: Int[np.ndarray, " layers"]
    layers: Layers
    deficit: Float[np.ndarray, " layers"]

    def __len__(self) -> int:
        return len(self.unseen)

    def only(self, chosen: Bool[np.ndarray, " layers"]) -> Attempts:
        """Some of them."""
        return Attempts(
            self.unseen[chosen], self.label[chosen], self.layers[chosen], self.deficit[chosen]
        )


@dataclass(frozen=True, eq=False)
class Weights:
    """Weights of the inequalities, for each attempt, that add up to zero.

    Where all are positive, no layer fits the training points and the pair, by Farkas' lemma.

    Attributes:
        train: Of the training points' inequalities.
        own: Of the pair's.
    """

    train: Slacks
    own: Float[np.ndarray, "layers classes"]

    @_IGNORE
    def doubt(self) -> Float[np.ndarray, " layers"]:
        """The share of negative weights among the training points'."""
        size, sum_ = (x.sum(axis=0).sum(axis=1) for x in (np.abs(self.train), self.train))
        doubt: Float[np.ndarray, " layers"] = 0.5 - 0.5 * sum_ / size
        return doubt

    def support(
        self, index: int
    ) -> tuple[Int[np.ndarray, " inequalities"], Int[np.ndarray, " inequalities"]]:
        """Points, -1 for the unseen one, and classes of one attempt's inequalities that matter."""
        train, own = self.train[:, index], self.own[index]
        point, against = np.nonzero(train > _LIKELY * train.max())
        rivals = np.flatnonzero(own > _LIKELY * own.max())
        return np.append(point, np.full(len(rivals), -1)), np.append(against, rivals)


class Interior:
    """The cone, in coordinates in which the training points are orthonormal.

    Args:
        cone: The cone.
        layer: A layer inside.
    """

    def __init__(self, cone: Cone, layer: Layer) -> None:
        left, sizes, right = np.linalg.svd(cone.train, full_matrices=False)
        rank = int((sizes > _RANK * sizes[0]).sum())
        self.classes = cone.classes
        self.train, self.labels = left[:, :rank], cone.labels
        self.index = np.arange(len(left))
        self._back = (right[:rank].T / sizes[:rank]).T
        self.unseen = cone.unseen @ self._back.T
        outside = cone.unseen
        for _ in range(2):  # once leaves rounding that counts where little is left
            outside = outside - outside @ right[:rank].T @ right[:rank]
        far = np.abs(outside).max(axis=1) > _OUTSIDE * np.abs(cone.unseen).max(axis=1)
        self._outside = outside[far]
        self._members = [np.flatnonzero(self.labels == k) for k in range(self.classes)]
        self._squares = None
        if 8 * len(left) * rank**2 < _MEMORY:
            squares = self.train[:, :, None] * self.train[:, None, :]
            self._squares = squares.reshape(len(left), -1)
        inside = layer @ right[:rank].T * sizes[:rank]
        self.center = self._find_center(inside - inside[-1])

    @property
    def together(self) -> int:
        """How many attempts to make at a time."""
        # Second moments and the Hessian: for each two classes a matrix of all coordinates.
        each = 2 * 8 * (self.classes * int(self.train.shape[1])) ** 2
        return max(1, min(_TOGETHER, _MEMORY // each))

    def to_cone(self, layers: Layers) -> Float[np.ndarray, "layers classes coordinates"]:
        """In the coordinates of the cone."""
        found: Float[np.ndarray, "layers classes coordinates"] = layers @ self._back
        return found

    def escapes(self) -> Float[np.ndarray, "layers classes coordinates"]:
        """Layers that put points outside the training points' hull into any class, there.

        Along the way out of the hull no training point's score changes.
        """
        center = self.to_cone(self.center[None])[0]
        out = self._outside
        if not len(out):
            return np.empty((0, *center.shape))
        scale = 4 * self.classes * np.abs(center).max() * np.sqrt(len(center.T))
        ways = scale * out / np.square(out).sum(axis=1, keepdims=True)
        layers = np.broadcast_to(center, (len(out), self.classes, *center.shape)).copy()
        every = np.arange(self.classes)
        layers[:, every, every] += ways[:, None]
        return layers.reshape(-1, *center.shape)

    def start(
        self, unseen: Int[np.ndarray, " pairs"], label: Int[np.ndarray, " pairs"]
    ) -> Attempts:
        """Attempts at pairs, from the center."""
        layers = np.repeat(self.center[None], len(unseen), axis=0)
        lead = self._lead(layers, unseen, label).min(axis=1, initial=np.inf)
        return Attempts(unseen, label, layers, -_DEFICIT * lead)

    @_IGNORE
    def step(
        self, at: Attempts
    ) -> tuple[Attempts, Float[np.ndarray, "layers classes coordinates"], Weights]:
        """One step of each attempt.

        Returns:
            The attempts after it; the layer on each one's way that comes closest to its pair, in
            the coordinates of the cone; and weights of inequalities that add up to zero.
        """
        own = np.arange(len(at))
        point = self.unseen[at.unseen]
        lead = self._lead(at.layers, at.unseen, at.label)
        inverse = 1 / (lead + at.deficit[:, None])
        inverse_train = 1 / self._slacks(at.layers)
        moments = self._moments(inverse_train**2)
        products = (point[:, :, None] * point[:, None, :]).reshape(len(at), 1, -1)
        moments[at.label, own] += (inverse**2)[:, :, None] * products
        uphill = inverse**2
        uphill[own, at.label] = -uphill.sum(axis=1)
        direction = self._solve(moments, -uphill[:, :, None] * point[:, None])
        rise = self._lead(direction, at.unseen, at.label)
        rise[own, at.label] = 0
        fall = -self._differences(direction) * inverse_train
        steepest = fall.max(axis=0).max(axis=1).clip(_TINY)
        along = _ALONG / steepest[:, None]
        reached = (lead[:, None] + along[:, :, None] * rise[:, None]).min(axis=2)
        best = along[own, reached.argmax(axis=1)]
        length = _REACH / np.maximum(steepest, ((1 - rise) * inverse).max(axis=1))
        after = Attempts(
            at.unseen,
            at.label,
            at.layers + length[:, None, None] * direction,
            at.deficit - length,
        )
        closest = self.to_cone(at.layers + best[:, None, None] * direction)
        return after, closest, Weights(fall * inverse_train, (1 - rise) * inverse**2)

    @_IGNORE
    def _find_center(self, layer: Layer) -> Layer:
        """The analytic center of the layers with the same sum of slacks, by Newton's method."""
        layers = layer[None]
        ones = np.ones((len(self.train), 1, self.classes))
        ones[self.index, :, self.labels] = 0
        total = self._pull(ones)
        for _ in range(_NEWTON):
            inverse = 1 / self._slacks(layers)
            moments = self._moments(inverse**2)
            gradient = self._pull(inverse)
            uphill, level = self._solve(moments, gradient), self._solve(moments, total)
            step = uphill - level * (total * uphill).sum() / (total * level).sum()
            decrement = np.sqrt(max(float((gradient * step).sum()), 0.0))
            layers = layers + step / (1 + decrement)
            if decrement < _CENTERED:
                break
        center: Layer = layers[0]
        return center

    def _lead(
        self, layers: Layers, unseen: Int[np.ndarray, " layers"], label: Int[np.ndarray, " layers"]
    ) -> Float[np.ndarray, "layers classes"]:
        """``(W_c - W_k) z`` of each layer's own pair; infinite where k is c."""
        own = np.arange(len(layers))
        scores = (layers @ self.unseen[unseen][:, :, None])[:, :, 0]
        lead: Float[np.ndarray, "layers classes"] = scores[own, label][:, None] - scores
        lead[own, label] = np.inf
        return lead

    def _differences(self, layers: Layers) -> Slacks:
        """``(W_y - W_k) z`` of the training points."""
        scores = np.tensordot(self.train, layers, axes=(1, 2))
        differences: Slacks = scores[self.index, :, self.labels][:, :, None] - scores
        return differences

    def _slacks(self, layers: Layers) -> Slacks:
        """``(W_y - W_k) z`` of the training points, infinite where ``k`` is ``y``."""
        slacks = self._differences(layers)
        slacks[self.index, :, self.labels] = np.inf
        return slacks

    def _pull(self, weights: Slacks) -> Layers:
        """The sum of the training points' inequalities, each times its weight."""
        each = -weights
        each[self.index, :, self.labels] = weights.sum(axis=2)
        pull: Layers = np.tensordot(each, self.train, axes=(0, 0))
        return pull

    def _moments(self, weights: Slacks) -> Moments:
        """Of each class's training points the second moments, weighted, against each class."""
        count, size = weights.shape[1], self.train.shape[1]
        moments = np.empty((self.classes, count, self.classes, size**2))
        for moment, part in zip(moments, self._members, strict=True):
            flat = weights[part].reshape(len(part), count * self.classes)
            found = moment.reshape(len(flat.T), -1)
            if self._squares is not None:
                np.matmul(flat.T, self._squares[part], out=found)
            else:
                own = self.train[part]
                for row, weight in zip(found, flat.T, strict=True):
                    np.matmul(own.T * weight, own, out=row.reshape(size, size))
        return moments

    def _solve(self, moments: Moments, right: Layers) -> Layers:
        """Solve with the Hessian, the last class held at zero; zero where it is singular."""
        from scipy.linalg.lapack import dposv  # noqa: PLC0415 - optional

        count, classes, size = right.shape
        hessian = np.empty((count, classes - 1, size, classes - 1, size))
        diagonal = np.zeros((classes, count, size, size))
        for a in range(classes):
            for b in range(a):
                block = (moments[a, :, b] + moments[b, :, a]).reshape(count, size, size)
                diagonal[a] += block
                diagonal[b] += block
                if a < classes - 1:
                    np.negative(block, out=hessian[:, a, :, b])
        for a in range(classes - 1):
            hessian[:, a, :, a] = diagonal[a]
        unknowns = (classes - 1) * size
        solution = np.zeros((count, classes * size))
        for row, matrix, vector in zip(
            solution, hessian.reshape(count, unknowns, unknowns), right, strict=True
        ):
            # Only the lower half was written; to LAPACK, which counts by columns, the upper.
            _, found, failed = dposv(matrix.T, vector[:-1].ravel(), overwrite_a=True)
            if not failed and np.isfinite(found).all():
                row[:unknowns] = found
        return solution.reshape(right.shape)

"""What is known about pairs: only what was verified."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product

import numpy as np
from jaxtyping import Bool, Float, Int

from lowland.weakness.cone import Cone, Layer
from lowland.weakness.verify import certifies, classifies_training, exact_classes, sure_classes

Layers = Float[np.ndarray, "layers classes coordinates"]
Pair = tuple[int, int]

_THRESHOLDS = (1e-9, 1e-6, 1e-13, 0.0)  # of the largest weight: below may be a solver's zero


@dataclass(frozen=True, eq=False)
class Proof:
    """Weights under which inequalities add up to zero.

    Attributes:
        point: Index of the training point of each inequality; -1 is the unseen point.
        against: The class that should lose.
        weight: Positive.
    """

    point: Int[np.ndarray, " rows"]
    against: Int[np.ndarray, " rows"]
    weight: Float[np.ndarray, " rows"]


@dataclass(eq=False)
class Findings:
    """What is known so far.

    Attributes:
        cone: Of the last layers that classify the training points correctly.
        layers: Some that certainly do.
        proofs: A proof for each infeasible pair.
        separable: Whether there is any layer; None if that was not settled.
        refutation: The proof that there is none.
        witness: The index of a layer for each feasible pair, else -1.
        open: Pairs that nothing has settled.
    """

    cone: Cone
    layers: list[Layer] = field(default_factory=list)
    proofs: dict[Pair, Proof] = field(default_factory=dict)
    separable: bool | None = None
    refutation: Proof | None = None
    witness: Int[np.ndarray, "unseen classes"] = field(init=False)
    open: Bool[np.ndarray, "unseen classes"] = field(init=False)

    def __post_init__(self) -> None:
        shape = len(self.cone.unseen), self.cone.classes
        self.witness, self.open = np.full(shape, -1), np.ones(shape, bool)

    def note(self, layers: Layers) -> None:
        """Let layers settle what they can, if they certainly classify the training points."""
        layers = layers[np.isfinite(layers).all(axis=(1, 2))]
        points = np.arange(len(self.cone.unseen))
        classes = (layers @ self.cone.unseen.T).argmax(axis=1)
        fresh = np.flatnonzero(self.open[points, classes])
        pairs = (points * self.cone.classes + classes).ravel()[fresh]
        # One layer for each pair is enough to verify.
        _, first = np.unique(pairs, return_index=True)
        layers = layers[np.unique(fresh[first] // len(points))]
        layers = layers[classifies_training(self.cone, layers)]
        for layer, classes in zip(layers, sure_classes(layers, self.cone.unseen), strict=True):
            known = np.flatnonzero(classes >= 0)
            self._keep(layer, known, classes[known])

    def note_exactly(self, layer: Layer, pair: Pair | None) -> bool:
        """Let a layer settle a pair, or None for separability, exactly; whether it does."""
        if not np.isfinite(layer).all() or not classifies_training(self.cone, layer[None])[0]:
            return False
        if pair is None:
            self.separable = True
            return True
        self.note(layer[None])
        if self.open[pair] and self._puts(layer, pair):
            self._keep(layer, *np.array(pair)[:, None])
        return not self.open[pair]

    def hold(self) -> bool:
        """Whether everything found certainly holds, without a solver."""
        if self.refutation is not None:
            return self.proves(self.refutation, None)
        if not self.layers:
            return not self.proofs
        layers = np.stack(self.layers)
        if not classifies_training(self.cone, layers).all():
            return False
        classes = sure_classes(layers, self.cone.unseen)
        return all(
            classes[index, unseen] == label or self._puts(self.layers[index], (unseen, label))
            for (unseen, label), index in np.ndenumerate(self.witness)
            if index >= 0
        ) and all(self.proves(proof, pair) for pair, proof in self.proofs.items())

    def _puts(self, layer: Layer, pair: Pair) -> bool:
        """Whether a layer puts a point into a class, in rational numbers."""
        cone, (unseen, label) = self.cone, pair
        raw = cone.raw_unseen[unseen : unseen + 1]
        return bool(exact_classes(layer, raw, cone.center, cone.scale)[0] == label)

    def _keep(
        self, layer: Layer, points: Int[np.ndarray, " pairs"], labels: Int[np.ndarray, " pairs"]
    ) -> None:
        fresh = self.open[points, labels]
        if fresh.any():
            self.witness[points[fresh], labels[fresh]] = len(self.layers)
            self.open[points[fresh], labels[fresh]] = False
            self.layers.append(layer)

    def refute(
        self,
        pair: Pair | None,
        point: Int[np.ndarray, " rows"],
        against: Int[np.ndarray, " rows"],
        weights: Float[np.ndarray, " rows"],
        *,
        exactly: bool = True,
    ) -> bool:
        """Prove a pair infeasible, or None for all, by a solver's weights; whether it worked.

        With ``exactly`` in rational numbers where floats do not suffice, which takes time.
        """
        largest = float(weights.max(initial=0.0))
        kept = {(k := weights > threshold * largest).tobytes(): k for threshold in _THRESHOLDS}
        for rational, mask in product((False, True)[: 1 + exactly], kept.values()):
            proof = Proof(point[mask], against[mask], weights[mask])
            if not self.proves(proof, pair, exactly=rational):
                continue
            if pair is None:
                self.refutation, self.separable = proof, False
                self.open[:] = False
            else:
                self.proofs[pair] = proof
                self.open[pair] = False
            return True
        return False

    def proves(self, proof: Proof, pair: Pair | None, *, exactly: bool = True) -> bool:
        """Whether a proof certainly holds, without a solver."""
        cone = self.cone
        own, train, raw = (part[proof.point] for part in (cone.labels, cone.train, cone.raw_train))
        if pair is not None:
            unseen, label = pair
            new = proof.point < 0
            own = np.where(new, label, own)
            train = np.where(new[:, None], cone.unseen[unseen], train)
            raw = np.where(new[:, None], cone.raw_unseen[unseen], raw)
        return certifies(train, raw, own, proof.against, proof.weight, exactly=exactly)

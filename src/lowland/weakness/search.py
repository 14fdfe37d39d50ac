r"""Which pairs of an unseen point and a class are feasible, with few linear programs.

``W`` stands for a last layer, ``z`` for a point's features with a one behind them, and the cone
for the layers that classify all training points correctly. Four things keep the work small:

* each layer that a program gives classifies *every* unseen point, and so settles a hundred pairs;
* with all classes but one held fixed, a program has ten unknowns instead of ninety, and from one
  point to the next only its objective changes;
* that a point cannot be in a class mostly follows from two classes' training points alone: again
  ten unknowns, and again only the objective changes;
* what is left goes through one program that keeps its basis. A pair that was settled stays in it
  as a further training point, and the next one is the pair closest to what the last layer says.
  Few steps of the simplex method lead there.

Nothing here is taken on trust: :mod:`lowland.weakness.verify` decides.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float, Int

from lowland.weakness.cone import Cone, Layer
from lowland.weakness.solver import Program, indices
from lowland.weakness.verify import certifies, classifies_training, exact_classes, sure_classes

_STACK = 10  # settled pairs kept as constraints: more of them, and the next one fails more often
_SLACK = 1e-2  # of the smallest margin, kept where one class moves alone
_BOX = 1e2  # how far one class may move, in multiples of the largest weight
_FAR = 1e6  # bound on a difference of two classes' weights, met only where nothing bounds it


@dataclass(frozen=True, eq=False)
class Proof:
    """Weights under which inequalities add up to zero; points from -1 on are training points.

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
        layers: Last layers that certainly classify the training points correctly.
        witness: The index of a layer for each feasible pair, else -1.
        proofs: A proof for each infeasible pair.
        undecided: Pairs that nothing settled.
        separable: Whether there is any layer; None if that was not settled.
        refutation: The proof that there is none.
    """

    layers: list[Layer]
    witness: Int[np.ndarray, "unseen classes"]
    proofs: dict[tuple[int, int], Proof]
    undecided: Bool[np.ndarray, "unseen classes"]
    separable: bool | None = None
    refutation: Proof | None = None
    beaten: Bool[np.ndarray, "unseen classes classes"] = field(default_factory=lambda: np.array([]))


def search(cone: Cone) -> Findings:
    """Settle every pair."""
    shape = len(cone.unseen), cone.classes
    findings = Findings(
        layers=[],
        witness=np.full(shape, -1),
        proofs={},
        undecided=np.zeros(shape, bool),
        beaten=np.zeros((*shape, cone.classes), bool),
    )
    start = _separate(cone, findings)
    if findings.separable is None:
        findings.undecided[:] = True
    if start is not None:
        note(cone, findings, start)
        move_one_class(cone, findings, start)
        compare_two_classes(cone, findings)
        _Tour(cone, findings, start).finish()
    return findings


def find_layer(cone: Cone) -> Layer | None:
    """A layer that certainly classifies all training points correctly, if one was found."""
    return _separate(cone, Findings([], np.zeros((0, 0), int), {}, np.zeros((0, 0), bool)))


def note(cone: Cone, findings: Findings, layer: Layer) -> bool:
    """Let a layer settle what it can; whether it certainly classifies the training points."""
    if not np.isfinite(layer).all() or not classifies_training(cone, layer):
        return False
    classes = sure_classes(layer, cone.unseen)
    known = np.flatnonzero(classes >= 0)
    fresh = known[findings.witness[known, classes[known]] < 0]
    if len(fresh):
        findings.witness[fresh, classes[fresh]] = len(findings.layers)
        findings.layers.append(layer)
    scores = cone.unseen @ layer.T
    findings.beaten |= scores[:, :, None] > scores[:, None, :]
    return True


def _open(findings: Findings) -> Bool[np.ndarray, "unseen classes"]:
    """The pairs that are to be settled."""
    open_: Bool[np.ndarray, "unseen classes"] = (findings.witness < 0) & ~findings.undecided
    for pair in findings.proofs:
        open_[pair] = False
    return open_


def _rows(
    cone: Cone,
    points: Float[np.ndarray, "rows coordinates"],
    own: Int[np.ndarray, " rows"],
    against: Int[np.ndarray, " rows"],
) -> Float[np.ndarray, "rows unknowns"]:
    """``(W_own - W_against) z`` as rows in the weights of all classes but the last.

    Adding the same to all classes changes no difference, so that the last one's may be zero.
    """
    rows = np.zeros((len(points), cone.classes, cone.coordinates))
    index = np.arange(len(points))
    rows[index, own] = points
    rows[index, against] = -points
    return rows[:, :-1].reshape(len(points), -1)


def _layer(cone: Cone, unknowns: Float[np.ndarray, " unknowns"]) -> Layer:
    free = unknowns.reshape(cone.classes - 1, cone.coordinates)
    return np.concatenate([free, np.zeros((1, cone.coordinates))])


def _separate(cone: Cone, findings: Findings) -> Layer | None:
    r"""A layer in the cone, or the proof that there is none.

    ``max t``, ``(W_y - W_k) z >= t``, ``t <= 1``, by its dual: ``min tau`` over ``lambda >= 0``
    with ``sum lambda (e_y - e_k) z = 0`` and ``sum lambda + tau = 1``.
    """
    point, against = cone.inequalities()
    rows = _rows(cone, cone.train[point], cone.labels[point], against)
    program = Program(primal=False)
    unknowns = rows.shape[1]
    right = np.concatenate([np.zeros(unknowns), np.ones(1)])
    program.add_rows(np.zeros((unknowns + 1, 0)), right, right)
    program.add_columns(np.eye(1, unknowns + 1, unknowns), np.ones(1))
    program.add_columns(np.column_stack([rows, np.ones(len(rows))]), np.zeros(len(rows)))
    for run in (program.run, program.run_again):
        if not run():
            continue
        if program.objective > 0.5:
            layer = _layer(cone, _toward(program.row_duals()[:-1], rows))
            if classifies_training(cone, layer):
                findings.separable = True
                return layer
        weights = program.values()[1:]
        proof = _prove(cone, point, against, weights)
        if proof is not None:
            findings.separable = False
            findings.refutation = proof
            return None
    return None


def _toward(
    duals: Float[np.ndarray, " unknowns"], rows: Float[np.ndarray, "rows unknowns"]
) -> Float[np.ndarray, " unknowns"]:
    """Multipliers in the sign under which they are a solution."""
    return duals if (rows @ duals).sum() > 0 else -duals


def _prove(
    cone: Cone,
    point: Int[np.ndarray, " rows"],
    against: Int[np.ndarray, " rows"],
    weights: Float[np.ndarray, " rows"],
    pair: tuple[int, int] | None = None,
) -> Proof | None:
    """A verified proof from a solver's weights, or None."""
    for threshold in (1e-13, 1e-9, 1e-6):
        kept = weights > threshold * max(float(weights.max(initial=0.0)), 1e-300)
        if not kept.any():
            return None
        proof = Proof(point[kept], against[kept], weights[kept])
        if proves(cone, proof, pair):
            return proof
    return None


def proves(cone: Cone, proof: Proof, pair: tuple[int, int] | None) -> bool:
    """Whether a proof certainly holds, without a solver."""
    own, train = cone.labels[proof.point], cone.train[proof.point]
    raw = cone.raw_train[proof.point]
    if pair is not None:
        unseen, label = pair
        new = proof.point < 0
        own = np.where(new, label, own)
        train = np.where(new[:, None], cone.unseen[unseen], train)
        raw = np.where(new[:, None], cone.raw_unseen[unseen], raw)
    return certifies(train, raw, own, proof.against, proof.weight)


def move_one_class(cone: Cone, findings: Findings, layer: Layer) -> None:
    """Let one class's scores reach as far as they can, toward each point that it lacks.

    With the other classes fixed, ``max W_c z`` over the layers in the cone has only the weights of
    class c as unknowns.
    """
    layer = layer / np.abs(layer).max()
    scores = cone.train @ layer.T
    index = np.arange(len(scores))
    own = scores[index, cone.labels]
    rivals = scores.copy()
    rivals[index, cone.labels] = -np.inf
    slack = _SLACK * float((own - rivals.max(axis=1)).min())
    count, size = cone.train.shape
    program = Program(primal=True)
    everything = np.full(count, np.inf)
    program.model.addVars(size, np.full(size, -_BOX), np.full(size, _BOX))
    program.add_rows(cone.train, -everything, everything)
    rows, columns = indices(0, count), indices(0, size)
    for label in range(cone.classes):
        mine = cone.labels == label
        others = scores.copy()
        others[:, label] = -np.inf
        lower = np.where(mine, others.max(axis=1) + slack, -np.inf)
        program.model.changeRowsBounds(count, rows, lower, np.where(mine, np.inf, own - slack))
        for unseen in np.flatnonzero(findings.witness[:, label] < 0):
            if findings.witness[unseen, label] >= 0:  # settled on the way
                continue
            program.model.changeColsCost(size, columns, -cone.unseen[unseen])
            if program.run():
                moved = layer.copy()
                moved[label] = program.values()
                note(cone, findings, moved)


def compare_two_classes(cone: Cone, findings: Findings) -> None:
    """Find proofs that need the training points of two classes only.

    With ``v = W_c - W_k``: ``max v z`` where ``v`` separates the training points of c from those of
    k. If it is negative, no layer puts ``z`` into c before k. Only classes k that beat c at ``z``
    in every layer so far come into question.
    """
    size = cone.coordinates
    open_ = _open(findings)
    for label in range(cone.classes):
        for rival in range(cone.classes):
            questions = np.flatnonzero(open_[:, label] & ~findings.beaten[:, label, rival])
            point = np.flatnonzero((cone.labels == label) | (cone.labels == rival))
            if rival == label or not len(questions) or not len(point):
                continue
            first = cone.labels[point] == label
            rows = np.where(first[:, None], 1.0, -1.0) * cone.train[point]
            program = Program(primal=True)
            program.model.addVars(size, np.full(size, -_FAR), np.full(size, _FAR))
            program.add_rows(rows, np.ones(len(rows)), np.full(len(rows), np.inf))
            against = np.append(np.where(first, rival, label), rival)
            for unseen in questions:
                program.model.changeColsCost(size, indices(0, size), -cone.unseen[unseen])
                if not program.run() or program.objective <= 0:
                    continue
                weights = np.append(np.abs(program.row_duals()), 1.0)
                pair = int(unseen), label
                proof = _prove(cone, np.append(point, -1), against, weights, pair)
                if proof is not None:
                    findings.proofs[pair] = proof
                    open_[pair] = False


class _Tour:
    r"""The pairs that are left, one after another, in one program.

    ``max t`` over ``(W_y - W_k) z_i >= 1``, ``(W_c - W_k) z >= t`` and ``t <= 1`` is 1 where the
    pair is feasible and negative where it is not. It is solved by its dual, in which rows are
    columns: ``min tau - sum lambda``, with ``sum mu + tau = 1`` for the pair's weights ``mu``. A
    pair that is settled becomes a training point: its columns leave the last row and take part in
    the sum of ``lambda``, and the basis stays optimal, since ``tau`` alone is in that row then.
    """

    def __init__(self, cone: Cone, findings: Findings, start: Layer) -> None:
        self.cone, self.findings, self.start = cone, findings, start
        self.point, self.against = cone.inequalities()
        rows = _rows(cone, cone.train[self.point], cone.labels[self.point], self.against)
        self.rows = rows
        self.unknowns = rows.shape[1]
        self.program = Program(primal=False)
        right = np.concatenate([np.zeros(self.unknowns), np.ones(1)])
        self.program.add_rows(np.zeros((self.unknowns + 1, 0)), right, right)
        self.program.add_columns(np.eye(1, self.unknowns + 1, self.unknowns), np.ones(1))
        training = np.column_stack([rows, np.zeros(len(rows))])
        self.program.add_columns(training, -np.ones(len(rows)))
        self.first = 1 + len(rows)  # the column of the first pair
        self.program.run()
        self.basis = self.program.model.getBasis()
        self.stack = 0  # how many pairs are training points
        self.tried: Bool[np.ndarray, " unseen"] = np.zeros(len(cone.unseen), bool)
        self.layer = start

    def finish(self) -> None:
        """Settle every pair that is open."""
        while True:
            open_ = _open(self.findings)
            if not open_.any():
                return
            if not open_[~self.tried].any():
                self._start_over()
            self._settle(self._closest(open_ & ~self.tried[:, None]))

    def _closest(self, candidates: Bool[np.ndarray, "unseen classes"]) -> tuple[int, int]:
        """The pair that the last layer comes closest to."""
        scores = self.cone.unseen @ self.layer.T
        second, first = np.partition(scores, -2, axis=1)[:, -2:].T[:, :, None]
        lead = scores - np.where(scores == first, second, first)
        best = np.where(candidates, lead, -np.inf).argmax()
        unseen, label = np.unravel_index(best, lead.shape)
        return int(unseen), int(label)

    def _settle(self, pair: tuple[int, int]) -> None:
        unseen, label = pair
        against = np.flatnonzero(np.arange(self.cone.classes) != label)
        point = np.repeat(self.cone.unseen[unseen][None], len(against), axis=0)
        rows = _rows(self.cone, point, np.full(len(against), label), against)
        first = self.program.model.getNumCol()
        self.program.add_columns(np.column_stack([rows, np.ones(len(rows))]), np.zeros(len(rows)))
        if self._look(pair, against, again=False):
            if self.findings.witness[pair] >= 0 and self.stack < _STACK:
                self._keep(first, len(against))
                self.tried[unseen] = True
                return
        elif not self.stack and not self._look(pair, against, again=True):
            self.findings.undecided[pair] = True
        self._start_over()

    def _keep(self, first: int, count: int) -> None:
        """Let the pair that was settled last be a training point from now on."""
        model = self.program.model
        for column in range(first, first + count):
            model.changeCoeff(self.unknowns, column, 0.0)
        model.changeColsCost(count, indices(first, first + count), -np.ones(count))
        self.stack += 1

    def _start_over(self) -> None:
        """Take all pairs away, and go back to the first basis."""
        model = self.program.model
        model.deleteCols(model.getNumCol() - self.first, indices(self.first, model.getNumCol()))
        model.setBasis(self.basis)
        self.stack = 0
        self.tried[:] = False
        self.layer = self.start

    def _look(self, pair: tuple[int, int], against: Int[np.ndarray, " k"], *, again: bool) -> bool:
        """Solve, and see whether that settles the pair."""
        found = self.program.run_again() if again else self.program.run()
        if not found:
            return False
        if self.program.objective > 0.5:
            layer = _layer(self.cone, _toward(self.program.row_duals()[:-1], self.rows))
            if not note(self.cone, self.findings, layer):
                return False
            self.layer = layer
            if self.findings.witness[pair] >= 0:
                return True
            return self._witness_exactly(layer, pair)
        if self.stack:
            return False
        weights = self.program.values()[1:]
        point = np.append(self.point, np.full(len(against), -1))
        proof = _prove(self.cone, point, np.append(self.against, against), weights, pair)
        if proof is not None:
            self.findings.proofs[pair] = proof
        return proof is not None

    def _witness_exactly(self, layer: Layer, pair: tuple[int, int]) -> bool:
        unseen, label = pair
        cone = self.cone
        raw = cone.raw_unseen[unseen : unseen + 1]
        if exact_classes(layer, raw, cone.center, cone.scale)[0] != label:
            return False
        self.findings.witness[pair] = len(self.findings.layers)
        self.findings.layers.append(layer)
        return True

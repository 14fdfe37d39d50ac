r"""Which pairs of an unseen point and a class are feasible, with few and small linear programs.

Steps through the interior of the cone, toward many pairs at a time, find nearly every pair that is
feasible; each layer on the way classifies *every* unseen point. Toward a pair that is not feasible
they say which inequalities keep it from being so, and a program of these alone gives the proof.
What is left goes through the program of all inequalities.

Nothing here is taken on trust: :mod:`lowland.weakness.verify` decides.
"""

from __future__ import annotations

import numpy as np

from lowland.weakness.barrier import Interior
from lowland.weakness.cone import Cone, Layer
from lowland.weakness.findings import Findings
from lowland.weakness.programs import decide, find_layer, refute
from lowland.weakness.refine import refine

_PATIENCE = 20  # pairs in a row that nothing settles, before all others are given up
_STEPS = 40
_DOUBT = 0.02  # share of negative weights below which the others are worth a program
_SURE = 1e-6  # and below which no step will help


def search(cone: Cone) -> Findings:
    """Settle every pair."""
    findings = Findings(cone)
    start = find_layer(findings)
    if start is not None:
        _walk(findings, start)
        futile = 0
        for unseen, label in np.argwhere(findings.open).tolist():
            if findings.open[unseen, label] and futile < _PATIENCE:
                pair = unseen, label
                settled = decide(findings, pair) or refine(findings, pair, start)
                futile = 0 if settled else futile + 1
    return findings


def _walk(findings: Findings, start: Layer) -> None:
    """Settle what steps through the interior can."""
    interior = Interior(findings.cone, start)
    findings.note(interior.to_cone(interior.center[None]))
    findings.note(interior.escapes())
    todo = np.argwhere(findings.open)
    while len(todo := todo[findings.open[tuple(todo.T)]]):
        attempts = interior.start(*todo[: interior.together].T)
        todo = todo[interior.together :]
        for _ in range(_STEPS):
            if not len(attempts):
                break
            attempts, closest, weights = interior.step(attempts)
            findings.note(closest)
            doubt = weights.doubt()
            pairs = list(zip(attempts.unseen.tolist(), attempts.label.tolist(), strict=True))
            for index in np.flatnonzero(doubt < _DOUBT).tolist():
                if findings.open[pairs[index]]:
                    refute(findings, pairs[index], *weights.support(index))
            going = doubt >= _SURE
            attempts = attempts.only(going & findings.open[attempts.unseen, attempts.label])

"""In which order pairs are settled, and when the rest is given up."""

import numpy as np
import torch

from lowland.weakness import search
from lowland.weakness.cone import build_cone
from lowland.weakness.findings import Findings
from lowland.weakness.programs import decide

NOTHING = staticmethod(lambda *_: False)


def cone(unseen):
    rng = np.random.default_rng(0)
    train = torch.from_numpy(rng.standard_normal((20, 2)))
    labels = (train @ torch.from_numpy(rng.standard_normal((2, 3)))).argmax(1)
    return build_cone(train, labels, torch.from_numpy(rng.standard_normal((unseen, 2))), 3)


def test_after_twenty_pairs_in_a_row_that_nothing_settles_the_rest_is_left(monkeypatch):
    asked = []
    monkeypatch.setattr(search, "_walk", lambda *_: None)
    monkeypatch.setattr(search, "refine", lambda *_: False)

    def every_fifteenth(findings, pair):
        asked.append(pair)
        return len(asked) == 15

    monkeypatch.setattr(search, "decide", every_fifteenth)
    found = search.search(cone(30))
    assert len(asked) == 15 + 20
    assert found.open.sum() == 90


def test_pairs_that_are_settled_along_the_way_are_not_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(search, "_walk", lambda *_: None)

    def watched(findings, pair):
        assert findings.open[pair]
        asked.append(pair)
        return decide(findings, pair)

    monkeypatch.setattr(search, "decide", watched)
    found = search.search(cone(10))
    assert not found.open.any()
    assert found.hold()
    assert len(asked) < 30


def test_steps_through_the_interior_leave_little_to_programs(monkeypatch):
    monkeypatch.setattr(search, "decide", NOTHING)
    monkeypatch.setattr(search, "refine", NOTHING)
    found = search.search(cone(30))
    assert found.open.sum() <= 2
    assert isinstance(found, Findings)
    assert len(found.proofs) > 0

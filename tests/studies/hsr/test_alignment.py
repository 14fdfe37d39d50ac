"""Directions beside the steepest descent of the largest eigenvalue, held to brute force."""

from dataclasses import replace

import oracle
import pytest
import torch
from study_in_small import PRESET

from lowland.studies.hsr import alignment
from lowland.studies.hsr.tables import tables
from lowland.studies.hsr.task import flatten, samples, start

SMALL = replace(PRESET, hidden=2, train_size=20, draws=2, steps=9)
NETWORK = oracle.Network(2, SMALL.hidden, "sigmoid", "bce")


@pytest.fixture(scope="module")
def found():
    return alignment.alignment(SMALL, flatten(start(SMALL, [50, 51, 52])))


def expected(flat):
    """``bound``, ``trace`` and ``gap`` of one network."""
    x, y = (part[0] for part in samples(SMALL, SMALL.train_size))
    functions = {
        "top": lambda h: torch.linalg.eigvalsh(h)[-1],
        "bound": lambda h: oracle.upper(*oracle.moments(h), len(h)),
        "trace": torch.trace,
    }
    slopes = {name: oracle.gradient(NETWORK, flat, x, y, f) for name, f in functions.items()}
    values = torch.linalg.eigvalsh(NETWORK.hessian(flat, x, y))
    return {
        **{
            name: torch.cosine_similarity(slopes[name], slopes["top"], 0)
            for name in ("bound", "trace")
        },
        "gap": values[-1] / values[-2] if values[-2] > 0 else torch.tensor(torch.inf),
    }


@pytest.mark.parametrize(("place", "seeds"), [("random", range(20)), ("critical", [50, 51, 52])])
def test_cosines_are_those_of_brute_force(found, place, seeds):
    for index, flat in enumerate(flatten(start(SMALL, list(seeds)))):
        for name, value in expected(flat).items():
            mine = found[f"{place}_{name}"]
            assert len(mine) == len(seeds)
            torch.testing.assert_close(mine[index], value.double(), rtol=1e-7, atol=1e-9)


def test_training_goes_by_plain_descent(found):
    assert found["steps"].tolist() == [0, 1, 3]  # 10 steps would be more than the preset has
    x, y = (part[0] for part in samples(SMALL, SMALL.train_size))
    for index, begin in enumerate(flatten(start(SMALL, [0, 1]))):
        flat = begin
        for step in range(4):
            if step in (0, 1, 3):
                for name, value in expected(flat).items():
                    mine = found[f"training_{name}"][[0, 1, 3].index(step), index]
                    torch.testing.assert_close(mine, value.double(), rtol=1e-6, atol=1e-8)
            leaf = flat.detach().requires_grad_()
            (slope,) = torch.autograd.grad(NETWORK.loss_of(leaf, x, y), leaf)
            flat = flat - SMALL.learning_rate * slope


def test_a_lone_positive_eigenvalue_has_no_second_one(monkeypatch):
    monkeypatch.setattr(
        alignment.exact, "hessian", lambda *_, **__: torch.diag(torch.tensor([-1.0, 0, 2]))[None]
    )
    assert alignment._compared(SMALL, start(SMALL, [3]))["gap"].tolist() == [torch.inf]


@pytest.mark.slow
def test_the_table_has_every_network_once(study):
    table = tables(study)["alignment"]
    assert table.columns.tolist() == ["place", "step", "network", "bound", "trace", "gap"]
    found = study.theory["alignment"]
    for place, rows in table.groupby("place"):
        assert rows["bound"].tolist() == found[f"{place}_bound"].flatten().tolist()
        assert not rows.duplicated(["step", "network"]).any()
        assert rows["step"].isna().all() == (place != "training")

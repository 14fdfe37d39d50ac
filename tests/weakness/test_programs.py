"""Linear programs, and what is made of their solutions."""

import numpy as np
import pytest
import torch

from lowland.weakness.cone import build_cone
from lowland.weakness.findings import Findings
from lowland.weakness.programs import decide, find_layer
from lowland.weakness.solver import Program


@pytest.fixture
def findings():
    train = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 3.0]]).double()
    unseen = torch.tensor([[1.0, 1.0], [3.0, 3.0]]).double()
    return Findings(build_cone(train, torch.tensor([0, 0, 0]), unseen, 2))


def settle(findings):
    assert find_layer(findings) is not None
    assert all(decide(findings, (x, c)) for x in (0, 1) for c in (0, 1))
    assert (findings.witness >= 0).tolist() == [[True, False], [True, True]]
    assert findings.hold()


def test_pairs_are_settled_by_all_inequalities(findings):
    settle(findings)


def test_a_solver_may_count_multipliers_with_the_other_sign(findings, monkeypatch):
    plain = Program.multipliers
    monkeypatch.setattr(Program, "multipliers", lambda self: -plain(self))
    settle(findings)


def test_what_a_solver_gives_up_is_solved_once_more(findings, monkeypatch):
    plain, tried = Program.run, set()

    def second_time(program):
        first = id(program) not in tried
        tried.add(id(program))
        return not first and plain(program)

    monkeypatch.setattr(Program, "run", second_time)
    settle(findings)


def test_without_a_solution_there_is_no_optimum():
    columns, cost = np.array([[1.0], [1.0]]), np.array([1.0, 2.0])
    program = Program(columns, cost, np.array([3.0]))
    assert program.run()
    assert program.objective == pytest.approx(3.0)
    assert program.values() == pytest.approx([3.0, 0.0])
    assert not Program(columns, cost, np.array([-3.0])).run()  # all variables are nonnegative

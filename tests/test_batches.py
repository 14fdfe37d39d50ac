"""What may stand for data, and how many samples it holds."""

from collections import OrderedDict, UserDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lowland
from lowland._batches import any_requires_grad, as_pair, digest, rows, to_device

X, Y = torch.randn(6, 3), torch.arange(6)


@pytest.mark.parametrize(
    "value",
    [X, (X, Y), [X], {"a": X, "b": Y}, UserDict(a=X), OrderedDict(a={"b": (X,)}), (1.0, "x", X)],
)
def test_rows_are_those_of_the_first_tensor_never_the_number_of_keys(value):
    assert rows(value, None) == rows(None, value) == 6


def test_rows_of_what_holds_no_tensor_are_asked_for():
    with pytest.raises(TypeError, match=r"rows of the first tensor.*got builtins.str and builtins"):
        rows("text", {"labels": 3})


class Keyed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, batch):
        return self.layer(batch["x"])


def test_a_penalty_per_sample_counts_the_samples_of_a_dictionary():
    criterion = nn.CrossEntropyLoss()
    model, penalty = Keyed(), lowland.FlatnessAware(criterion, 1.0, method="dense")
    plain = lowland.FlatnessAware(criterion, 1.0, method="dense")(model.layer, X, Y % 2)
    torch.testing.assert_close(penalty(model, {"x": X, "length": 6}, Y % 2), plain)


def test_a_pair_is_one_batch_only_with_a_tensor_of_targets():
    assert as_pair((X, Y)) is not None
    assert as_pair([X, Y]) is not None
    assert as_pair([(X, Y), (X, Y)]) is None
    assert as_pair((X, Y, X)) is None


@given(st.integers(0, 5), st.integers(0, 2))
def test_one_other_number_makes_another_digest(row, column):
    other = X.clone()
    other[row, column] += 1
    for wrap in (lambda x: x, lambda x: {"x": x}, lambda x: [x, Y]):
        assert digest(wrap(X)) == digest(wrap(X.clone())) != digest(wrap(other))


def test_tensors_move_and_ask_for_gradients_at_any_depth():
    moved = to_device({"a": (X, [Y]), "b": 3}, torch.device("meta"))
    assert moved["a"][0].device.type == moved["a"][1][0].device.type == "meta"
    assert moved["b"] == 3
    assert any_requires_grad([{"a": [X.clone().requires_grad_()]}])
    assert not any_requires_grad([X, {"a": Y}, None])

"""What may stand for data, and how many samples it holds."""

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import lowland
from lowland._batches import (
    CannotJoinError,
    any_requires_grad,
    as_batch,
    as_batches,
    checked,
    digest,
    join,
    one_batch,
    rows,
    tensors,
    to_device,
)

X, Y = torch.randn(6, 3), torch.arange(6)


@dataclass(frozen=True)
class Record:
    x: torch.Tensor
    y: torch.Tensor
    note: str = "a"


class Slotted:
    __slots__ = ("x", "y")

    def __init__(self, x, y):
        self.x, self.y = x, y


class Keyed:
    """As the batches of graph libraries: keys, items, attributes, and iterable, but no Mapping."""

    def __init__(self, **parts):
        self.__dict__["parts"] = parts

    def __getattr__(self, name):
        try:
            return self.__dict__["parts"][name]
        except KeyError:
            raise AttributeError(name) from None

    def __getitem__(self, name):
        return self.parts[name]

    def __setitem__(self, name, part):
        self.parts[name] = part

    def __copy__(self):
        return Keyed(**self.parts)

    def __iter__(self):
        return iter(self.parts.items())

    def __call__(self, *names):
        return iter(self.parts)

    def keys(self):
        return list(self.parts)


Named = namedtuple("Named", "x y note")  # noqa: PYI024 - as people write them
Pair = namedtuple("Pair", "x y")  # noqa: PYI024
HOLDERS = {
    "dict": lambda x, y: {"x": x, "y": y},
    "UserDict": lambda x, y: UserDict(x=x, y=y),
    "OrderedDict": lambda x, y: OrderedDict(x=x, y=y),
    "namedtuple": lambda x, y: Named(x, y, "a"),
    "dataclass": Record,
    "namespace": lambda x, y: SimpleNamespace(x=x, y=y, note=None),
    "slots": Slotted,
    "keyed": lambda x, y: Keyed(x=x, y=y),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_one_batch_may_hold_inputs_and_targets_in_any_way(name):
    batch = HOLDERS[name](X, Y)
    x, y = as_batch(batch)
    assert x is y is batch
    assert rows(x, y) == rows(x) == 6
    assert [each is some for each, some in zip(tensors(batch), (X, Y), strict=True)] == [True] * 2
    other = HOLDERS[name](X + 1, Y)
    assert digest(batch) == digest(HOLDERS[name](X.clone(), Y.clone())) != digest(other)
    moved = to_device(batch, torch.device("meta"))
    assert type(moved) is type(batch)
    assert {each.device.type for each in tensors(moved)} == {"meta"}
    assert {each.device.type for each in tensors(batch)} == {"cpu"}  # as it was
    assert to_device(batch, torch.device("cpu")) is batch
    both = join(batch, other)
    assert torch.equal(next(tensors(both)), torch.cat([X, X + 1]))


@pytest.mark.parametrize(
    "value",
    [X, (X, Y), [X], {"a": X, "b": Y}, UserDict(a=X), OrderedDict(a={"b": (X,)}), (1.0, "x", X)],
)
def test_rows_are_those_of_tensors_never_the_number_of_keys(value):
    assert rows(value, None) == rows(None, value) == 6


def test_rows_are_those_that_inputs_and_targets_share():
    state = torch.zeros(2, 6, 4)
    assert rows((X, state), Y) == 6
    assert rows(X, {"y": Y, "weights": torch.ones(5)}) == 6
    assert rows(X, [{"y": Y[:2]}, {"y": Y}]) == 6  # targets that are no rows leave it to inputs
    for x, y in (((X, state), None), (X.T, Y)):
        with pytest.raises(TypeError, match=r"have in common.* where it is"):
            rows(x, y)


def test_rows_of_what_holds_no_tensor_are_asked_for():
    with pytest.raises(TypeError, match=r"rows which tensors of x.*builtins.str.*it is none"):
        rows("text", {"labels": 3})


class Keys(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, batch):
        return self.layer(batch["x"])


def test_a_penalty_per_sample_counts_the_samples_of_a_dictionary():
    criterion = nn.CrossEntropyLoss()
    model, penalty = Keys(), lowland.FlatnessAware(criterion, 1.0, method="dense")
    plain = lowland.FlatnessAware(criterion, 1.0, method="dense")(model.layer, X, Y % 2)
    torch.testing.assert_close(penalty(model, {"x": X, "length": 6}, Y % 2), plain)


def test_only_a_penalty_per_sample_needs_their_number():
    ragged = {"x": X, "edges": torch.zeros(2, 9), "y": torch.arange(6) % 2}

    def criterion(output, batch):
        return functional.cross_entropy(output, batch["y"])

    lowland.HSR(criterion, 1.0).loss(Keys(), ragged).backward()
    lowland.HessianTrace(criterion, 1.0)(Keys(), ragged).backward()
    with pytest.raises(TypeError, match="the number of samples is that of the rows"):
        lowland.FlatnessAware(criterion, 1.0)(Keys(), ragged)


def test_a_pair_is_one_batch():
    assert as_batch((X, Y)) == (X, Y)
    assert as_batch([X, Y]) == (X, Y)
    assert as_batch(Pair(X, Y)) == (X, Y)
    assert as_batch((X, (Y, Y))) == (X, (Y, Y))
    assert as_batch((X, None)) == (X, None)
    assert as_batch(({"x": X}, {"y": Y})) == ({"x": X}, {"y": Y})
    assert as_batch([(X, Y), (X, Y)]) is None
    assert as_batch([{"x": X}, {"x": X}]) is None
    assert as_batch((X, Y, X)) is None
    with pytest.raises(TypeError, match=r"may be one batch of several inputs .* or two batches"):
        as_batch(((X, Y), (X, Y)))


class Pairs(Dataset):
    def __len__(self):
        return 100

    def __getitem__(self, index):
        return torch.full((3,), float(index)), index % 2


class OwnLoader:
    """Starts anew in each pass, and is its own iterator."""

    def __init__(self):
        self.x, self.y = X, Y

    def __len__(self):
        return 2

    def __iter__(self):
        self.at = 0
        return self

    def __next__(self):
        if self.at == 2:
            raise StopIteration
        self.at += 1
        return X, Y


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (Pairs(), [64, 36]),
        (Subset(Pairs(), range(70)), [64, 6]),
        (TensorDataset(X, Y), [6]),
        (DataLoader(TensorDataset(X, Y), 4), [4, 2]),
        ([{"x": X}, UserDict(x=X)], [6, 6]),
        ({"x": X}, [6]),
        (OwnLoader(), [6, 6]),
        ([(X, Y)], [6]),
    ],
)
def test_all_that_gives_batches_is_data(data, expected):
    batches = as_batches(data)
    for _ in range(2):
        assert [rows(x, y) for x, y in checked(batches)] == expected


@pytest.mark.parametrize(
    ("batch", "match"),
    [
        ((X, Y, Y), r"length 3: put all that .* \(\(x, \(y, weight\)\) for x, y, weight in loader"),
        ([X], r"length 1: a tensor alone leaves open .* \(x, x\)"),
        (X, "a tensor alone leaves open"),
        ({"text": "a"}, "builtins.dict, in which there is no tensor"),
        ((X, [1, 2]), "y of batch 0 must be a torch.Tensor; got builtins.list"),
    ],
)
def test_what_is_no_batch_is_refused_with_what_is_one(batch, match):
    with pytest.raises(TypeError, match=match):
        list(checked(as_batches([batch])))


def test_a_triple_is_no_data():
    with pytest.raises(TypeError, match=r"tuple of length 3: put all that the criterion takes"):
        as_batches((X, Y, Y))
    with pytest.raises(TypeError, match=r"tuple of length 1: a tensor alone"):
        as_batches((X,))


def test_a_call_for_one_batch_refuses_several():
    assert one_batch(X) == (X, None)
    for several in (
        DataLoader(TensorDataset(X, Y)),
        TensorDataset(X, Y),
        iter([(X, Y)]),
        [(X, Y)] * 3,
        [{"x": X}] * 2,
    ):
        with pytest.raises(TypeError, match=r"this takes one batch.*go through its batches"):
            lowland.HSR(nn.CrossEntropyLoss(), 1.0)(nn.Linear(3, 6), several)


@given(st.integers(0, 5), st.integers(0, 2))
def test_one_other_number_makes_another_digest(row, column):
    other = X.clone()
    other[row, column] += 1
    for wrap in (lambda x: x, lambda x: {"x": x}, lambda x: [x, Y], lambda x: x.to_sparse()):
        assert digest(wrap(X)) == digest(wrap(X.clone())) != digest(wrap(other))


def test_tensors_move_and_ask_for_gradients_at_any_depth():
    moved = to_device({"a": (X, [Y]), "b": 3}, torch.device("meta"))
    assert moved["a"][0].device.type == moved["a"][1][0].device.type == "meta"
    assert moved["b"] == 3
    assert any_requires_grad([{"a": [X.clone().requires_grad_()]}])
    assert not any_requires_grad([X, {"a": Y}, None])


def test_what_holds_itself_is_read_to_its_end():
    batch = SimpleNamespace(x=X)
    batch.me = batch
    assert list(tensors(batch)) == [X]
    assert rows(batch) == 6
    assert digest(batch) == digest(batch)
    assert to_device(batch, torch.device("meta")).x.device.type == "meta"


def test_batches_that_differ_in_more_than_rows_are_not_joined():
    for other in (X[:, :2], X[0], {"x": X}, None):
        with pytest.raises(CannotJoinError):
            join(X, other)
    with pytest.raises(CannotJoinError):
        join({"x": X}, {"y": X})
    joined = join({"x": X, "id": 1, "names": ["a"]}, {"x": X, "id": 2, "names": ["b", "c"]})
    assert joined["names"] == ["a", "b", "c"]
    assert len(joined["x"]) == 12

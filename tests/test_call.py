"""A model is called on what a batch gives it as its own signature says."""

from collections import UserDict

import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel

from lowland._call import arguments, call

X = torch.randn(4, 3)
BATCH = {"input_ids": X, "labels": X + 1}


def model(forward):
    return type("Model", (nn.Module,), {"forward": forward})()


BY_NAME = {
    "all named": lambda self, input_ids, labels: (input_ids, labels),
    "all with defaults": lambda self, input_ids=None, mask=None, labels=None: (input_ids, labels),
    "further ones": lambda self, input_ids=None, mask=None, **rest: (input_ids, rest["labels"]),
    "by name alone": lambda self, *, input_ids, labels: (input_ids, labels),
    "anything": lambda self, *places, **names: (names["input_ids"], names["labels"]),
}
AS_IT_IS = {
    "one": lambda self, batch: (batch["input_ids"], batch["labels"]),
    "one and a setting": lambda self, batch, flag=False: (batch["input_ids"], batch["labels"]),
    "one and anything": lambda self, batch, **rest: (batch["input_ids"], batch["labels"]),
    "one that is not named": lambda self, batch, /: (batch["input_ids"], batch["labels"]),
    "one beside a name of the batch": lambda self, batch, labels=None: (
        batch["input_ids"],
        batch["labels"],
    ),
}
WRAPS = [lambda m: m, lambda m: torch.compile(m, backend="eager"), DataParallel]


@pytest.mark.parametrize("kind", [dict, UserDict])
@pytest.mark.parametrize("name", [*BY_NAME, *AS_IT_IS])
def test_a_mapping_is_named_arguments_or_the_only_one(name, kind):
    found = call(model({**BY_NAME, **AS_IT_IS}[name]), kind(BATCH))
    assert torch.equal(found[0], X)
    assert torch.equal(found[1], X + 1)


@pytest.mark.parametrize("wrap", WRAPS)
def test_wrappers_are_looked_through(wrap):
    for kind, forward in (("named", BY_NAME["all named"]), ("one", AS_IT_IS["one"])):
        places, names = arguments(wrap(model(forward)), BATCH)
        assert (len(places), len(names)) == ((0, 2) if kind == "named" else (1, 0))


@pytest.mark.parametrize(
    ("forward", "match"),
    [
        (lambda self, input_ids, mask: 0, r"batch lacks mask and has labels too: give a batch"),
        (lambda self, input_ids: 0, r"takes \(input_ids\), and the batch has labels too"),
        (lambda self, input_ids=None, mask=None: 0, "batch has labels too: give a batch"),
        (lambda self, batch=None, **rest: 0, "by name, or the batch as 'batch': name the keys"),
    ],
)
def test_where_the_signature_leaves_it_open_it_is_refused(forward, match):
    with pytest.raises(TypeError, match=match):
        call(model(forward), BATCH)


def test_a_tuple_is_several_arguments_where_one_will_not_do():
    assert len(arguments(model(lambda self, a, b: 0), (X, X))[0]) == 2
    assert len(arguments(model(lambda self, a, b, c=None: 0), [X, X])[0]) == 2
    for one in (lambda self, pair: 0, lambda self, a, state=None: 0, lambda self, *parts: 0):
        assert len(arguments(model(one), (X, X))[0]) == 1
    assert arguments(model(lambda self, a, b: 0), (X,)) == (((X,),), {})


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_what_compiled_code_takes_is_not_known():
    traced = torch.jit.trace(nn.Linear(3, 2), X)
    assert arguments(traced, BATCH) == ((BATCH,), {})

"""Every example in a docstring does what it says."""

import doctest
import importlib
import pkgutil

import pytest

import lowland

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(lowland.__path__, "lowland.")
    if not module.name.endswith(("_kernel", "__main__"))
)
EXAMPLES = [
    test
    for name in ["lowland", *MODULES]
    for test in doctest.DocTestFinder().find(importlib.import_module(name))
    if test.examples
]


def test_there_are_examples():
    assert "lowland.engines.hessian_moments" in {test.name for test in EXAMPLES}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda test: test.name)
def test_example(example):
    assert doctest.DocTestRunner().run(example).failed == 0

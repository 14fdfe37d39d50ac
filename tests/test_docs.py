"""Every example in a docstring, in the README and in the recipes does what it says."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

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


@pytest.mark.usefixtures("as_installed")
@pytest.mark.parametrize("page", ["README.md", "docs/recipes.md"])
def test_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some save a figure
    text = (Path(__file__).parents[1] / page).read_text()
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
    assert blocks
    names = {"__name__": "page"}
    for block in blocks:  # one after the other, as a reader runs them
        before = "\n" * (text[: block.start()].count("\n") + 1)  # for the lines of a traceback
        exec(compile(before + block[1], page, "exec"), names)  # noqa: S102

"""Every example in a docstring, in the README and in the recipes does what it says."""

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import lowland
from lowland import activations, criteria

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(lowland.__path__, "lowland.")
    if not module.name.endswith(("_kernel", "__main__"))
)


@pytest.fixture(autouse=True)
def _registries(monkeypatch):
    """What an example registers is forgotten after it."""
    for home, table in ((activations, "ACTIVATIONS"), (activations, "_LAYERS")):
        monkeypatch.setattr(home, table, dict(getattr(home, table)))
    monkeypatch.setattr(criteria, "_CLOSED_FORMS", dict(criteria._CLOSED_FORMS))


def examples_of(module):
    found = doctest.DocTestFinder().find(importlib.import_module(module))
    return [test for test in found if test.examples]


@pytest.mark.parametrize("module", ["lowland", *MODULES])
def test_examples(module):
    torch.manual_seed(0)
    for example in examples_of(module):
        assert doctest.DocTestRunner().run(example).failed == 0, example.name


@pytest.mark.parametrize("package", ["lowland", "lowland.exact", "lowland.weakness"])
def test_public_names_have_an_example_each(package):
    home = importlib.import_module(package)
    for value in (getattr(home, name) for name in home.__all__):
        if not (inspect.isclass(value) or inspect.isroutine(value)):
            continue  # a module, or an alias of a type: these have no docstring of their own
        path = f"{value.__module__}.{value.__qualname__}"
        tested = any(example.name == path for example in examples_of(value.__module__))
        assert tested, path


@pytest.mark.slow
@pytest.mark.usefixtures("as_installed")
@pytest.mark.parametrize("page", ["README.md", "docs/recipes.md", "docs/extending.md"])
def test_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some save a figure
    text = (Path(__file__).parents[1] / page).read_text()
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
    assert blocks
    names = {"__name__": "page"}
    for block in blocks:  # one after the other, as a reader runs them
        before = "\n" * (text[: block.start()].count("\n") + 1)  # for the lines of a traceback
        exec(compile(before + block[1], page, "exec"), names)  # noqa: S102

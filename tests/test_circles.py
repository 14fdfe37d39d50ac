"""No module imports one that imports it: not within functions, and not for annotations alone."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import lowland

ROOT = Path(lowland.__file__).parent


def imported(path, modules):
    """The modules of lowland that a file names in imports, wherever they stand."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lowland"):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in modules else node.module


def test_imports_have_no_circles():
    paths = {
        ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(
            ".__init__"
        ): path
        for path in ROOT.rglob("*.py")
    }
    # The package itself loads its public names when they are used, and nobody's names before.
    graph = {
        name: set(imported(path, paths)) - {"lowland"}
        for name, path in paths.items()
        if name != "lowland"
    }
    assert len(list(TopologicalSorter(graph).static_order())) > 100

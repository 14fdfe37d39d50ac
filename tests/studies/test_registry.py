"""A study is a folder and a line: what CONTRIBUTING says, done."""

import ast
import re
import sys
from importlib import import_module
from importlib.resources import files
from pathlib import Path

import contributing
import pandas as pd
import pytest
from pagecheck import Page
from typer.testing import CliRunner

from lowland.cli.app import commands
from lowland.studies.registry import STUDIES, Study

ORDER = ("ensembles", "runs", "data", "reporting")  # each may import those before it
ASKS = {("illusion", "hsr")}  # its question is put to the other's networks too


@pytest.fixture
def coins(tmp_path, monkeypatch):
    """The study of CONTRIBUTING, in a folder of its own."""
    line, module = contributing.blocks("A study of your own")
    folder = tmp_path / "coins"
    (folder / "presets").mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "presets" / "quick.toml").write_text("coins = 3\nthrows = 100\n")
    (folder / "reproduce.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    study = eval(line.replace("lowland.studies.coins", "coins"), {"Study": Study})  # noqa: S307
    yield study
    for name in ("coins", "coins.reproduce"):
        sys.modules.pop(name, None)


def test_a_study_of_ones_own_runs_goes_on_and_makes_a_page(coins, tmp_path):
    app, out = commands([*STUDIES, coins]), tmp_path / "out"

    def run(*more):
        words = ["reproduce", "coins", "--out", str(out), "--jobs", "1", *more]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output
        return result

    run()
    pieces = sorted((out / "pieces" / "throws").iterdir())
    assert len(pieces) == 3
    page = Page((out / "index.html").read_text())
    assert "coins are fair" in page.text
    heads = pd.read_csv(out / "coins.csv")["heads"].tolist()

    before = [piece.stat().st_mtime_ns for piece in pieces]
    pieces[1].unlink()
    assert "Throwing coins: 3 of 3" in run().stderr
    after = [piece.stat().st_mtime_ns for piece in pieces]
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, False, True]
    assert pd.read_csv(out / "coins.csv")["heads"].tolist() == heads
    assert run("--figure", "1").stdout.strip().endswith("figure-01.svg")


def test_help_lists_every_study_and_what_it_reads(coins):
    app = commands([*STUDIES, coins])
    listed = CliRunner().invoke(app, ["reproduce", "--help"]).output
    for study in (*STUDIES, coins):
        assert (study.name in listed) != study.own_options
        words = ["--help"] if study.own_options else ["reproduce", study.name, "--help"]
        shown = " ".join(re.sub(r"[│\s]+", " ", CliRunner().invoke(app, words).output).split())
        assert study.help[:40] in shown
        assert study.files in shown


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_every_study_has_what_its_line_promises(study):
    if study.own_options:
        assert callable(study.command())
        return
    experiment = study.experiment()
    assert experiment.needed(experiment.figures) <= set(experiment.stages)
    for name in ("quick", "paper"):
        assert (files(study.package) / "presets" / f"{name}.toml").is_file()
        assert experiment.load(name).to_dict()


def test_imports_run_one_way():
    root = Path(import_module("lowland.studies").__file__).parent
    for path in root.rglob("*.py"):
        room = path.relative_to(root).parts[0]
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or not node.module:
                continue
            assert not node.module.startswith("lowland.cli"), path
            if not node.module.startswith("lowland.studies.") or room == "registry.py":
                continue
            other = node.module.split(".")[2]
            below = ORDER[: ORDER.index(room)] if room in ORDER else ORDER
            assert other in (room, *below) or (room, other) in ASKS, (path, node.module)

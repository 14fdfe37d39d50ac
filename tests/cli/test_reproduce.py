import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from importlib.metadata import version
from threading import Thread

import pandas as pd
import pytest
from jaxtyping import config
from pagecheck import Page
from study_in_small import PRESET, shorten
from typer.testing import CliRunner

from lowland.cli.app import app
from lowland.studies.hsr import run as run_module
from lowland.studies.hsr.figures import FIGURES

pytestmark = pytest.mark.slow  # on a study that runs for some ten seconds

FIGURE_FILES = {f"figure-{number:02d}.svg" for number in FIGURES}
TABLES = {f"{name}.csv" for name in ("claims", "search", "control", "curves", "alignment", "sweep")}


def run(*arguments):
    return CliRunner().invoke(app, ["reproduce", "hsr", *map(str, arguments)])


def write(preset, path):
    def value(entry):
        return list(entry) if isinstance(entry, tuple) else entry

    path.write_text("".join(f"{key} = {value(v)}\n" for key, v in asdict(preset).items()))
    return path


@pytest.fixture(scope="module")
def toml(tmp_path_factory):
    path = tmp_path_factory.mktemp("presets") / "small.toml"
    return write(PRESET, path)


@pytest.fixture(scope="module")
def finished(toml, tmp_path_factory):
    out = tmp_path_factory.mktemp("results") / "deep" / "er"
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        patch.setattr(config, "jaxtyping_disable", True)  # as installed
        result = run("--preset", toml, "--out", out, "--jobs", 1)
    assert result.exit_code == 0, result.output
    return result, out


@pytest.fixture
def no_work(monkeypatch):
    """Whatever would compute a piece fails."""

    def forbidden(*arguments):
        raise AssertionError("computed again")

    for name in ("search", "control", "alignment", "sweep"):
        monkeypatch.setattr(run_module, name, forbidden)
    theory = dict.fromkeys(run_module._THEORY, forbidden)
    monkeypatch.setattr(run_module, "_THEORY", theory)
    monkeypatch.setattr("lowland.studies.hsr.theory.timing", forbidden)


def pieces(out):
    return {path: path.stat().st_mtime_ns for path in (out / "pieces").rglob("*.safetensors")}


def test_a_run_writes_figures_tables_and_a_page(finished):
    result, out = finished
    assert {path.name for path in out.iterdir()} == {
        "index.html",
        "summary.md",
        "pieces",
        *FIGURE_FILES,
        *TABLES,
    }
    assert result.stdout.endswith(f"The page with all of it: {out / 'index.html'}\n")
    search, control = (pd.read_csv(out / f"{name}.csv") for name in ("search", "control"))
    assert search["seed"].tolist() == list(range(PRESET.seeds))
    kinds = search["kind"].value_counts()
    assert len(control) == 5 * (kinds["sharp"] + kinds["flat"])
    curves = pd.read_csv(out / "curves.csv")
    assert len(curves) == PRESET.checkpoints * len(control)
    last = curves.groupby(["kind", "method", "seed"], sort=False)["lambda_max"].last()
    assert last.tolist() == control["lambda_max"].tolist()
    assert set(pd.read_csv(out / "sweep.csv")["train_size"]) == set(PRESET.sweep_train_sizes)


def test_each_stage_says_when_it_is_done_where_no_bar_can_be(finished):
    result, _ = finished
    lines = result.stderr.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "Timing gradients",
        "Searching critical points",
        "Training and measuring",
    ]
    assert all(re.search(r"(\d+) of \1, \d+ s after the start$", line) for line in lines)


def test_the_page_holds_every_figure_and_every_claim_with_its_verdict(finished, toml):
    _, out = finished
    page = (out / "index.html").read_text()
    parsed = Page(page)
    text = " ".join(parsed.text.split())
    assert parsed.open == []
    assert len(parsed.links) == len(FIGURES)
    assert all(link.startswith("data:image/svg+xml;base64,") for link in parsed.links)
    assert not re.search(r"https?://|@import|url\(|<script|<link|<iframe", page)
    for number, figure in FIGURES.items():
        assert f"Figure {number}. {figure.title}" in text
    claims = pd.read_csv(out / "claims.csv", keep_default_na=False)
    assert set(claims["where"]) == {"text", *(f"figure {number}" for number in FIGURES)}
    for claim in claims.itertuples():
        shown = f"{claim.claim} {claim.published} {claim.found}"
        verdict = "holds" if claim.holds else "not found"
        assert f"{' '.join(shown.replace('λ_', 'λ').split())} {verdict}" in text, claim
    assert f"{claims['holds'].sum()} of {len(claims)} claims hold here" in text
    assert f"lowland reproduce hsr --preset {toml} --out {out}" in text
    assert "sweep_seeds = 5" in text


def test_the_summary_names_every_figures_file_and_every_claim(finished):
    _, out = finished
    text = (out / "summary.md").read_text()
    assert all(f"]({name})" in text for name in FIGURE_FILES)
    for claim in pd.read_csv(out / "claims.csv", keep_default_na=False).itertuples():
        verdict = "**holds**" if claim.holds else "not found"
        row = f"| {claim.where} | {claim.claim} | {claim.published} | {claim.found} | {verdict} |"
        assert row in text


@pytest.mark.usefixtures("no_work")
def test_a_second_run_only_draws_and_draws_the_same(finished, toml, monkeypatch):
    shorten(monkeypatch)
    _, out = finished
    before, there = pieces(out), {path: path.read_bytes() for path in out.glob("*.*")}
    result = run("--preset", toml, "--out", out, "--jobs", 1)
    assert result.exit_code == 0, result.output
    assert pieces(out) == before
    assert {path: path.read_bytes() for path in out.glob("*.*")} == there


@pytest.mark.usefixtures("no_work")
def test_one_figure_is_drawn_alone(finished, toml):
    _, out = finished
    path = out / "figure-12.svg"
    drawn = path.read_bytes()
    path.unlink()
    others = {other: other.stat().st_mtime_ns for other in out.glob("*.*")}
    result = run("--preset", toml, "--out", out, "--figure", 12, "--figure", 12)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{path}\n"
    assert path.read_bytes() == drawn
    assert {other: other.stat().st_mtime_ns for other in out.glob("*.*")} == others | {
        path: path.stat().st_mtime_ns
    }


def test_one_figure_needs_no_more_than_its_stage(toml, tmp_path):
    result = run("--preset", toml, "--out", tmp_path, "--figure", 6, "--figure", 8, "--jobs", 1)
    assert result.exit_code == 0, result.output
    assert [path.stem for path in pieces(tmp_path)] == ["parts"]
    assert {path.name for path in tmp_path.iterdir()} == {
        "figure-06.svg",
        "figure-08.svg",
        "pieces",
    }


@pytest.mark.usefixtures("no_work")
def test_other_settings_in_the_same_folder_are_refused(finished, tmp_path):
    _, out = finished
    other = write(replace(PRESET, hsr_weight=0.7, chunk=5), tmp_path / "small.toml")
    before = pieces(out)
    result = run("--preset", other, "--out", out)
    assert result.exit_code == 2
    assert "holds a run with other settings (" in result.stderr
    assert "hsr_weight is 0.1 there, 0.7 now" in result.stderr
    assert "choose another folder" in result.stderr
    assert result.stderr.count("\n") == 1
    assert pieces(out) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--preset", "huge"],
            "unknown preset 'huge': expected 'paper', 'quick', 'small' or a TOML file",
        ),
        (["--figure", 1], "--figure must be 2 to 17; got 1"),
        (["--jobs", 0], "--jobs must be at least 1; got 0"),
        (["--jobs", 2, "--scheduler", "tcp://x:1"], "--jobs and --scheduler: give one"),
        (["--figure", "two"], "Invalid value for '--figure'"),
    ],
)
def test_bad_options_are_answered_by_one_line(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_scheduler_that_is_not_there_leaves_no_trace(tmp_path):
    pytest.importorskip("distributed")
    result = run("--scheduler", "tcp://127.0.0.1:1", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "no Dask scheduler answers at 'tcp://127.0.0.1:1'" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("out", ["", "."])
def test_the_folder_one_stands_in_is_no_place_for_results(tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    result = run("--out", out)
    assert result.exit_code == 2
    assert "--out must name a folder of its own" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_help_names_the_options():
    runner = CliRunner()
    assert "reproduce" in runner.invoke(app, ["--help"]).stdout
    for arguments in (["reproduce"], ["reproduce", "--help"]):
        result = runner.invoke(app, arguments)
        assert "hsr" in result.stdout
        assert "flatness-aware" in result.stdout
        assert (result.exit_code, result.stderr) == (0, "")
    text = runner.invoke(app, ["reproduce", "hsr", "--help"], env={"COLUMNS": "120"}).stdout
    for option in ("--preset", "--figure", "--out", "--jobs", "--scheduler"):
        assert option in text


# What only a process of its own can show.


def command(*arguments):
    return [sys.executable, "-m", "lowland", "reproduce", "hsr", *map(str, arguments)]


def tensors(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in pieces(out)}


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="nothing kills as surely here")
def test_a_killed_command_goes_on_and_ends_bit_for_bit_like_another(tmp_path):
    """Searching alone, in two processes, which must not outlive the one that started them."""
    preset = write(replace(PRESET, seeds=40, chunk=4, steps=400), tmp_path / "more.toml")
    options = ["--preset", preset, "--figure", 9]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    pause = int.from_bytes(os.urandom(2)) / 2**16  # seconds after the first piece is there
    with subprocess.Popen(command(*options, "--out", killed, "--jobs", 2)) as process:  # noqa: S603
        while process.poll() is None and not list(killed.glob("pieces/search/*.safetensors")):
            time.sleep(0.01)
        time.sleep(pause)
        process.kill()
    assert process.returncode in {-signal.SIGKILL, 0}
    there = tensors(killed)
    assert there
    result = run(*options, "--out", killed, "--jobs", 1)
    assert result.exit_code == 0, result.output
    assert run(*options, "--out", whole, "--jobs", 1).exit_code == 0
    expected = tensors(whole)
    assert len(expected) == math.ceil(40 / 4)
    assert there.items() <= expected.items(), f"after {pause} s"
    assert tensors(killed) == expected, f"after {pause} s"
    assert (killed / "figure-09.svg").read_bytes() == (whole / "figure-09.svg").read_bytes()


def test_a_cluster_that_loses_a_worker_in_mid_run_loses_no_piece(cluster, tmp_path):
    preset = write(replace(PRESET, seeds=40, chunk=4, steps=400), tmp_path / "more.toml")
    options = ["--preset", preset, "--figure", 9]
    far, here = tmp_path / "far", tmp_path / "here"
    workers = [worker.pid for worker in cluster.workers.values()]

    def kill():
        while not list(far.glob("pieces/search/*.safetensors")):
            time.sleep(0.01)
        os.kill(workers[0], signal.SIGKILL)

    killer = Thread(target=kill)
    killer.start()
    result = run(*options, "--out", far, "--scheduler", cluster.scheduler_address)
    killer.join()
    assert result.exit_code == 0, result.output
    assert run(*options, "--out", here, "--jobs", 1).exit_code == 0
    assert len(tensors(far)) == math.ceil(40 / 4)
    assert tensors(far) == tensors(here)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Ctrl-C is another matter here")
def test_an_interruption_is_answered_by_one_line(tmp_path):
    preset = write(replace(PRESET, seeds=400, chunk=4, steps=4000), tmp_path / "long.toml")
    arguments = command("--preset", preset, "--figure", 9, "--out", tmp_path / "out", "--jobs", 2)
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as process:  # noqa: S603
        while process.poll() is None and not list(tmp_path.glob("out/pieces/search/*")):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == (
        f"Stopped; what was finished is in {tmp_path / 'out'}, and the same command goes on from "
        "there.\n"
    )


def test_settings_say_which_version_wrote_them(finished):
    _, out = finished
    assert f'"lowland": "{version("lowland")}"' in (out / "pieces" / "settings.json").read_text()

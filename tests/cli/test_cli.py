import html
import os
import re
import select
import shlex
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from lowland.cli.app import app
from lowland.studies.ensembles.training import METHODS
from lowland.studies.reporting import look

OUTPUTS = {
    "summary.csv",
    "networks.csv",
    "history.csv",
    *(f"{name}.{kind}" for name in ("curves", "spectrum", "bound") for kind in ("png", "svg")),
    "index.html",
}
SMALL = ["--target", "kind", "--hidden", "2", "--seeds", "3", "--steps", "8"]


def run(*arguments):
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    random = np.random.default_rng(0)
    frame = pd.DataFrame(random.normal(size=(40, 3)), columns=["a", "b b", "c"])
    frame["kind"] = np.where(frame["a"] + random.normal(size=40) > 0, "yes", "no")
    path = tmp_path_factory.mktemp("data") / "my table.csv"
    frame.to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def finished(table, tmp_path_factory):
    out = tmp_path_factory.mktemp("results") / "deep" / "er"
    result = run(table, *SMALL, "--out", out)
    assert result.exit_code == 0, result.output
    return result, out


def test_a_run_writes_everything_and_says_where(finished):
    result, out = finished
    assert {path.name for path in out.iterdir()} == OUTPUTS
    assert all(path.stat().st_size > 0 for path in out.iterdir())
    assert [path.name for path in out.parent.iterdir()] == ["er"]
    assert result.stdout.endswith(f"The page with all of it: {out / 'index.html'}\n")
    for method in METHODS.values():
        assert method.title in result.stdout
    for measure in ("Test accuracy, %", "Test macro-F1, %", "Test log-loss", "λ_max", "λ_min"):
        assert measure in result.stdout
    for measure in ("Upper bound", "Lower bound", "Trace", "Seconds"):
        assert measure in result.stdout


def test_without_a_terminal_there_is_no_progress_bar(finished):
    result, _ = finished
    assert result.stderr == ""
    assert "\x1b" not in result.stdout


def test_no_number_is_cut_on_a_narrow_terminal(finished):
    result, _ = finished
    assert "…" not in result.stdout


@pytest.mark.slow
def test_the_printed_command_repeats_the_run_to_the_last_bit(finished, tmp_path):
    _, out = finished
    page = (out / "index.html").read_text()
    code = re.search(r"<pre><code>(.*)</code></pre>", page, re.DOTALL)[1]
    words = shlex.split(html.unescape(re.sub(r"<[^>]*>", "", code)))
    assert words[:2] == ["lowland", "compare"]
    assert words[words.index("--out") + 1] == str(out)
    words[words.index("--out") + 1] = str(tmp_path / "again")
    result = run(*words[2:])
    assert result.exit_code == 0, result.output
    # All but the seconds, which the summary and the page have.
    for name in OUTPUTS - {"summary.csv", "index.html"}:
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes(), name


@pytest.mark.slow
def test_options_reach_the_run(table, tmp_path):
    result = run(
        table, "--target", "kind", "--methods", "hessian-trace", "--weight", "hessian-trace=0.5",
        "--hidden", 3, "--seeds", 2, "--first-seed", 7, "--steps", 4, "--active", 1,
        "--learning-rate", 0.3, "--test-size", 0.4, "--activation", "tanh", "--out", tmp_path,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    networks = pd.read_csv(tmp_path / "networks.csv")
    assert networks["method"].tolist() == ["baseline"] * 2 + ["hessian-trace"] * 2
    assert networks["seed"].tolist() == [7, 8] * 2
    assert pd.read_csv(tmp_path / "history.csv")["step"].max() == 4
    page = (tmp_path / "index.html").read_text()
    assert "--weight hessian-trace=0.5" in page
    for words in ("3 hidden units (tanh)", "40 % for testing", "learning rate 0.3", "w = 0.5<"):
        assert words in page


@pytest.fixture(scope="module")
def three_classes(tmp_path_factory):
    random = np.random.default_rng(1)
    frame = pd.DataFrame(random.normal(size=(60, 2)), columns=["a", "b"])
    frame["odd"] = random.random(60) > 0.5  # true and false in words
    scores = frame[["a", "b"]].assign(c=-frame["a"]) + 0.3 * random.normal(size=(60, 3))
    frame["kind"] = np.array(["red", "green", "blue"])[scores.to_numpy().argmax(1)]
    path = tmp_path_factory.mktemp("data") / "three.csv"
    frame.to_csv(path, index=False)
    return path


@pytest.mark.slow
def test_more_classes_and_more_layers(three_classes, tmp_path):
    result = run(
        three_classes, "--target", "kind", "--hidden", "3, 2", "--activation", "tanh",
        "--seeds", 2, "--steps", 60, "--active", 0.1, "--out", tmp_path,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    networks = pd.read_csv(tmp_path / "networks.csv")
    assert (networks["upper_bound"] >= networks["lambda_max"]).all()
    assert networks.query("method == 'baseline'")["accuracy"].between(0.5, 1).all()
    page = (tmp_path / "index.html").read_text()
    assert "3 inputs, 3 + 2 hidden units (tanh), 3 logits: 29 parameters" in page
    assert "classes blue (" in page
    assert "--hidden 3,2" in page


@pytest.mark.slow
def test_digits_need_no_file(tmp_path):
    result = run(
        "--data", "digits", "--hidden", 2, "--seeds", 2, "--steps", 3, "--out", tmp_path
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "Handwritten digits" in result.stdout
    networks = pd.read_csv(tmp_path / "networks.csv")
    assert len(networks) == 2 * len(METHODS)
    assert networks.select_dtypes("number").notna().all(axis=None)
    page = (tmp_path / "index.html").read_text()
    assert "1797 samples, 64 features, classes 0 (178), 1 (182)," in page
    assert "64 inputs, 2 hidden units (sigmoid), 10 logits: 160 parameters" in page
    assert "--data digits" in page


GOOD = "a,t\n" + "\n".join(f"{i},{i % 2}" for i in range(30))
BAD_INPUTS = {
    "missing file": (["none.csv", "--target", "t"], "there is no file 'none.csv'"),
    "directory": ([".", "--target", "t"], "cannot read '.': Is a directory"),
    "no target": (["good.csv"], "which column of 'good.csv' to predict? add --target COLUMN"),
    "target alone": (["--target", "t"], "--target needs a CSV file: lowland compare DATA.CSV"),
    "unknown target": (
        ["good.csv", "--target", "x"],
        "no column 'x' in 'good.csv'; its columns are 'a', 't'",
    ),
    "text": (["text.csv", "--target", "t"], "column 'a' must hold numbers; it has text in row 2"),
    "small": (
        ["small.csv", "--target", "t"],
        "4 rows (1 of class '1', 3 of class '0') are too few",
    ),
    "unknown data": (
        ["--data", "mnist"],
        "unknown data 'mnist'; expected one of breast-cancer, digits, or a file: lowland compare",
    ),
    "two sources": (["good.csv", "--target", "t", "--data", "digits"], "'good.csv': give one"),
    "target of digits": (["--data", "digits", "--target", "t"], "--target needs a CSV file"),
    "method": (
        ["--methods", "hsr,sam"],
        "unknown method 'sam'; expected some of baseline, hsr, hessian-trace, flatness-aware",
    ),
    "no method": (["--methods", ""], "unknown method ''; expected some of baseline"),
    "method twice": (["--methods", "hsr,hsr"], "method 'hsr' is named twice in --methods"),
    "activation": (["--activation", "step"], "unknown activation 'step'; expected one of identity"),
    "weight of nothing": (["--weight", "baseline=1"], "expected METHOD=VALUE with a penalty"),
    "weight in words": (["--weight", "hsr=much"], "a number of at least 0; got 'much'"),
    "weight below": (["--weight", "hsr=-1"], "a number of at least 0; got '-1'"),
    "weight without": (["--weight", "hsr"], "a number of at least 0; got ''"),
    "weight twice": (["--weight", "hsr=1", "--weight", "hsr=2"], "'hsr' already has a weight"),
    **{
        f"hidden {text!r}": (
            ["--hidden", text],
            f"the units of each hidden layer, from 1, as 32 or 32,16; got {text!r}",
        )
        for text in ("0", "", "many", "32,", "4.5", "32,0", "-3", "32;16")
    },
    "seeds": (["--seeds", "1"], "--seeds must be between 2 and 10000; got 1"),
    "many seeds": (
        ["--seeds", "1000000000"],
        "--seeds must be between 2 and 10000; got 1000000000",
    ),
    "too wide": (
        ["--hidden", "1000000"],
        "30 features and 1000000 hidden units make 32000001 parameters; exact eigenvalues are",
    ),
    "too deep": (
        ["--data", "digits", "--hidden", "64,64,64"],
        "64 features and 64 + 64 + 64 hidden units make 13130 parameters; exact eigenvalues are",
    ),
    "first seed": (["--first-seed", "-1"], "--first-seed must be between 0 and 2^32; got -1"),
    "steps": (["--steps", "0"], "--steps must be at least 1; got 0"),
    "rate": (["--learning-rate", "0"], "--learning-rate must be positive; got 0"),
    "rate NaN": (["--learning-rate", "nan"], "--learning-rate must be positive; got nan"),
    "active": (["--active", "1.5"], "--active must be between 0 and 1; got 1.5"),
    "test size": (["--test-size", "1"], "--test-size must be between 0 and 1; got 1"),
    "no number": (["--steps", "many"], "Invalid value for '--steps': "),
    "unknown option": (["--sedes", "3"], "No such option: --sedes"),
    "option without value": (["--target"], "Option '--target' requires an argument; see lowland"),
    "two files": (["a.csv", "b.csv"], "unexpected extra argument"),
    "out nowhere": (["--out", ""], "--out must name a folder of its own; got '.'"),
    "out is a file": (["--out", "good.csv"], "cannot write to the folder 'good.csv': '"),
    "out below a file": (["--out", "good.csv/x"], "is not a folder; name another one"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_input_ends_in_one_line_and_leaves_nothing(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("good.csv").write_text(GOOD)
    Path("text.csv").write_text("a,t\n1,0\nred,1\n")
    Path("small.csv").write_text("a,t\n1,0\n2,0\n3,0\n4,1\n")
    before = sorted(tmp_path.rglob("*"))
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_divergence_ends_in_one_line(table, tmp_path):
    out = tmp_path / "out"
    result = run(table, *SMALL, "--weight", "hsr=1e308", "--learning-rate", 1e6, "--out", out)
    assert result.exit_code == 1
    assert re.fullmatch(r"Error: HSR diverged at step 1; use a smaller .*\n", result.stderr)
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.parametrize("rate", ["1e-12", "1e5"])
def test_extreme_settings_still_give_a_report(table, tmp_path, rate):
    result = run(table, *SMALL, "--learning-rate", rate, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "Warning: 3 of 3 networks by Baseline" in result.stdout
    assert {path.name for path in tmp_path.iterdir()} == OUTPUTS


@pytest.mark.parametrize("where", ["draw", "move"])
def test_an_interruption_while_drawing_or_writing_leaves_nothing(
    table, tmp_path, monkeypatch, where
):
    def interrupted(*args, **settings):
        raise KeyboardInterrupt

    if where == "draw":
        monkeypatch.setattr(look, "render", interrupted)
    else:
        monkeypatch.setattr(Path, "replace", interrupted)
    result = run(table, *SMALL, "--methods", "baseline", "--out", tmp_path / "out")
    assert result.exit_code == 130
    assert result.stderr == "Stopped; nothing was written.\n"
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_after_writing_says_so(table, tmp_path, monkeypatch):
    def interrupted(comparison):
        raise KeyboardInterrupt

    monkeypatch.setattr("lowland.studies.compare.command._show", interrupted)
    result = run(table, *SMALL, "--methods", "baseline", "--out", tmp_path)
    assert result.exit_code == 130
    assert result.stderr == f"Stopped; the results are in {tmp_path}.\n"
    assert {path.name for path in tmp_path.iterdir()} == OUTPUTS


def test_help_and_version():
    runner = CliRunner()
    for arguments in ([], ["--help"], ["-h"]):
        result = runner.invoke(app, arguments)
        assert result.exit_code == 0
        assert "compare" in result.stdout
        assert result.stderr == ""
    result = runner.invoke(app, ["compare", "--help"], env={"COLUMNS": "120"})
    assert result.exit_code == 0
    for option in ("--target", "--methods", "--hidden", "--seeds", "--steps", "--weight", "--out"):
        assert option in result.stdout
    told = " ".join(result.stdout.replace("│", " ").split())
    for words in ("digits", "(hsr=0.3, hessian-trace=0.03, flatness-aware=300", "(4; digits: "):
        assert words in told
    result = runner.invoke(app, ["--version"])
    assert result.stdout == f"lowland {version('lowland')}\n"
    assert runner.invoke(app, ["comprae"]).exit_code == 2


# What only a process of its own can show.


def command(*arguments, flags=()):
    return [sys.executable, *flags, "-m", "lowland", *map(str, arguments)]


@pytest.mark.slow
def test_letters_that_a_stream_lacks_are_no_error(table, tmp_path):
    done = subprocess.run(  # noqa: S603
        command("compare", table, *SMALL, "--methods", "baseline", "--out", tmp_path),
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0
    assert done.stderr == b""
    assert b"?_max" in done.stdout


@pytest.mark.slow
def test_bad_input_in_a_process_of_its_own(tmp_path):
    done = subprocess.run(  # noqa: S603
        command("compare", "none.csv", "--target", "t"),
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == b"Error: there is no file 'none.csv'\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGINT")
def test_ctrl_c_while_modules_load(tmp_path):
    process = subprocess.Popen(  # noqa: S603
        command("compare", "--out", tmp_path / "out", flags=["-X", "importtime"]),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        for line in process.stderr:
            if "torch." in line:  # the first of its modules is loaded, hundreds are not
                process.send_signal(signal.SIGINT)
                break
        rest = [line for line in process.stderr if not line.startswith("import time:")]
        assert rest == ["Stopped; nothing was written.\n"]
        assert process.stdout.read() == ""
    assert process.returncode == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_ctrl_c_on_a_terminal_while_training(table, tmp_path):
    ours, theirs = os.openpty()
    process = subprocess.Popen(  # noqa: S603
        command("compare", table, *SMALL, "--steps", 10**6, "--out", tmp_path / "out"),
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80"},
    )
    os.close(theirs)
    seen = b""
    with process:
        while True:
            if not select.select([ours], [], [], 60)[0]:
                process.kill()
                pytest.fail(f"nothing more after {seen!r}")
            try:
                more = os.read(ours, 4096)
            except OSError:  # the terminal is closed
                break
            if not more:
                break
            if b"Training 4 x 3 networks" in more and b"Training" not in seen:
                process.send_signal(signal.SIGINT)
            seen += more
        assert process.stdout.read() == b""
    os.close(ours)
    assert process.returncode == 130
    assert seen.endswith(b"Stopped; nothing was written.\r\n")
    assert b"Traceback" not in seen
    assert b"\x1b[?25h" in seen  # the cursor is back
    assert list(tmp_path.iterdir()) == []

"""Break lines of the library on purpose, one at a time, and see whether the tests notice.

``mutations.toml`` beside this file names them: lines that choose or that bound. Each is broken in a
copy of ``src``, and the tests named with it must fail there. One whose line or whose tests are no
longer there stops the run before it begins: put the new ones in their place.

    python benchmarks/mutation.py [WORD ...]

With words, such as ``exact/plan spectra/solve``, only those in whose file or line one of them
occurs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path("src/lowland")
LIMIT = 300  # seconds: a line whose breaking makes a test go on for ever is noticed as well


@dataclass(frozen=True)
class Mutation:
    """A text that occurs once in a file of the package, what takes its place, and who notices."""

    file: str
    line: str
    becomes: str
    tests: tuple[str, ...]

    def __str__(self) -> str:
        line, becomes = (" ".join(text.split()) for text in (self.line, self.becomes))
        return f"{self.file}: {line}  ->  {becomes}"

    def apply(self, root: Path) -> str:
        """Break the line in a copy; gives what stood in the file."""
        path = root / PACKAGE / self.file
        text = path.read_text()
        path.write_text(text.replace(self.line, self.becomes))
        return text


def read() -> list[Mutation]:
    listed = tomllib.loads((Path(__file__).parent / "mutations.toml").read_text())["mutation"]
    mutations = [Mutation(**{**each, "tests": tuple(each["tests"])}) for each in listed]
    lost = [each for each in mutations if _source(each.file).count(each.line) != 1]
    if lost:
        sys.exit("not exactly once in the source, so put the new line there:\n" + _lines(lost))
    return mutations


def _source(file: str) -> str:
    path = ROOT / PACKAGE / file
    return path.read_text() if path.exists() else ""


def failures(root: Path, tests: tuple[str, ...], limit: float | None = LIMIT) -> str:
    """What the tests say where they fail with the copy of the package, or take too long."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(root / "src"),
        "PYTHONDONTWRITEBYTECODE": "1",  # two versions of a file in one second look alike
        "CI": "1",  # the same examples each time
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(  # noqa: S603 - what is run stands in this repository
            command,
            cwd=ROOT,
            env=environment,
            check=False,
            capture_output=True,
            text=True,
            timeout=limit,
        )
    except subprocess.TimeoutExpired:
        return "they take too long"
    if done.returncode not in (0, 1):  # not a matter of tests that pass or fail
        sys.exit(done.stdout + done.stderr)
    return done.stdout if done.returncode else ""


def main(words: list[str]) -> None:
    chosen = [each for each in read() if not words or any(word in str(each) for word in words)]
    survived = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        shutil.copytree(ROOT / "src", root / "src", ignore=shutil.ignore_patterns("__pycache__"))
        every = tuple(sorted({test for each in chosen for test in each.tests}))
        if said := failures(root, every, limit=None):
            sys.exit(f"{said}\nthe tests fail as it is; first let them pass")
        for each in chosen:
            start = time.perf_counter()
            text = each.apply(root)
            alive = not failures(root, each.tests)
            (root / PACKAGE / each.file).write_text(text)
            survived += [each] * alive
            verdict = "SURVIVED" if alive else "noticed"
            print(f"{verdict:8} {time.perf_counter() - start:5.0f} s  {each}", flush=True)
    print(f"{len(chosen) - len(survived)} of {len(chosen)} noticed")
    if survived:
        sys.exit("not noticed:\n" + _lines(survived))


def _lines(mutations: list[Mutation]) -> str:
    return "\n".join(f"  {each}" for each in mutations)


if __name__ == "__main__":
    main(sys.argv[1:])

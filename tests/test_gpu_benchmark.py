"""The script for a GPU runs, where there is none on tiny problems."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.py"


@pytest.mark.slow
def test_it_reports_every_order_type_and_penalty(tmp_path):
    out = tmp_path / "gpu.md"
    command = [sys.executable, SCRIPT, "--small", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
    text = out.read_text()
    assert text.count("| parameters |") == text.count("| samples |") == 3
    assert "left out" not in text
    for name in ("float64", "float32, TF32", "HSR", "HessianTrace", "FlatnessAware", "head alone"):
        assert name in text

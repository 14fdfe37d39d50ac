"""The measurements of penalties in trainings: what they share, and that each runs."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def trainings():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import trainings  # noqa: PLC0415

        yield trainings
    finally:
        sys.path.remove(str(BENCHMARKS))


def small(trainings, **settings):
    return trainings.Job("digits", samples=200, width=8, steps=20, **settings)


def test_a_training_is_repeatable_and_plain_ones_learn(trainings):
    once, again = (trainings.train(small(trainings)) for _ in range(2))
    assert once["loss"] == again["loss"] < once["chance"] == math.log(10)
    other = trainings.train(small(trainings, seed=1))
    assert other["loss"] != once["loss"]


def test_a_scale_of_the_loss_with_its_rate_changes_nothing(trainings):
    """Of an optimizer that is linear in the gradient."""
    plain = trainings.train(small(trainings))
    scaled = trainings.train(small(trainings, scale=10.0))
    assert scaled["loss"] == pytest.approx(plain["loss"], rel=1e-3)


def test_noise_draws_its_share_of_labels_anew_and_validates_by_clean_ones(trainings):
    clean = trainings.data_of(trainings.Job("digits", samples=500))
    noisy = trainings.data_of(trainings.Job("digits", samples=500, noise=0.4))
    share = float((clean.y != noisy.y).double().mean())
    assert share == pytest.approx(0.4 * 0.9, abs=0.08)
    assert torch.equal(clean.seen_y, noisy.seen_y)
    assert torch.equal(clean.x, noisy.x)


def test_results_are_kept_and_not_found_again(trainings, tmp_path, monkeypatch):
    out, calls = tmp_path / "out.jsonl", []
    job = small(trainings, method="HSR", settings={"strength": 0.1, "method": "probes"})

    def train(job):
        calls.append(job)
        return {"loss": math.nan, "accuracy": 0.5, "seconds": 1.0}

    monkeypatch.setattr(trainings, "train", train)
    trainings.measured([job, job], out, 1)
    with out.open("a") as file:
        file.write('[{"data": "digi')  # where a run was ended
    found = trainings.measured([job, small(trainings)], out, 1)
    assert calls == [job, small(trainings)]
    assert math.isnan(found[job]["loss"])
    assert len([json.loads(line) for line in out.read_text().splitlines()]) == 2


def test_a_training_that_is_no_number_ends_as_none(trainings):
    result = trainings.train(small(trainings, rate=1e30))
    assert math.isnan(result["loss"])


@pytest.mark.slow
@pytest.mark.parametrize("script", ["stability.py", "strength.py"])
def test_scripts_print_a_table(script, tmp_path):
    out = tmp_path / "out.jsonl"
    command = [sys.executable, BENCHMARKS / script, "--quick", "--out", out]
    if script == "strength.py":
        command += ["--penalties", "HessianTrace"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(  # noqa: S603
        command, capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "| HessianTrace |" in done.stdout
    assert len(out.read_text().splitlines()) > 5

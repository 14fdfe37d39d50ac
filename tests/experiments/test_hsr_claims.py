from dataclasses import replace

import pytest
import torch

from lowland.experiments.hsr import theory
from lowland.experiments.hsr.claims import judge
from lowland.experiments.hsr.preset import load_preset
from lowland.experiments.hsr.run import run_study
from lowland.jobs import Store


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    preset = replace(
        load_preset("quick"),
        seeds=24,
        train_size=40,
        test_size=100,
        steps=120,
        tolerance=0.3,
        checkpoints=3,
        share=0.4,
        chunk=12,
        draws=8,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theory, "TIMED_SAMPLES", (20, 40, 80))
        patch.setattr(theory, "TIMED_HIDDEN", (2, 4))
        patch.setattr(theory, "DESCENT_STEPS", 50)
        return run_study(preset, Store.open(tmp_path_factory.mktemp("run"), preset.to_dict()))


def found(study, text):
    (claim,) = [claim for claim in judge(study) if text in claim.text]
    return claim


def test_every_claim_is_judged_with_a_number(study):
    claims = judge(study)
    assert {claim.figure for claim in claims} == {None, 2, 3, 4, 5, 6, 7, 9, 12, 14}
    assert all(any(letter.isdigit() for letter in claim.found) for claim in claims)


def test_a_claim_stands_and_falls_with_its_numbers(study):
    def with_largest(hsr, trace):
        count = len(study.controlled["sharp", "hsr"]["seed"])
        assert count >= 6  # fewer pairs cannot be significant
        controlled = dict(study.controlled)
        for method, value in (("hsr", hsr), ("hessian-trace", trace)):
            part = dict(controlled["sharp", method])
            part["eigenvalues"] = part["eigenvalues"].clone()
            part["eigenvalues"][:, -1] = value + 0.01 * torch.arange(count)
            controlled["sharp", method] = part
        return replace(study, controlled=controlled)

    text = "HSR ends flatter than Hessian reg."
    assert found(with_largest(0.1, 0.9), text).holds
    assert not found(with_largest(0.9, 0.1), text).holds
    assert not found(with_largest(0.5, 0.5), text).holds


def test_the_spread_part_must_be_larger_more_often_than_not(study):
    text = "spread part"
    assert found(study, text).holds
    parts = study.theory["parts"]
    swapped = {"parts": {"mean": parts["spread"], "spread": parts["mean"]}}
    assert not found(replace(study, theory=study.theory | swapped), text).holds

from dataclasses import replace

import pytest
import torch

from lowland.studies.hsr.boundary import boundary_length
from lowland.studies.hsr.claims import judge

pytestmark = pytest.mark.slow  # on a study that runs for some ten seconds


def claims_with(study, kind, name, values):
    """The study with other results of some methods for one kind of seed."""
    controlled = dict(study.controlled)
    for method, value in values.items():
        controlled[kind, method] = controlled[kind, method] | {name: value}
    return replace(study, controlled=controlled)


def found(study, text):
    (claim,) = [claim for claim in judge(study) if text in claim.text]
    return claim


def test_every_claim_is_judged_with_a_number(study):
    claims = judge(study)
    assert {claim.figure for claim in claims} == {None, *range(2, 18)}
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


@pytest.mark.parametrize(
    ("near", "far", "holds"),
    [(0.99, 0.5, True), (0.99, 0.999, False), (0.94, 0.5, False)],  # aligned, and more than before
)
def test_the_bounds_direction_is_the_steepest_where_most_points_say_so(study, near, far, holds):
    noise = 1e-4 * torch.arange(40, dtype=torch.float64).sin()
    found_there = study.theory["alignment"] | {
        "critical_bound": near + noise,
        "random_bound": torch.cat([far + noise, noise.new_tensor([torch.nan])]),
    }
    changed = replace(study, theory=study.theory | {"alignment": found_there})
    assert found(changed, "steepest descent direction").holds == holds


@pytest.mark.parametrize(
    ("factor", "holds"), [(1.0, True), (1.05, True), (1.2, False), (0.8, False)]
)
def test_as_flat_has_to_be_shown_within_the_margin(study, factor, holds):
    part = study.controlled["sharp", "lambda-max"]
    ratios = factor * (1 + 1e-3 * torch.arange(len(part["seed"]), dtype=torch.float64).sin())
    changed = claims_with(
        study, "sharp", "eigenvalues", {"hsr": ratios[:, None] * part["eigenvalues"]}
    )
    assert found(changed, "as flat as descent on λ_max").holds == holds


def test_the_papers_claims_do_not_ask_our_method(study):
    """Whatever becomes of it."""
    controlled = dict(study.controlled)
    for kind in ("sharp", "flat"):
        part = controlled[kind, "lambda-max"]
        controlled[kind, "lambda-max"] = part | {
            "eigenvalues": 7 * part["eigenvalues"],
            "macro_f1": part["macro_f1"] / 2,
            "parameters": torch.zeros_like(part["parameters"]),
        }
    changed = judge(replace(study, controlled=controlled))
    for old, new in zip(judge(study), changed, strict=True):
        assert (old == new) == ("as flat as" not in old.text)


@pytest.mark.parametrize(("gap", "holds"), [(0.0, True), (0.003, True), (0.005, False)])
def test_alike_has_to_be_shown(study, gap, holds):
    count = len(study.controlled["flat", "hsr"]["seed"])
    noise = 1e-5 * torch.arange(count, dtype=torch.float64)
    scores = {method: 0.8 + noise * (1 + i) for i, method in enumerate(study.preset.methods)}
    scores["hsr"] = scores["hsr"] + gap
    changed = claims_with(study, "flat", "macro_f1", scores)
    assert found(changed, "from flat seeds all methods classify alike").holds == holds


def test_a_saddle_is_where_the_loss_falls(study):
    flat, steep = "HSR stands on none", "A-SAM stands on a saddle"
    count = len(study.controlled["sharp", "hsr"]["seed"])
    minus = torch.full((count, 9), -1.0, dtype=torch.float64)
    # A unit that opens along with its output's weight: to either side the logit grows alike.
    silent = torch.zeros(count, 21, dtype=torch.float64)
    opening = torch.zeros_like(silent)
    opening[:, [5, 10]] = 1.0
    opening[:, 15], opening[:, 16] = -1.0, 2.0
    slope = torch.zeros_like(silent)
    slope[:, 16] = 1.0
    along_nothing = torch.zeros_like(silent)
    along_nothing[:, 0] = 1.0  # a silent unit's weight
    changed = study
    for method, direction in (("a-sam", opening), ("hsr", along_nothing)):
        for name, value in (
            ("parameters", silent),
            ("bottom", direction),
            ("eigenvalues", minus),
            ("curve_loss", torch.full((count, 4), 0.7, dtype=torch.float64)),
        ):
            changed = claims_with(changed, "sharp", name, {method: value})
    assert found(changed, steep).holds
    assert found(changed, flat).holds
    swapped = claims_with(changed, "sharp", "bottom", {"a-sam": along_nothing, "hsr": opening})
    assert not found(swapped, steep).holds
    assert not found(swapped, flat).holds
    assert not found(claims_with(changed, "sharp", "bottom", {"a-sam": slope}), steep).holds


def test_the_boundary_of_a_straight_line_is_as_long_as_the_line(study):
    """One saturated unit: its logit changes sign where ``x_1 + x_2`` does, or ``x_1`` alone."""
    networks = torch.zeros(3, 21, dtype=torch.float64)
    for row, (one, two, threshold) in enumerate([(1, 1, -0.5), (1, 0, -0.5), (1, 1, 1.0)]):
        networks[row, [5, 10]] = 1e-2 * torch.tensor([one, two], dtype=torch.float64)
        networks[row, 15], networks[row, 16] = threshold, 1.0
    lengths = boundary_length(study.preset, networks)
    assert lengths == pytest.approx([1, 2**-0.5, 0], abs=1e-6)


def test_islands_make_a_boundary_longer(study):
    """Two units that are on beyond a line each: a band, with a boundary on either side."""
    band = torch.zeros(1, 21, dtype=torch.float64)
    band[0, [0, 1]] = torch.tensor([-5.0, 5.0], dtype=torch.float64)
    band[0, [5, 6, 10, 11]] = 10.0
    band[0, 15:18] = torch.tensor([-0.5, 1.0, -1.0], dtype=torch.float64)
    (length,) = boundary_length(study.preset, -band)
    assert 1.5 < length < 2

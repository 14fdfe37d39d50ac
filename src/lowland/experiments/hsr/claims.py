"""The paper's claims, each decided by a statistic of our run, never by eye."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from lowland.experiments.hsr.run import Study

SIGNIFICANCE = 0.05

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Claim:
    """One claim and what became of it here.

    Attributes:
        figure: The figure that shows it; None for a number in the text.
        text: The claim, in our words.
        published: The paper's number, if it gives one.
        found: Ours, with the test that decides.
        holds: Whether it holds here.
    """

    figure: int | None
    text: str
    published: str
    found: str
    holds: bool


def judge(study: Study) -> list[Claim]:
    """Every claim of the study that a number can decide."""
    return [
        *_search(study),
        *_gradient(study),
        *_direction(study),
        *_spectrum(study),
        *_accuracy(study),
    ]


def _search(study: Study) -> list[Claim]:
    selection, found = study.selection, study.found
    converged = len(selection.converged) / study.preset.seeds
    distinct = len(selection.distinct) / max(1, len(selection.converged))
    bound = found["upper_bound"][selection.distinct].numpy()
    largest = found["lambda_max"][selection.distinct].numpy()
    rank = stats.spearmanr(bound, largest)
    skew = stats.skewtest(bound) if len(bound) >= 8 else None
    return [
        Claim(
            None,
            "nearly all seeds converge",
            "93.3 %",
            f"{converged:.1%} of {study.preset.seeds}; the settings were chosen for it",
            abs(converged - 0.933) <= 0.02,
        ),
        Claim(
            None,
            "two in five of the converged points are distinct",
            "40.2 %",
            f"{distinct:.1%} of {len(selection.converged)}; the threshold was chosen for it",
            abs(distinct - 0.402) <= 0.05,
        ),
        Claim(
            9,
            "the bound follows the largest eigenvalue closely",
            "",
            f"rank correlation {rank.statistic:.3f}; median ratio {np.median(bound / largest):.2f}",
            bool(rank.statistic > 0.9),
        ),
        Claim(
            9,
            "the histogram of the bound is skewed to the right, with a long tail",
            "",
            f"skewness {stats.skew(bound):.2f}" + (f", {_p(skew.pvalue)}" if skew else ""),
            bool(skew is not None and skew.statistic > 0 and skew.pvalue < SIGNIFICANCE),
        ),
    ]


def _gradient(study: Study) -> list[Claim]:
    timing, agreement = study.theory["timing"], study.theory["agreement"]
    over_samples = timing["samples"].numpy()
    slower = np.concatenate(
        [t[:, 1] / t[:, 2] for t in (over_samples, timing["parameters"].numpy())]
    )
    quadratic, linear = (
        _exponent(over_samples[-3:, 0], over_samples[-3:, column]) for column in (2, 3)
    )
    difference = max(
        float((rows[:, :2] / rows[:, 2:]).max())
        for rows in (agreement["trace"], agreement["trace_sq"])
    )
    fit = study.theory["fit"]
    residual, norm = _numpy(fit["residual"]).ravel(), _numpy(fit["norm"]).ravel()
    fitted = residual <= np.quantile(residual, 0.1)
    leaves = np.median(norm[fitted]) / np.median(norm[~fitted])
    lower = float(stats.mannwhitneyu(norm[fitted], norm[~fitted], alternative="less").pvalue)
    covariance = study.theory["covariance"]
    ends = [0, -1]
    middle = len(covariance["covariance"]) // 2
    grows = {
        name: (covariance[name][ends].mean(0) / covariance[name][middle]).numpy()
        for name in ("identity", "sigmoid")
    }
    more = _greater(np.log(grows["identity"]), np.log(grows["sigmoid"]))
    return [
        Claim(
            2,
            "the analytic gradient is always faster than the numerical one",
            "",
            f"by a factor of {slower.min():.0f} to {slower.max():.0f}",
            bool((slower > 1).all()),
        ),
        Claim(
            2,
            "its cost grows with the square of the samples; by pairs of parameters it does not",
            "n²",
            f"exponents {quadratic:.2f} and {linear:.2f} over the largest three sizes",
            quadratic > 1.3 and linear < 1.05,
        ),
        Claim(
            3,
            "analytic and numerical gradients agree to rounding, for every seed",
            "",
            f"largest relative difference {difference:.0e}",
            difference < 1e-5,
        ),
        Claim(
            4,
            "a sample leaves the gradient of the bound as it is fitted",
            "",
            f"median share of the best-fitted tenth over the others' {leaves:.2f}, {_p(lower)}",
            bool(leaves < 0.5 and lower < SIGNIFICANCE),
        ),
        Claim(
            5,
            "similar inputs sharpen the loss, strongly for linear units, weakly for sigmoid ones",
            "",
            f"‖∇Tr H²‖ at the largest covariance over that at none: median "
            f"{np.median(grows['identity']):.2f} and {np.median(grows['sigmoid']):.2f}, {_p(more)}",
            bool(more < SIGNIFICANCE and np.median(grows["identity"]) > 1),
        ),
    ]


def _direction(study: Study) -> list[Claim]:
    parts, descent = study.theory["parts"], study.theory["descent"]
    larger = (parts["spread"] > parts["mean"]).numpy()
    sign = stats.binomtest(int(larger.sum()), len(larger), alternative="greater")
    eigenvalues = descent["eigenvalues"]
    narrower = (
        (eigenvalues[-1, :, -1] < eigenvalues[0, :, -1])
        & (eigenvalues[-1, :, 0] > eigenvalues[0, :, 0])
        & (descent["upper_bound"][-1] < descent["upper_bound"][0])
        & (descent["lower_bound"][-1] > descent["lower_bound"][0])
    )
    return [
        Claim(
            6,
            "the spread part of the direction is larger than its mean part",
            "",
            f"in {larger.mean():.1%} of {len(larger)} draws, {_p(sign.pvalue)}",
            bool(sign.pvalue < SIGNIFICANCE),
        ),
        Claim(
            7,
            "descent on the bound narrows the spectrum from both ends",
            "",
            f"for {int(narrower.sum())} of {len(narrower)} networks",
            bool(narrower.double().mean() > 0.95),
        ),
    ]


def _spectrum(study: Study) -> list[Claim]:
    def largest(kind: str, method: str) -> Array:
        return _numpy(study.controlled[kind, method]["eigenvalues"][:, -1])

    def lower(better: str, worse: str) -> tuple[str, bool]:
        p = _greater(largest("sharp", worse), largest("sharp", better))
        medians = [np.median(largest("sharp", name)) for name in (better, worse)]
        return f"median λ_max {medians[0]:.3f} against {medians[1]:.3f}, {_p(p)}", p < SIGNIFICANCE

    orders = [
        ("Hessian reg. ends flatter than the baseline", "hessian-trace", "baseline"),
        ("A-SAM ends flatter than Hessian reg.", "a-sam", "hessian-trace"),
        ("HSR ends flatter than Hessian reg.", "hsr", "hessian-trace"),
        ("HSR ends flatter than the baseline", "hsr", "baseline"),
    ]
    claims = [
        Claim(12, f"from sharp seeds {text}", "", *lower(better, worse))
        for text, better, worse in orders
    ]
    tails = {
        method: float(study.controlled["flat", method]["eigenvalues"][:, 0].min())
        for method in study.preset.methods
    }
    rest = min(value for method, value in tails.items() if method != "a-sam")
    return [
        *claims,
        Claim(
            12,
            "from flat seeds A-SAM alone leaves a tail of negative λ_min",
            "",
            f"smallest λ_min {tails['a-sam']:.4f} for A-SAM, {rest:.4f} for the others",
            tails["a-sam"] < 2 * min(rest, 0.0) and tails["a-sam"] < 0,
        ),
    ]


def _accuracy(study: Study) -> list[Claim]:
    def score(kind: str, method: str) -> Array:
        return _numpy(study.controlled[kind, method]["macro_f1"])

    claims = []
    for method, title in (("hsr", "HSR"), ("a-sam", "A-SAM"), ("hessian-trace", "Hessian reg.")):
        p = _greater(score("sharp", method), score("sharp", "baseline"))
        means = score("sharp", method).mean(), score("sharp", "baseline").mean()
        claims.append(
            Claim(
                14,
                f"from sharp seeds {title} classifies better than the baseline",
                "",
                f"mean macro-F1 {means[0]:.4f} against {means[1]:.4f}, {_p(p)}",
                p < SIGNIFICANCE,
            )
        )
    return claims


def _greater(left: Array, right: Array) -> float:
    """The one-sided p-value of Wilcoxon's signed-rank test that ``left`` exceeds ``right``."""
    if np.array_equal(left, right):
        return 1.0
    return float(stats.wilcoxon(left, right, alternative="greater").pvalue)


def _exponent(sizes: Array, seconds: Array) -> float:
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def _numpy(tensor: Tensor) -> Array:
    array: Array = tensor.to(torch.float64).numpy()
    return array


def _p(value: float) -> str:
    if math.isnan(value):
        return "p not defined"
    return "p < 0.001" if value < 0.001 else f"p = {value:.2g}"

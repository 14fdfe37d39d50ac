"""The paper's claims and ours, each decided by a statistic of our run, never by eye."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor

from lowland.studies.hsr.boundary import boundary_length
from lowland.studies.hsr.landscape import REACH, rise
from lowland.studies.hsr.run import Results
from lowland.studies.hsr.sweep import gains
from lowland.studies.hsr.task import samples
from lowland.studies.reporting.numbers import p_value
from lowland.studies.reporting.reproduction import Claim
from lowland.studies.reporting.statistics import (
    SIGNIFICANCE,
    Array,
    all_equivalent,
    equivalent,
    holm,
    interval,
    largest,
    rank_sum_less,
    sign_test,
    signed_rank_greater,
)

F1_MARGIN = 0.004  # the standard error of macro-F1 on 10,000 test samples

FEW = 100  # training samples

ALIGNED = 0.95  # of the steepest step's fall of λ_max, what a step of the same length takes

AS_FLAT = 1.1  # factor between eigenvalues that are called alike

SADDLE = 0.01  # fall of the loss, as a fraction of it, along the bottom eigenvector


def judge(results: Results) -> list[Claim]:
    """Every claim of the study that a number can decide."""
    claims = [
        *_data(results),
        *_search(results),
        *_gradient(results),
        *_direction(results),
        *_training(results),
        *_spectrum(results),
        *_steepest(results),
        *_accuracy(results),
        *_boundaries(results),
        *_sizes(results),
    ]
    return sorted(claims, key=lambda claim: claim.figure or 0)


def _data(results: Results) -> list[Claim]:
    x, y = (part[0] for part in samples(results.preset, results.preset.test_size, test=True))
    classes = [x[y == label] for label in (0, 1)]
    spread = torch.stack([part.T.cov() for part in classes])
    error = (2 / (len(x) / 2)) ** 0.5 * results.preset.variance  # standard, of a sample variance
    off = float((spread - results.preset.variance * torch.eye(2)).abs().max())
    return [
        Claim(
            8,
            "two Gaussians in equal parts, variance 2 on both axes, covariance 0",
            "2, 0",
            f"{len(classes[0]):,} and {len(classes[1]):,} test samples; their covariances are off "
            f"by at most {off:.3f}, {off / error:.1f} standard errors",
            len(classes[0]) == len(classes[1]) and off < 4 * error,
        )
    ]


def _search(results: Results) -> list[Claim]:
    selection, found = results.selection, results.found
    converged = len(selection.converged) / results.preset.seeds
    distinct = len(selection.distinct) / max(1, len(selection.converged))
    bound = found["upper_bound"][selection.distinct].numpy()
    largest = found["lambda_max"][selection.distinct].numpy()
    rank = stats.spearmanr(bound, largest)
    skew = stats.skewtest(bound) if len(bound) >= 8 else None
    return [
        Claim(
            None,
            "nearly all seeds converge",
            "93.3 % (2,799 of 3,000)",
            f"{converged:.1%} of {results.preset.seeds}; the settings were chosen for it",
            abs(converged - 0.933) <= 0.02,
        ),
        Claim(
            None,
            "two in five of the converged points are distinct",
            "40.2 % (1,124 of 2,799)",
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
            f"skewness {stats.skew(bound):.2f}" + (f", {p_value(skew.pvalue)}" if skew else ""),
            bool(skew is not None and skew.statistic > 0 and skew.pvalue < SIGNIFICANCE),
        ),
    ]


def _gradient(results: Results) -> list[Claim]:
    timing, agreement = results.theory["timing"], results.theory["agreement"]
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
    fit = results.theory["fit"]
    residual, norm = _numpy(fit["residual"]).ravel(), _numpy(fit["norm"]).ravel()
    fitted = residual <= np.quantile(residual, 0.1)
    leaves = np.median(norm[fitted]) / np.median(norm[~fitted])
    lower = rank_sum_less(norm[fitted], norm[~fitted])
    covariance = results.theory["covariance"]
    ends = [0, -1]
    middle = len(covariance["covariance"]) // 2
    grows = {
        name: (covariance[name][ends].mean(0) / covariance[name][middle]).numpy()
        for name in ("identity", "sigmoid")
    }
    more = signed_rank_greater(np.log(grows["identity"]), np.log(grows["sigmoid"]))
    return [
        Claim(
            2,
            "the analytic gradient is always faster than the numerical one",
            "",
            f"by a factor of {np.nanmin(slower):.0f} to {np.nanmax(slower):.0f}",
            bool(np.nanmin(slower) > 1),
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
            f"median share of the best-fitted tenth over the others' {leaves:.2f}, "
            f"{p_value(lower)}",
            bool(leaves < 0.5 and lower < SIGNIFICANCE),
        ),
        Claim(
            5,
            "similar inputs sharpen the loss, strongly for linear units, weakly for sigmoid ones",
            "",
            f"‖∇Tr H²‖ at the largest covariance over that at none: median "
            f"{np.median(grows['identity']):.2f} and {np.median(grows['sigmoid']):.2f}, "
            f"{p_value(more)}",
            bool(more < SIGNIFICANCE and np.median(grows["identity"]) > 1),
        ),
    ]


def _direction(results: Results) -> list[Claim]:
    parts, descent = results.theory["parts"], results.theory["descent"]
    larger = (parts["spread"] > parts["mean"]).numpy()
    sign = sign_test(int(larger.sum()), len(larger))
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
            f"in {larger.mean():.1%} of {len(larger)} draws, {p_value(sign)}",
            bool(sign < SIGNIFICANCE),
        ),
        Claim(
            7,
            "descent on the bound narrows the spectrum from both ends",
            "",
            f"for {int(narrower.sum())} of {len(narrower)} networks",
            bool(narrower.double().mean() > 0.95),
        ),
    ]


def _training(results: Results) -> list[Claim]:
    preset = results.preset
    steps = np.array(preset.schedule.checkpoint_steps)
    ends = int(np.searchsorted(steps, preset.schedule.active_steps, side="right")) - 1
    curves = {
        method: _numpy(results.controlled["sharp", method]["curve_lambda_max"])[:, ends]
        for method in ("baseline", "a-sam", "hsr")
    }
    claims = []
    for method, title in (("a-sam", "A-SAM"), ("hsr", "HSR")):
        p = signed_rank_greater(curves["baseline"], curves[method])
        claims.append(
            Claim(
                10,
                f"{title} holds λ_max down while it acts, from sharp seeds",
                "",
                f"median λ_max after {steps[ends]:,} steps {np.median(curves[method]):.3f}, of the "
                f"baseline {np.median(curves['baseline']):.3f}, {p_value(p)}",
                p < SIGNIFICANCE,
            )
        )
    return [*claims, *_lines(results)]


def _lines(results: Results) -> list[Claim]:
    """Figures 11 and 13: the loss itself, along eigenvectors."""

    def change(kind: str, method: str, end: str) -> Array:
        part = results.controlled[kind, method]
        return _numpy(rise(results.preset, part["parameters"], part[end], (-REACH, REACH)))

    steep = {name: change("sharp", name, "top").max(0) for name in results.preset.methods}
    p = largest(signed_rank_greater(steep[name], steep["hsr"]) for name in steep if name != "hsr")
    tails = {name: np.quantile(values, 0.9) for name, values in steep.items()}
    medians = ", ".join(
        f"{results.preset.methods[name].title} {np.median(values):.3f}"
        for name, values in steep.items()
    )
    falls = {}
    for method in ("a-sam", "hsr"):
        kind, worst = results.most_negative(method)
        part = results.controlled[kind, method]
        # The mean of both sides: what is left of a slope falls on one and rises on the other.
        fall = -float(change(kind, method, "bottom")[:, worst].mean())
        falls[method] = max(0.0, fall) / float(part["curve_loss"][worst, -1])
    return [
        Claim(
            11,
            "HSR's minima are consistently the flattest along their top eigenvector",
            "",
            f"median rise of the loss at distance {REACH:g} from sharp seeds: {medians}; HSR's "
            f"90th percentile {tails['hsr']:.3f} against {tails['baseline']:.3f} of the baseline; "
            f"HSR below each other method, largest {p_value(p)}",
            p < SIGNIFICANCE and tails["hsr"] == min(tails.values()),
        ),
        Claim(
            13,
            "where λ_min is most negative, A-SAM stands on a saddle",
            "",
            f"at distance {REACH:g} to both sides along that eigenvector the loss falls by "
            f"{falls['a-sam']:.2%} of itself on average; a saddle is called {SADDLE:.0%}",
            falls["a-sam"] >= SADDLE,
        ),
        Claim(
            13,
            "where λ_min is most negative, HSR stands on none",
            "",
            f"the loss falls by {falls['hsr']:.2%}",
            falls["hsr"] < SADDLE,
        ),
    ]


def _spectrum(results: Results) -> list[Claim]:
    def largest(kind: str, method: str) -> Array:
        return _numpy(results.controlled[kind, method]["eigenvalues"][:, -1])

    def lower(better: str, worse: str) -> tuple[str, bool]:
        p = signed_rank_greater(largest("sharp", worse), largest("sharp", better))
        medians = [np.median(largest("sharp", name)) for name in (better, worse)]
        return (
            f"median λ_max {medians[0]:.3f} against {medians[1]:.3f}, {p_value(p)}",
            p < SIGNIFICANCE,
        )

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
        method: float(results.controlled["flat", method]["eigenvalues"][:, 0].min())
        for method in results.preset.methods
    }
    rest = min(value for method, value in tails.items() if method != "a-sam")
    flat = [float(np.median(largest("flat", method))) for method in results.preset.methods]
    alike = all_equivalent(
        [np.log(largest("flat", method)) for method in results.preset.methods], math.log(AS_FLAT)
    )
    return [
        *claims,
        Claim(
            12,
            "from flat seeds all methods end alike",
            "",
            f"median λ_max {min(flat):.3f} to {max(flat):.3f}; every mean ratio within a factor of "
            f"{AS_FLAT}, {p_value(alike)}",
            alike < SIGNIFICANCE,
        ),
        Claim(
            12,
            "from flat seeds A-SAM alone leaves a tail of negative λ_min",
            "",
            f"smallest λ_min {tails['a-sam']:.4f} for A-SAM, {rest:.4f} for the others",
            tails["a-sam"] < 2 * min(rest, 0.0) and tails["a-sam"] < 0,
        ),
    ]


def _steepest(results: Results) -> list[Claim]:
    """Ours: the bound's direction, and where it leads, beside those of λ_max itself."""
    found = results.theory["alignment"]

    def cosines(place: str, name: str) -> Array:
        values = _numpy(found[f"{place}_{name}"])
        return values[np.isfinite(values)]

    near, far = (cosines(place, "bound") for place in ("critical", "random"))
    # Most critical points above the threshold, and the whole of them above random parameters.
    p = largest([sign_test(int((near > ALIGNED).sum()), len(near)), rank_sum_less(far, near)])
    ends = {
        method: _numpy(results.controlled["sharp", method]["eigenvalues"][:, -1])
        for method in ("hsr", "lambda-max")
    }
    with np.errstate(invalid="ignore", divide="ignore"):  # no ratio of what is not positive
        apart = np.log(ends["hsr"]) - np.log(ends["lambda-max"])
    alike = equivalent(apart, math.log(AS_FLAT))
    below = signed_rank_greater(ends["lambda-max"], ends["hsr"])
    return [
        Claim(
            17,
            "ours: near minima HSR's closed form is the steepest descent direction of λ_max",
            "",
            f"median cosine {np.median(near):.3f} at {len(near):,} critical points, above "
            f"{ALIGNED} at {(near > ALIGNED).mean():.1%} of them, against {np.median(far):.3f} at "
            f"{len(far):,} random parameters, largest {p_value(p)}; of the trace "
            f"{np.median(cosines('critical', 'trace')):.3f} against "
            f"{np.median(cosines('random', 'trace')):.3f}",
            p < SIGNIFICANCE,
        ),
        Claim(
            12,
            "ours: from sharp seeds HSR ends as flat as descent on λ_max itself",
            "",
            f"median λ_max {np.median(ends['hsr']):.3f} against "
            f"{np.median(ends['lambda-max']):.3f}; mean ratio {math.exp(apart.mean()):.3f}, within "
            f"a factor of {AS_FLAT}, {p_value(alike)}; HSR below it, {p_value(below)}",
            alike < SIGNIFICANCE,
        ),
    ]


def _accuracy(results: Results) -> list[Claim]:
    def score(kind: str, method: str) -> Array:
        return _numpy(results.controlled[kind, method]["macro_f1"])

    claims = []
    for method, title in (("hsr", "HSR"), ("a-sam", "A-SAM"), ("hessian-trace", "Hessian reg.")):
        p = signed_rank_greater(score("sharp", method), score("sharp", "baseline"))
        means = score("sharp", method).mean(), score("sharp", "baseline").mean()
        claims.append(
            Claim(
                14,
                f"from sharp seeds {title} classifies better than the baseline",
                "",
                f"mean macro-F1 {means[0]:.4f} against {means[1]:.4f}, {p_value(p)}",
                p < SIGNIFICANCE,
            )
        )
    alike = (
        ("from sharp seeds A-SAM and HSR classify alike", "sharp", ["a-sam", "hsr"]),
        ("from flat seeds all methods classify alike", "flat", list(results.preset.methods)),
    )
    for text, kind, methods in alike:
        scores = [score(kind, method) for method in methods]
        middles = [values.mean() for values in scores]
        p = all_equivalent(scores, F1_MARGIN)
        claims.append(
            Claim(
                14,
                text,
                "",
                f"mean macro-F1 {min(middles):.4f} to {max(middles):.4f}; every mean difference "
                f"within {F1_MARGIN}, {p_value(p)}",
                p < SIGNIFICANCE,
            )
        )
    return claims


def _boundaries(results: Results) -> list[Claim]:
    length = {
        method: boundary_length(results.preset, results.controlled["sharp", method]["parameters"])
        for method in ("baseline", "hsr")
    }
    p = signed_rank_greater(length["baseline"], length["hsr"])
    return [
        Claim(
            15,
            "HSR draws simpler boundaries than the baseline from the same seeds",
            "",
            "median length of the boundary, in units of the best one's, "
            f"{np.median(length['hsr']):.2f} against {np.median(length['baseline']):.2f}, "
            f"{p_value(p)}",
            p < SIGNIFICANCE,
        )
    ]


def _sizes(results: Results) -> list[Claim]:
    """Our figure 16: the paper's claim about accuracy, over the number of training samples."""
    preset = results.preset
    few = [n for n in preset.sweep_train_sizes if n <= FEW] or [min(preset.sweep_train_sizes)]
    many = max(preset.sweep_train_sizes)
    converged = np.mean(
        [float(results.sweep[h, n]["converged"].mean()) for h in preset.sweep_hidden for n in few]
    )
    values = {name: _pooled(results, name, few) for name in preset.sweep_methods}
    arrays: list[Array] = [np.asarray(value, dtype=np.float64) for value in values.values()]
    raw = [signed_rank_greater(array, np.zeros_like(array)) for array in arrays]
    claims = []
    for (name, method), p in zip(preset.sweep_methods.items(), holm(raw), strict=True):
        strength = f"weight {method.weight:g}" if method.weight else f"radius {method.radius:g}"
        middle, low, high = interval(values[name])
        claims.append(
            Claim(
                16,
                f"with at most {max(few)} training samples {method.title} ({strength}) classifies "
                "better than the baseline from sharp seeds",
                "",
                f"mean gain {middle:+.2f} points, 95 % interval {low:+.2f} to {high:+.2f} over "
                f"{len(values[name])} data sets, of whose seeds {converged:.0%} converged; "
                f"{p_value(p)}, adjusted for {len(raw)} comparisons",
                p < SIGNIFICANCE,
            )
        )
    last = {name: _pooled(results, name, [many]) for name in preset.sweep_methods}
    p = largest(equivalent(values.to_numpy() / 100, F1_MARGIN) for values in last.values())
    means = [float(values.mean()) for values in last.values()]
    return [
        *claims,
        Claim(
            16,
            f"with {many:,} training samples the gain is gone",
            "",
            f"mean gains {min(means):+.2f} to {max(means):+.2f} points; every one within "
            f"{100 * F1_MARGIN:g}, {p_value(p)}",
            p < SIGNIFICANCE,
        ),
    ]


def _pooled(results: Results, method: str, sizes: list[int]) -> pd.Series[float]:
    """One gain a data set: those of several sizes, and networks of several widths, share seeds."""
    cells = [
        results.sweep[hidden, size] for hidden in results.preset.sweep_hidden for size in sizes
    ]
    means: pd.Series[float] = (
        pd.concat([gains(cell, method) for cell in cells]).groupby(level=0).mean()
    )
    return means


def _exponent(sizes: Array, seconds: Array) -> float:
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def _numpy(tensor: Tensor) -> Array:
    array: Array = tensor.to(torch.float64).numpy()
    return array

"""One self-contained page from a comparison: words, table, figures, settings, versions."""

from __future__ import annotations

import math
import os
import platform
from base64 import b64encode
from importlib.metadata import version

import jinja2
import torch

from lowland.experiments.compare import MEASURES, SIGNIFICANCE, Comparison, Measure
from lowland.training import Method

PACKAGES = ("lowland", "torch", "numpy", "scipy", "scikit-learn", "pandas", "matplotlib")


def versions() -> dict[str, str]:
    """Of everything that takes part in the numbers."""
    return {
        "Python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads",
    }


def number(value: float) -> str:
    """Three significant digits, without an exponent where people would not write one."""
    if value == 0:
        return "0"
    digits = 2 - math.floor(math.log10(abs(value)))
    return f"{value:.{digits}f}" if 0 <= digits <= 6 else f"{value:.3g}"


def with_error(measure: Measure, mean: float, stderr: float) -> str:
    """``mean ± standard error``, to the digits that the error leaves; shares in percent."""
    mean, stderr = mean * measure.scale, stderr * measure.scale
    if stderr == 0:
        return f"{number(mean)} ± 0"
    # One digit of the error, two if it starts with a 1: a second 9 would say nothing.
    exponent = math.floor(math.log10(stderr))
    digits = max(0, (1 if stderr < 2 * 10.0**exponent else 0) - exponent)
    return f"{mean:.{digits}f} ± {stderr:.{digits}f}"


def p_value(p: float) -> str:
    """``p = 0.034``, or ``p < 0.001``."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}" if p < 0.1 else f"p = {p:.2f}"


def findings(comparison: Comparison) -> list[str]:
    """What the tests say about each method, in words, and what that adds up to."""
    names = [method.name for method in comparison.settings.methods[1:]]
    sentences = [_finding(comparison, method) for method in comparison.settings.methods[1:]]
    if not sentences:
        return ["Only the baseline was trained, so there is nothing to compare it with."]
    better = [name for name in names if _direction(comparison, name, "accuracy") > 0]
    flatter = [name for name in names if _direction(comparison, name, "lambda_max") < 0]
    if not better and flatter:
        sentences.append(
            "On this data, with these settings, a flatter minimum did not come with a measurably "
            "better test accuracy."
        )
    elif not better:
        sentences.append(
            "On this data, with these settings, no method improved test accuracy measurably."
        )
    return sentences


def _direction(comparison: Comparison, method: str, measure: str) -> int:
    """The sign of a difference from the baseline; 0 if the test does not call it one."""
    cell = comparison.cell(method, measure)
    if not cell.p < SIGNIFICANCE:
        return 0
    return 1 if cell.difference > 0 else -1


def _finding(comparison: Comparison, method: Method) -> str:
    curvature = _change(comparison, method, "lambda_max")
    accuracy = _change(comparison, method, "accuracy")
    log_loss = _change(comparison, method, "log_loss")
    return f"{method.title} {curvature}. It {accuracy}. It {log_loss}."


def _change(comparison: Comparison, method: Method, name: str) -> str:
    """``lowered λ_max from … to … (p = …)``, or that it did not."""
    measure = next(measure for measure in MEASURES if measure.name == name)
    cell, base = comparison.cell(method.name, name), comparison.cell("baseline", name)
    before = with_error(measure, base.mean, base.stderr)
    after = with_error(measure, cell.mean, cell.stderr)
    direction = _direction(comparison, method.name, name)
    if direction == 0:
        return (
            f"did not change {measure.symbol} measurably "
            f"({before} without, {after}{measure.unit} with it; {p_value(cell.p)})"
        )
    verb = "raised" if direction > 0 else "lowered"
    return f"{verb} {measure.symbol} from {before} to {after}{measure.unit} ({p_value(cell.p)})"


def table(comparison: Comparison) -> list[tuple[str, list[tuple[str, str]]]]:
    """Rows ``(measure, [(value, p) per method])`` for the terminal and the page alike."""
    methods = comparison.settings.methods
    rows = []
    for measure in MEASURES:
        cells = [comparison.cell(method.name, measure.name) for method in methods]
        rows.append(
            (
                measure.title + (", %" if measure.unit else ""),
                [
                    (
                        with_error(measure, cell.mean, cell.stderr),
                        "" if math.isnan(cell.p) else p_value(cell.p),
                    )
                    for cell in cells
                ],
            )
        )
    seconds = [(f"{comparison.seconds[method.name]:.1f}", "") for method in methods]
    converged = comparison.networks.groupby("method")["converged"].sum()
    stopped = [(f"{converged[m.name]} of {comparison.settings.seeds}", "") for m in methods]
    return [*rows, ("Converged", stopped), ("Seconds", seconds)]


def render_page(comparison: Comparison, figures: dict[str, bytes], *, command: str) -> str:
    """The page as HTML that needs no other file.

    Args:
        comparison: What to report.
        figures: SVG files by name: ``curves``, ``spectrum`` and ``bound``.
        command: What reproduces it.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lowland"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # As data URIs, since identifiers inside several inline SVGs would clash.
    images = {
        name: "data:image/svg+xml;base64," + b64encode(svg).decode()
        for name, svg in figures.items()
    }
    return environment.get_template("compare.html").render(
        comparison=comparison,
        dataset=comparison.dataset,
        settings=comparison.settings,
        schedule=comparison.settings.schedule,
        counts=[int((comparison.dataset.y == label).sum()) for label in (0, 1)],
        measures=MEASURES,
        rows=table(comparison),
        findings=findings(comparison),
        images=images,
        command=command,
        versions=versions(),
        significance=SIGNIFICANCE,
        ratio=_median_ratio(comparison),
    )


def _median_ratio(comparison: Comparison) -> float:
    """How far the bound lies above the eigenvalue, as the median ratio over networks."""
    ratio = comparison.networks["upper_bound"] / comparison.networks["lambda_max"]
    return float(ratio.median())

"""Self-contained HTML pages from templates: one file, which needs no other."""

from __future__ import annotations

import math
import os
import platform
import re
import shlex
from base64 import b64encode
from importlib.metadata import version
from typing import Any

import jinja2
from markupsafe import Markup, escape

PACKAGES = ("lowland", "torch", "numpy", "scipy", "scikit-learn", "pandas", "matplotlib")


MOST_DIGITS = 6
"""More decimals than this are written with an exponent."""


def render(template: str, *, command: str, **content: Any) -> str:
    """A page.

    Args:
        template: One of lowland's.
        command: What makes the page again.
        content: What the template shows.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lowland.studies.reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["subscripts"] = _subscripts
    return environment.get_template(template).render(
        options=_options(command), versions=versions(), **content
    )


def data_uri(svg: bytes) -> str:
    """A figure within the page.

    Not as an element of the page: identifiers inside several inline SVGs would clash.
    """
    return "data:image/svg+xml;base64," + b64encode(svg).decode()


def versions() -> dict[str, str]:
    """Of everything that takes part in the numbers."""
    return {
        "Python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }


def p_value(p: float) -> str:
    """``p = 0.034``, or ``p < 0.001``."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}" if p < 0.1 else f"p = {p:.2f}"


def number(value: float) -> str:
    """Three significant digits, without an exponent where people would not write one."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = 2 - math.floor(math.log10(abs(value)))
    if 0 <= digits <= MOST_DIGITS:
        return f"{value:.{digits}f}"
    return f"{float(f'{value:.3g}'):,.0f}" if 1e3 <= abs(value) < 1e6 else f"{value:.3g}"


def plus_minus(mean: float, stderr: float) -> str:
    """``mean ± standard error``, to the digits that the error leaves."""
    if not math.isfinite(stderr):
        return f"{mean:.3g}"
    if stderr == 0:
        return f"{number(mean)} ± 0"
    # One digit of the error, two if it starts with a 1: a second 9 would say nothing.
    # Rounded before the look, or 0.195 would come out as 0.20.
    first, exponent = f"{stderr:.1e}".split("e")
    digits = max(0, (1 if float(first) < 2 else 0) - int(exponent))
    if digits > MOST_DIGITS or abs(mean) >= 1e7:
        return f"{mean:.2e} ± {stderr:.0e}"
    return f"{mean:.{digits}f} ± {stderr:.{digits}f}"


def _subscripts(text: str) -> Markup:
    """``λ_max`` as people write it."""
    return Markup(re.sub(r"(λ)_(max|min)", r"\1<sub>\2</sub>", str(escape(text))))  # noqa: S704


def _options(command: str) -> list[str]:
    """A command cut before each option: the places where a line may break."""
    groups: list[list[str]] = [[]]
    for word in shlex.split(command):
        if word.startswith("--"):
            groups.append([])
        groups[-1].append(word)
    return [shlex.join(group) for group in groups]

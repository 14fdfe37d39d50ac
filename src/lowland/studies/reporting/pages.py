"""Self-contained HTML pages from templates: one file, which needs no other."""

from __future__ import annotations

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


def render(template: str, *, command: str, **content: Any) -> str:
    """A page.

    Args:
        template: Its place in :mod:`lowland.studies`.
        command: What makes the page again.
        content: What the template shows.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lowland.studies", ""),
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
    """The versions of everything that takes part in the numbers, and the machine, by name."""
    return {
        "Python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }


def _subscripts(text: str) -> Markup:
    """A text for a page in which ``λ_max`` is written with a subscript."""
    return Markup(re.sub(r"(λ)_(max|min)", r"\1<sub>\2</sub>", str(escape(text))))  # noqa: S704


def _options(command: str) -> list[str]:
    """A command cut before each option: the places where a line may break."""
    groups: list[list[str]] = [[]]
    for word in shlex.split(command):
        if word.startswith("--"):
            groups.append([])
        groups[-1].append(word)
    return [shlex.join(group) for group in groups]

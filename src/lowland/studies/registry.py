"""The studies that there are: a line for each, and nothing of them is imported before it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowland.studies.reporting.reproduction import Experiment
else:  # it takes matplotlib and pandas; annotations are looked at in the tests
    Experiment = Any


@dataclass(frozen=True)
class Study:
    """A study, as the command line offers it.

    Attributes:
        name: On the command line, and of its runs' folders.
        help: What it is, in one line.
        package: Its folder. Where ``presets/`` has its settings as TOML files, its module
            ``reproduce`` holds the :class:`Experiment` that ``lowland reproduce NAME`` runs; a
            study with options of its own has the function of ``lowland NAME`` in ``command``, whose
            docstring follows the line of help.
        files: The data that it reads from the folder that ``LOWLAND_DATA`` names, in words.
        own_options: Whether it is of the second kind.
    """

    name: str
    help: str
    package: str
    files: str = ""
    own_options: bool = False

    def experiment(self) -> Experiment:
        """How the study runs, and what it shows."""
        found: Experiment = import_module(f"{self.package}.reproduce").EXPERIMENT
        return found

    def command(self) -> Callable[..., None]:
        """The command of a study with options of its own."""
        found: Callable[..., None] = import_module(f"{self.package}.command").command
        return found


STUDIES = (
    Study(
        "compare",
        "Train on real data with and without curvature control, and compare.",
        "lowland.studies.compare",
        own_options=True,
    ),
    Study(
        "hsr",
        "HSR regularization, arXiv:2606.28662: figures 2 to 15, two of ours, and every claim.",
        "lowland.studies.hsr",
    ),
    Study(
        "flatness-aware",
        "The penalty on Tr H^2: accuracy, flatness and cost over its weight, beside other methods.",
        "lowland.studies.flatness",
        files="MNIST and CIFAR-100",
    ),
    Study(
        "illusion",
        "Are flat minima an illusion?, arXiv:2605.05209: sharpness against weakness, every claim.",
        "lowland.studies.illusion",
        files="MNIST and Fashion-MNIST",
    ),
)

"""What a run of the study consists of, read from a TOML file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lowland.studies.data.sources import check_data, has_test
from lowland.studies.runs.presets import PresetError, Rules, check, load_tasks

PACKAGE = "lowland.studies.flatness"
"""Where the presets are."""

BASELINE = "baseline"

KINDS = {
    "flatness-aware": "Flatness-aware",
    "hsr": "HSR",
    "hessian-trace": "Hessian trace",
    "sam": "SAM",
    "adaptive-sam": "Adaptive SAM",
}
"""What is compared with the baseline, by name."""


@dataclass(frozen=True)
class Way:
    """One way to train: a method and how strongly it acts.

    Attributes:
        kind: Of :data:`KINDS`, or the baseline.
        strength: The weight of a penalty, the radius of SAM; 0 for the baseline.
    """

    kind: str
    strength: float = 0.0

    @property
    def name(self) -> str:
        """In files and tables."""
        return self.kind if self.kind == BASELINE else f"{self.kind}-{self.strength:g}"

    @property
    def title(self) -> str:
        """For people."""
        if self.kind in (BASELINE, "flatness-aware"):
            return f"λ = {self.strength:g}"
        sign = "radius" if "sam" in self.kind else "weight"
        return f"{KINDS[self.kind]}, {sign} {self.strength:g}"


@dataclass(frozen=True)
class Task:
    """Data, a network, and how it is trained.

    Attributes:
        name: In files and tables.
        data: What :func:`~lowland.studies.data.sources.names` knows.
        seeds: Networks for each method, seeds 0 to ``seeds - 1``.
        hidden: Units of each hidden layer of ReLU; none for (multinomial) logistic regression.
        test_size: Fraction of the samples to test on, another for each seed; 0 for the test part
            that the data itself has.
        batch: Samples in a step; the rest of an epoch that fills no batch is left out.
        epochs: Passes through the training samples.
        learning_rate: Of plain stochastic gradient descent.
        hsr: Weights of HSR.
        hessian_trace: Weights of the Hessian trace.
        sam: Radii of SAM.
        adaptive_sam: Radii of adaptive SAM.
    """

    name: str
    data: str
    seeds: int
    hidden: tuple[int, ...]
    test_size: float
    batch: int
    epochs: int
    learning_rate: float
    hsr: tuple[float, ...]
    hessian_trace: tuple[float, ...]
    sam: tuple[float, ...]
    adaptive_sam: tuple[float, ...]


@dataclass(frozen=True)
class Preset:
    """Every setting of the study. The TOML files say where each value comes from.

    Attributes:
        weights: ``lambda`` of the flatness-aware penalty, rising; 0 is the baseline.
        probes: Random directions in a step of a penalty.
        looks: How often the flatness of a batch is measured over training.
        look_probes: Random directions in such a measurement.
        final_probes: Those in the measurement of a trained network, where it is not exact.
        final_samples: Most training samples that it looks at.
        rounds: Measurements of a step's time.
        round_steps: Steps in each of them, of which the median counts.
        verify: Whether CIFAR-100's files have to be the published ones.
        tasks: On what all of this is done.
    """

    weights: tuple[float, ...]
    probes: int
    looks: int
    look_probes: int
    final_probes: int
    final_samples: int
    rounds: int
    round_steps: int
    verify: bool
    tasks: tuple[Task, ...]

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON can hold them."""
        return asdict(self)

    def ways(self, task: Task) -> dict[str, Way]:
        """Every way to train that a task compares, by name; the baseline first."""
        ways = [
            Way(BASELINE),
            *(Way("flatness-aware", weight) for weight in self.weights if weight),
            *(
                Way(kind, strength)
                for kind in KINDS
                if kind != "flatness-aware"
                for strength in getattr(task, kind.replace("-", "_"))
            ),
        ]
        return {way.name: way for way in ways}


_POSITIVE = ("learning_rate", "hsr", "hessian_trace", "sam", "adaptive_sam")

RULES = Rules(
    least={"seeds": 2, "looks": 2, "rounds": 2, "look_probes": 2, "final_probes": 2},
    most={"test_size": 0.9},
    positive=_POSITIVE,
    repeats=("hidden",),
    empty=("hidden", "hsr", "hessian_trace", "sam", "adaptive_sam"),
)


def load_preset(name: str) -> Preset:
    """A preset by its name (``"quick"``, ``"paper"``) or by the path of a TOML file.

    Raises:
        PresetError: If there is no such preset, or its settings are not those of :class:`Preset`.
    """
    tasks, rest = load_tasks(PACKAGE, name, Task, RULES, _check_task)
    entries = check(rest, Preset, RULES, repr(name), besides=["tasks"])
    weights = list(entries["weights"])
    if weights[0] != 0 or weights != sorted(weights) or len(weights) < 3:
        raise PresetError(
            f"{name!r}: weights must be three or more that rise from 0, the baseline, so that one "
            f"is moderate; got {weights}"
        )
    return Preset(**entries, tasks=tasks)


def _check_task(task: Task, where: str) -> None:
    """Refuse a task whose settings do not go together."""
    check_data(task, where)
    if (task.test_size == 0) != has_test(task.data):
        raise PresetError(
            f"{where}: test_size must be "
            + ("0: the data has a test part" if has_test(task.data) else "greater than 0")
            + f"; got {task.test_size}"
        )

"""What a run of the study consists of, read from a TOML file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lowland.studies.data.sources import check_data, has_test
from lowland.studies.hsr.preset import load_preset as load_hsr
from lowland.studies.illusion.train import Descent
from lowland.studies.runs.presets import PresetError, Rules, check, load_tasks

PACKAGE = "lowland.studies.illusion"
"""Where the presets are."""

KINDS = ("pairs", "selection", "advantage")
"""What tasks can ask: the paper's tables 4 and 5, 3, and 1, 2 and 6."""

SMALL, LARGE = "small", "large"

LARGE_SEEDS = 100
"""Added to the seeds of networks with large batches, as in the paper."""


@dataclass(frozen=True)
class Regime:
    """Networks that are alike but for their seeds.

    Attributes:
        task: The name of what they belong to.
        size: Training points.
        batch: ``"small"`` or ``"large"``.
        first: The first seed.
        how: How they are trained.
    """

    task: str
    size: int
    batch: str
    first: int
    how: Descent

    @property
    def name(self) -> str:
        """In files and tables."""
        return f"{self.task}/{self.size:05d}-{self.batch}"


@dataclass(frozen=True)
class Task:
    """A question, the networks that are asked, and their data.

    Attributes:
        name: In files and tables.
        kind: One of :data:`KINDS`.
        data: What :func:`~lowland.studies.data.sources.names` knows, of three classes or more.
        data_seed: Of the order of the samples; the first ones are trained on.
        test: Samples to test on, where the data has no test part.
        hidden: Units of each hidden layer of ReLU.
        seeds: Networks for each regime.
        sizes: Training points, rising.
        batch: Samples in a step.
        learning_rates: Of plain stochastic gradient descent, one for each size.
        large_batch: Most samples in a step of the other regime; 0 for none.
        large_learning_rates: Its rates, one for each size.
        drop_from: Size from which the rates fall tenfold at 80 % of the epochs; 0 for never.
        epochs: Most passes through the training points.
        unseen: Test points of the pair proxy; 0 for none.
        joint_unseen: Test points of the joint weakness; 0 for none.
        joint_networks: Networks whose joint weakness is estimated, the first ones.
        rescaled: Networks whose layers are rescaled, the first ones of each small-batch regime.
        factors: Of the first hidden layer, against the next.
        second_factors: Of the second hidden layer, against the output layer.
    """

    name: str
    kind: str
    data: str
    data_seed: int
    test: int
    hidden: tuple[int, ...]
    seeds: int
    sizes: tuple[int, ...]
    batch: int
    learning_rates: tuple[float, ...]
    large_batch: int
    large_learning_rates: tuple[float, ...]
    drop_from: int
    epochs: int
    unseen: int
    joint_unseen: int
    joint_networks: int
    rescaled: int
    factors: tuple[float, ...]
    second_factors: tuple[float, ...]


@dataclass(frozen=True)
class Preset:
    """Every setting of the study. The TOML files say where each value comes from.

    Attributes:
        every: Epochs between two looks at the training accuracy.
        enough: Training accuracy at which a network has learnt its points, and stops.
        chunk: Networks that train together in one piece of the run.
        joint_chains: Independent chains of the joint weakness.
        joint_samples: Kept from each.
        joint_thinning: Steps between two of them.
        joint_burn_in: Steps before the first.
        resamples: Bootstrap samples of networks for each interval.
        hsr: The preset of the HSR study whose networks join the question; empty for none.
        hsr_unseen: Test points of their pair proxy.
        tasks: What is asked.
    """

    every: int
    enough: float
    chunk: int
    joint_chains: int
    joint_samples: int
    joint_thinning: int
    joint_burn_in: int
    resamples: int
    hsr: str
    hsr_unseen: int
    tasks: tuple[Task, ...]

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON can hold them, with those of the HSR study."""
        return asdict(self) | ({"hsr": load_hsr(self.hsr).to_dict()} if self.hsr else {})

    def regimes(self, task: Task) -> list[Regime]:
        """By rising size; the small batch first."""
        kinds = [(SMALL, task.batch, task.learning_rates, 0)]
        if task.large_batch:
            kinds.append((LARGE, task.large_batch, task.large_learning_rates, LARGE_SEEDS))
        return [
            Regime(
                task.name,
                size,
                kind,
                first,
                Descent(
                    min(batch, size),
                    rates[place],
                    task.epochs,
                    self.every,
                    self.enough,
                    0.8 if task.drop_from and size >= task.drop_from else 1.0,
                ),
            )
            for place, size in enumerate(task.sizes)
            for kind, batch, rates, first in kinds
        ]


_MAYBE_ZERO = (
    *("data_seed", "test", "large_batch", "drop_from", "unseen"),
    *("joint_unseen", "joint_networks", "rescaled", "hsr_unseen"),
)

RULES = Rules(
    least={"seeds": 5, "resamples": 100, "joint_chains": 2, "joint_samples": 4, "hidden": 2}
    | dict.fromkeys(_MAYBE_ZERO, 0),
    most={"enough": 1.0},
    positive=("learning_rates", "large_learning_rates", "factors", "second_factors", "enough"),
    repeats=("hidden", "learning_rates", "large_learning_rates"),
    empty=("large_learning_rates", "factors", "second_factors"),
)


def load_preset(name: str) -> Preset:
    """A preset by its name (``"quick"``, ``"paper"``) or by the path of a TOML file.

    Raises:
        PresetError: If there is no such preset, or its settings are not those of :class:`Preset`.
    """
    tasks, rest = load_tasks(PACKAGE, name, Task, RULES, _check_task)
    preset = Preset(**check(rest, Preset, RULES, repr(name), besides=["tasks"]), tasks=tasks)
    preset.to_dict()  # the HSR study's preset must be there too
    return preset


def _check_task(task: Task, where: str) -> None:
    """Refuse a task whose settings do not go together."""
    if task.kind not in KINDS:
        raise PresetError(f"{where}: kind must be one of {', '.join(KINDS)}; got {task.kind!r}")
    check_data(task, where)
    both, tested = task.kind == "advantage", has_test(task.data)
    rates = f"as many entries as sizes, {len(task.sizes)}"
    rules = (
        ("hidden", len(task.hidden) == 2, "two entries"),
        ("test", task.test > 0 or tested, "greater than 0: the data has no test part"),
        ("test", task.test == 0 or not tested, "0: the data has a test part"),
        ("sizes", list(task.sizes) == sorted(task.sizes), "rising"),
        ("sizes", both or len(task.sizes) == 1, "one entry, unless kind is advantage"),
        ("large_batch", both == (task.large_batch > 0), "0 unless kind is advantage, and then not"),
        ("learning_rates", len(task.learning_rates) == len(task.sizes), rates),
        (
            "large_learning_rates",
            len(task.large_learning_rates) == (len(task.sizes) if both else 0),
            rates if both else "empty unless kind is advantage",
        ),
        ("unseen", (task.kind == "pairs") == (task.unseen > 0), "0 unless kind is pairs, then not"),
        ("joint_unseen", task.joint_unseen <= task.unseen, f"at most unseen, {task.unseen}"),
        ("rescaled", both or not task.rescaled, "0 unless kind is advantage"),
        ("seeds", not both or task.seeds <= LARGE_SEEDS, f"at most {LARGE_SEEDS}"),
    )
    for key, holds, expected in rules:
        if not holds:
            got = getattr(task, key)
            shown = list(got) if isinstance(got, tuple) else got
            raise PresetError(f"{where}: {key} must be {expected}; got {shown}")

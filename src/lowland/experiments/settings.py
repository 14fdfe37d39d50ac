"""What decides a comparison's numbers beside the data, and what is taken unless told otherwise."""

from __future__ import annotations

from dataclasses import dataclass, field

from lowland.training import BASELINE, METHODS, Method, Schedule


@dataclass(frozen=True)
class Settings:
    """Everything that decides a comparison's numbers, beside the data.

    Attributes:
        methods: What to compare; the baseline is always there, and first.
        hidden: Units of each hidden layer.
        activation: Of the hidden layers.
        seeds: Networks per method, each with a split and a starting point of its own.
        first_seed: The first of that many consecutive seeds.
        test_size: Fraction of the samples to test on.
        schedule: How long and how fast to train.
    """

    methods: tuple[Method, ...] = tuple(METHODS.values())
    hidden: tuple[int, ...] = (4,)
    activation: str = "sigmoid"
    seeds: int = 30
    first_seed: int = 0
    test_size: float = 0.25
    schedule: Schedule = field(default_factory=Schedule)

    def __post_init__(self) -> None:
        others = tuple(method for method in self.methods if method != BASELINE)
        object.__setattr__(self, "methods", (BASELINE, *others))


DEFAULT_DATA = "breast-cancer"

DEFAULTS = {
    "breast-cancer": Settings(),
    "digits": Settings(hidden=(16,), seeds=10),
}
"""By the name of the data on the command line; tables of one's own go by the first."""

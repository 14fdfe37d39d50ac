"""What a run of the study consists of, read from a TOML file."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from lowland.studies.ensembles.training import (
    BASELINE,
    METHODS,
    Method,
    Schedule,
    lambda_max_gradient,
)
from lowland.studies.runs.presets import PresetError, Rules, load_settings

PACKAGE = "lowland.studies.hsr"
"""Where the presets are."""


@dataclass(frozen=True)
class Preset:
    """Every setting of the study. The TOML files say where each value comes from.

    Attributes:
        seeds: Networks in the search, seeds 0 to ``seeds - 1``.
        train_size: Training samples, half of each class.
        test_size: Test samples, half of each class.
        mean: Class means are ``(-mean, -mean)`` and ``(mean, mean)``.
        variance: Of either coordinate within a class; they are independent.
        data_seed: Of the samples.
        hidden: Hidden units.
        initial_range: Weights start uniformly between plus and minus this.
        learning_rate: ``eta``, of the loss and the penalty alike.
        steps: Most steps of gradient descent.
        tolerance: A network has converged when its ``||grad L||`` is below this fraction of the
            initial one.
        active: Fraction of the steps in which a method acts; then plain descent.
        distinct: Two critical points are duplicates if they are closer than ``mu - distinct *
            sigma`` of all pairwise distances.
        share: Fraction of the distinct points that are called sharp, and flat.
        hsr_weight: Of the bound beside the loss; where λ_max takes its place, of that.
        trace_weight: Of the trace beside the loss.
        sam_radius: Of adaptive SAM.
        checkpoints: How often curves are measured.
        chunk: Networks in a piece of work.
        draws: Random parameter vectors, or samples, in the figures about theory.
        sweep_train_sizes: Training samples in the sweep over their number.
        sweep_datasets: Data sets drawn for each of these, in the same order.
        sweep_hidden: Hidden units in the sweep.
        sweep_seeds: Networks for each data set, of which the sharpest ``share`` is trained again.
        sweep_hsr_weights: Of the bound, in the sweep.
        sweep_sam_radii: Of adaptive SAM, in the sweep.
    """

    seeds: int
    train_size: int
    test_size: int
    mean: float
    variance: float
    data_seed: int
    hidden: int
    initial_range: float
    learning_rate: float
    steps: int
    tolerance: float
    active: float
    distinct: float
    share: float
    hsr_weight: float
    trace_weight: float
    sam_radius: float
    checkpoints: int
    chunk: int
    draws: int
    sweep_train_sizes: tuple[int, ...]
    sweep_datasets: tuple[int, ...]
    sweep_hidden: tuple[int, ...]
    sweep_seeds: int
    sweep_hsr_weights: tuple[float, ...]
    sweep_sam_radii: tuple[float, ...]

    @property
    def methods(self) -> dict[str, Method]:
        """The paper's four methods, by name."""
        hsr, trace = METHODS["hsr"], METHODS["hessian-trace"]
        return {
            method.name: method
            for method in (
                BASELINE,
                Method(
                    trace.name,
                    trace.title,
                    trace.formula,
                    trace.penalty_gradient,
                    self.trace_weight,
                ),
                Method("a-sam", "A-SAM", "L(θ + ε)", radius=self.sam_radius),
                Method(hsr.name, hsr.title, hsr.formula, hsr.penalty_gradient, self.hsr_weight),
            )
        }

    @property
    def ours(self) -> dict[str, Method]:
        """What stands beside the paper's methods: descent on λ_max, which the bound stands for.

        Its weight is HSR's: the bound exceeds λ_max by a tenth at critical points, and there is no
        other strength at which the two could be compared without a search.
        """
        method = Method(
            "lambda-max", "λ_max (ours)", "L + w λ_max", lambda_max_gradient, self.hsr_weight
        )
        return {method.name: method}

    @property
    def sweep_methods(self) -> dict[str, Method]:
        """What is compared with the baseline in the sweep, by name and strength."""
        hsr, sam = self.methods["hsr"], self.methods["a-sam"]
        return {
            **{f"hsr-{w:g}": replace(hsr, weight=w) for w in self.sweep_hsr_weights},
            **{f"a-sam-{r:g}": replace(sam, radius=r) for r in self.sweep_sam_radii},
        }

    @property
    def schedule(self) -> Schedule:
        """How long and how fast each network is trained."""
        return Schedule(
            self.steps, self.learning_rate, self.active, self.tolerance, self.checkpoints
        )

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON can hold them."""
        return asdict(self)


RULES = Rules(
    least={
        "train_size": 2,
        "test_size": 2,
        "checkpoints": 2,
        "data_seed": 0,
        "sweep_train_sizes": 2,
        "sweep_datasets": 2,
    },
    most={"active": 1, "share": 0.5},
    positive=("variance", "initial_range", "learning_rate"),
    even=("train_size", "test_size"),
    repeats=("sweep_datasets",),
)


def load_preset(name: str) -> Preset:
    """A preset by its name (``"quick"``, ``"paper"``) or by the path of a TOML file.

    Raises:
        PresetError: If there is no such preset, or its settings are not those of :class:`Preset`.
    """
    preset = load_settings(PACKAGE, name, Preset, RULES)
    sizes, datasets = preset.sweep_train_sizes, preset.sweep_datasets
    if len(sizes) != len(datasets):
        raise PresetError(
            f"{name!r}: sweep_datasets must have one number for each of sweep_train_sizes; got "
            f"{len(datasets)} for {len(sizes)}"
        )
    return preset

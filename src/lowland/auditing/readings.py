"""All measures of one network on given data."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from lowland._limits import DENSE_IS_QUICKER
from lowland.criteria import Criterion, counted, labels, predictions, scalar_loss
from lowland.engines import hessian_moments
from lowland.spectra import spectrum
from lowland.symmetry import weighted_layers
from lowland.weakness import (
    count_patterns,
    free_parameters,
    free_regions,
    pair_proxy,
    weight_norm,
)

Values = dict[str, float]

# Of residuals of Lanczos, whose square bounds the error of an eigenvalue apart from the others. In
# single precision those of a network that fits its data are hardly more exact.
LANCZOS = 1e-3

_BEHIND = (nn.Identity, nn.Flatten, nn.Softmax, nn.LogSoftmax)


@dataclass(frozen=True)
class Forward:
    """What a network makes of points.

    Attributes:
        outputs: Of the network.
        hidden: What its last linear or convolutional layer is given.
    """

    outputs: Tensor
    hidden: Tensor


@dataclass
class Bench:
    """Data and settings that all networks of an audit are measured with.

    Attributes:
        criterion: The loss.
        x: Training inputs.
        y: Training targets.
        x_unseen: Further inputs.
        with_pairs: Whether the pair proxy is wanted.
        probes: Of traces that are estimated.
        seed: Of these, the same for all networks.
        left_out: Why a measure could not be taken, by its name.
        notes: What else a reader should know.
        pairs: The pair proxy's answers, each with the features that it is a function of.
        roughness: The largest residual of an eigenvalue, in units of it.
    """

    criterion: Criterion
    x: Tensor
    y: Tensor
    x_unseen: Tensor
    with_pairs: bool
    probes: int
    seed: int
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    pairs: list[tuple[Tensor, Tensor, float]] = field(default_factory=list)
    roughness: float = 0.0

    def curvature(self, model: nn.Sequential) -> tuple[Values, Values]:
        """Sharpness, plain and adaptive; and the standard errors of what is estimated."""
        data, dim = (self.x, self.y), sum(p.numel() for p in model.parameters() if p.requires_grad)
        method: Literal["dense", "lanczos"] = "dense" if dim <= DENSE_IS_QUICKER else "lanczos"
        with torch.no_grad():
            moments = hessian_moments(
                model,
                self.criterion,
                *data,
                probes=self.probes,
                generator=Generator().manual_seed(self.seed),
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of residuals, which are noted
            plain, adaptive = (
                spectrum(
                    model,
                    self.criterion,
                    data,
                    k=1,
                    method=method,
                    tolerance=LANCZOS,
                    trace_probes=self.probes if relative else 2,  # the moments have the plain one
                    seed=self.seed,
                    adaptive=relative,
                )
                for relative in (False, True)
            )
        for found in (plain, adaptive):
            if found.eigenvalues[0] != 0:
                rough = float(found.residuals[0] / found.eigenvalues[0].abs())
                self.roughness = max(self.roughness, rough)
        values = {
            "lambda_max": float(plain.eigenvalues[0]),
            "trace": float(moments.trace),
            "upper": float(moments.upper),
            "adaptive_lambda_max": float(adaptive.eigenvalues[0]),
            "adaptive_trace": adaptive.trace,
        }
        errors = {} if moments.stderr is None else {"trace": float(moments.stderr[0])}
        if adaptive.method != "dense":
            errors["adaptive_trace"] = adaptive.trace_stderr
        return values, errors

    def size(self, model: nn.Sequential) -> Values:
        """Norms of all parameters."""
        return {name: weight_norm(model.parameters(), p) for name, p in (("l2", 2.0), ("l1", 1.0))}

    @torch.no_grad()
    def forward(self, model: nn.Sequential, x: Tensor) -> Forward:
        """Outputs, and what the last layer makes them of."""
        seen: list[Tensor] = []
        with _listening(weighted_layers(model)[-1], seen.append):
            outputs = model(x)
        return Forward(outputs, seen[-1])

    def function(self, train: Forward) -> Values:
        """Loss and accuracy."""
        values = {"loss": float(scalar_loss(self.criterion, train.outputs, self.y))}
        predicted = predictions(self.criterion, train.outputs)
        known = labels(self.criterion, train.outputs, self.y)
        if predicted is None or known is None:
            self.left_out["accuracy"] = _NO_CLASSES
            return values
        right = (predicted == known)[counted(self.criterion, known)]
        values["accuracy"] = float(right.double().mean())
        return values

    def changes(self, forwards: list[Forward], references: list[Forward]) -> Values:
        """How far outputs are from those of the network at factor 1, in units of the largest."""
        differences, changed = 0.0, 0
        for own, reference in zip(forwards, references, strict=True):
            largest = float(reference.outputs.abs().max())
            distance = float((own.outputs - reference.outputs).abs().max())
            differences = max(differences, distance / largest if largest else distance)
            one, other = (predictions(self.criterion, part.outputs) for part in (own, reference))
            if one is not None and other is not None:
                changed += int((one != other).sum())
        if predictions(self.criterion, references[0].outputs) is None:
            self.left_out["predictions"] = _NO_CLASSES
            return {"outputs": differences}
        return {"outputs": differences, "predictions": changed}

    def weakness(self, model: nn.Sequential, train: Forward, unseen: Forward) -> Values:
        """What the last hidden layer leaves open on the unseen points."""
        own, further = (part.hidden.flatten(1) for part in (train, unseen))
        values: Values = {
            "patterns": count_patterns(further),
            "k_free": free_regions(own, further),
        }
        why = self._no_last_layer(model, train)
        if why:
            self.left_out |= {"free_parameters": why, "pair_proxy": why}
            return values
        last = weighted_layers(model)[-1]
        values["free_parameters"] = free_parameters(own, len(last.get_parameter("weight")), further)
        if not self.with_pairs:
            self.left_out["pair_proxy"] = "pairs=False"
            return values
        known = labels(self.criterion, train.outputs, self.y)
        if known is None or known.numel() != len(own):
            self.left_out["pair_proxy"] = (
                "needs one class for each sample: nn.CrossEntropyLoss or nn.NLLLoss with labels, "
                "or nn.BCEWithLogitsLoss with one logit and labels 0 and 1"
            )
            return values
        kept = counted(self.criterion, known).flatten()
        known = known.flatten()[kept].long()
        try:
            values["pair_proxy"] = self._pairs(own[kept], known, further, _classes(train))
        except ImportError as error:
            self.left_out["pair_proxy"] = str(error)
        return values

    def limits(self, unseen: Forward) -> Values:
        """As much as counts can come to on the unseen points, whatever the network."""
        points = float(len(unseen.hidden))
        return {"patterns": points, "k_free": points, "pair_proxy": points * _classes(unseen)}

    def _no_last_layer(self, model: nn.Sequential, train: Forward) -> str:
        """Why the network's last layer does not classify points by hidden features, if so."""
        last = weighted_layers(model)[-1]
        if not isinstance(last, nn.Linear) or train.hidden.ndim != 2:
            return f"needs a linear last layer on one vector a point; it is {last}"
        behind = list(model.modules())
        for module in behind[behind.index(last) + 1 :]:
            if not isinstance(module, _BEHIND):
                return f"needs a linear layer at the end; behind it stands {type(module).__name__}"
        return ""

    def _pairs(self, own: Tensor, labels: Tensor, further: Tensor, classes: int) -> float:
        for first, second, known in self.pairs:
            if torch.equal(first, own) and torch.equal(second, further):
                return known
        found = pair_proxy(own, labels, further, classes)
        if not self.pairs and not found.separable:
            self.notes.append(
                "Pair proxy: no last layer fits all training points on these features, so that no "
                "pair is feasible."
            )
        self.pairs.append((own, further, float(found.count)))
        return float(found.count)


def _classes(forward: Forward) -> int:
    """How many; one logit is the difference of two: the same points can be separated."""
    outputs = forward.outputs
    return max(2, outputs.shape[1] if outputs.ndim > 1 else 1)


_NO_CLASSES = (
    "needs classes: nn.CrossEntropyLoss or nn.NLLLoss with labels, or nn.BCEWithLogitsLoss with "
    "labels 0 and 1"
)


@contextmanager
def _listening(layer: nn.Module, hear: Callable[[Tensor], None]) -> Iterator[None]:
    """Be told what a layer is given."""

    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        hear(inputs[0].detach())

    handle = layer.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()

"""Checked arguments in the engine's shapes, and everything that is computed from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.autograd import grad

from lowland._limits import DEFAULT_MEMORY_BUDGET, MEBIBYTE
from lowland._loss_checks import check_loss
from lowland.activations import Activation, get_activation
from lowland.criteria import Targets
from lowland.exact.blocks import blocks
from lowland.exact.c_backend import covers
from lowland.exact.of_matrix import ByMatrix, run
from lowland.exact.plan import (
    OrderChoice,
    Path,
    Plan,
    cost,
    diagonal_floats,
    gradient_cost,
    make_plan,
    make_trace_plan,
    term_floats,
    trace_cost,
    trace_floats,
)
from lowland.exact.problem import Backend, Problem, join_layers, run_moments
from lowland.exact.size import Size
from lowland.exact.terms import Architecture, Data, ExactMatrix, Quantity
from lowland.exact.torch_backend import TorchBackend
from lowland.exact.trace_alone import bends_in_full
from lowland.exact.with_loss import Given, logits_and_trace
from lowland.losses import Loss, get_loss
from lowland.moments import HessianMoments
from lowland.validation import (
    as_outputs,
    check_budget,
    check_constant,
    check_features,
    check_weights,
)

Reduction = Literal["mean", "sum"]
Activations = str | Activation | Sequence[str | Activation]

# Terms that take more than this are far from the cache.
_NEAR = 32 * MEBIBYTE


@dataclass(frozen=True)
class Setup:
    """Networks, their data and their loss, checked once, from which everything is computed.

    What is to be computed again and again on the same data is set up once: in a step of training,
    looking at the data would take longer than a small network's gradient.

    Attributes:
        arch: What the networks share: activations, loss, trained rows.
        data: The samples.
        given: Of each layer what the caller has, in one of the forms of
            :data:`lowland.exact.with_loss.Given`: the ensemble's dimensions as one.
        ensemble: The ensemble's dimensions, which results are given.
        size: The extent of it all.
        is_mean: Whether the loss is a mean over samples that all weigh the same.
        covered: Whether the compiled code can take it.
    """

    arch: Architecture
    data: Data
    given: tuple[Given, ...]
    ensemble: torch.Size
    size: Size
    is_mean: bool
    covered: bool

    @cached_property
    def weights(self) -> tuple[Tensor, ...]:
        """Of each layer, ``(networks, inputs + 1, outputs)``, with the biases in row 0."""
        with torch.enable_grad():  # they are kept, and may be wanted with a graph later
            return tuple(
                each if isinstance(each, Tensor) else _with_biases(*each) for each in self.given
            )

    def at(self, weights: Sequence[Tensor]) -> Setup:
        """The setup at other weights of the same shapes, which are not checked."""
        shaped = zip(weights, self.weights, strict=True)
        return replace(self, given=tuple(new.reshape(old.shape) for new, old in shaped))

    def of(self, matrix: ExactMatrix) -> Setup:
        """The same networks and data for another matrix than the Hessian.

        Raises:
            ValueError: If it is none that the closed form knows.
        """
        if matrix not in get_args(ExactMatrix):
            known = ", ".join(map(repr, get_args(ExactMatrix)))
            raise ValueError(
                f"unknown matrix {matrix!r}: the closed form on tensors gives one of {known}; of "
                "'bce', 'ce' and 'mse' the Fisher matrix is 'ggn'"
            )
        if matrix == self.arch.matrix:
            return self
        # The compiled code has the Hessian alone.
        covered = self.covered and matrix == "hessian"
        return replace(self, arch=replace(self.arch, matrix=matrix), covered=covered)

    def of_samples(self, kept: Tensor) -> Setup:
        """The same of some samples alone, each with the weight that it has among all."""
        size = replace(self.size, samples=len(kept))
        return replace(self, data=self.data.of_samples(kept), size=size)

    def of_plain_code(self) -> Setup:
        """The same without the compiled code."""
        return replace(self, covered=False)

    def moments(
        self,
        order: OrderChoice = "auto",
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
        *,
        unbiased: bool = False,
        moments: int = 2,
    ) -> HessianMoments:
        """``Tr H`` and ``Tr H^2``, as :func:`lowland.exact.moments` gives them."""
        problem = self.problem(order, memory_budget, unbiased=unbiased)
        first, second = run_moments(problem, self.weights)
        higher = self._higher(memory_budget, unbiased=unbiased) if moments != 2 else None
        return HessianMoments(
            self.size.dim,
            first.view(self.ensemble),
            second.view(self.ensemble),
            higher=higher,
            matrix=self.arch.matrix,
        )

    def _higher(self, memory_budget: int, *, unbiased: bool) -> tuple[Tensor, Tensor]:
        """``Tr H^3`` and ``Tr H^4``, from ``H`` itself and one network at a time."""
        if unbiased:
            raise ValueError("unbiased=True estimates Tr H and Tr H^2 alone; use moments=2")
        wanted = self.asks_for_gradients
        # H, its square, and their product; for the gradient those of both, C and its tiles.
        copies = 6 if wanted else 3
        what = f"moments=4 squares the Hessian of {self.size.dim} parameters"
        problem = self.matrix_problem(memory_budget, copies, what)

        def powers(matrix: Tensor) -> list[tuple[Tensor, Callable[[], Tensor]]]:
            square = matrix @ matrix
            return [
                ((square * matrix).sum((1, 2)), lambda: 3 * square),
                (square.square().sum((1, 2)), lambda: 4 * (square @ matrix)),
            ]

        third, fourth = run(problem, self.weights, ByMatrix(powers, wanted and problem.plan.keep))
        return third.view(self.ensemble), fourth.view(self.ensemble)

    @property
    def asks_for_gradients(self) -> bool:
        """Whether somebody may go backward through what is computed now."""
        varying = (self.data.x, *self.weights)
        return torch.is_grad_enabled() and any(each.requires_grad for each in varying)

    def matrix_problem(
        self, memory_budget: int, copies: int, what: str, instead: str = ""
    ) -> Problem:
        """The problem of whole matrices ``H``, of which so many copies are held at a time.

        Args:
            memory_budget: Three quarters of it are theirs, what is left that of a chunk of samples.
            copies: Of a network's matrix.
            what: What is to be said of a budget that is too small for one network,
            instead: and what can be done but to raise it.

        Raises:
            ValueError: If the budget is too small.
        """
        memory_budget = check_budget(memory_budget)
        room = 3 * memory_budget // 4
        needed = copies * self.size.dim**2 * self.size.itemsize
        if needed > room:
            raise ValueError(
                f"a memory budget of {memory_budget / MEBIBYTE:.3g} MiB is too small: {what} and "
                f"takes {needed / 0.75 / MEBIBYTE:.3g} MiB; raise memory_budget{instead}"
            )
        try:
            problem = self.problem("parameters", memory_budget - room)
        except ValueError as error:  # which knows of an order that is none here
            raise ValueError(
                f"a memory budget of {memory_budget / MEBIBYTE:.3g} MiB is too small: {what}, and "
                f"a quarter of the budget does not hold one sample; raise memory_budget{instead}"
            ) from error
        plan = replace(
            problem.plan,
            tiles=[list(blocks(self.size))],  # whatever the budget for some of them
            networks=min(problem.plan.networks, room // needed),
            # Two matrices at most for each network.
            keep=2 * self.size.networks * needed // copies <= memory_budget // 4,
        )
        return replace(problem, plan=plan)

    def relative_cost(self, count: int = 2) -> float:
        """What moments and their gradient are predicted to cost, in gradients of the loss.

        Args:
            count: 1 for ``Tr H`` alone.
        """
        size = self.size
        if count == 1:
            return trace_cost(size, in_full=bends_in_full(self.arch)) / gradient_cost(size)
        paths: list[Path] = ["samples", "compiled" if self.covered else "parameters"]
        exact = min(cost(size, path) for path in paths)
        # The prices are those of terms near the cache. Far from it up to 5 times as much was
        # measured; 8 leaves close calls to other engines.
        far = size.samples * term_floats(size) * size.itemsize > _NEAR
        return (8 if far else 1) * exact / gradient_cost(size)

    def trace(self, memory_budget: int = DEFAULT_MEMORY_BUDGET) -> Tensor:
        """``Tr H`` alone, as :func:`lowland.exact.trace` gives it."""
        found = self.logits_and_trace(memory_budget)
        if found is not None:
            return found[1].view(self.ensemble)
        first, _ = run_moments(self.trace_problem(memory_budget), self.weights)
        return first.view(self.ensemble)

    def logits_and_trace(
        self, memory_budget: int = DEFAULT_MEMORY_BUDGET
    ) -> tuple[Tensor, Tensor] | None:
        """The logits and ``Tr H``, where one piece of work gives both.

        Of networks ``(networks, samples, K)`` and ``(networks,)``; of a model's layers without the
        first dimension.

        None where samples or networks have to be taken in turn, compiled code does it, or
        derivatives in the data are wanted.
        """
        if self.data.inputs_vary:
            return None
        plan = self._trace_plan(memory_budget)
        whole = plan.chunk >= self.size.samples and plan.networks >= self.size.networks
        # Transforms of torch.func cannot see into it.
        if plan.compiled or not whole or torch._C._are_functorch_transforms_active():  # noqa: SLF001
            return None
        return logits_and_trace(self.arch, self.given, self.data)

    def diagonal(self, memory_budget: int = DEFAULT_MEMORY_BUDGET) -> tuple[Tensor, ...]:
        """The diagonal of ``H``, as :func:`lowland.exact.diagonal` gives it."""
        # The compiled code has its sum alone.
        problem = self.of_plain_code().trace_problem(memory_budget, "diagonal")
        with torch.no_grad():
            found = problem.on_torch(self.weights, TorchBackend.diagonal)
        return self.shaped(join_layers(found, self.weights))

    def hessian(self) -> Tensor:
        """The matrices ``H``, as :func:`lowland.exact.hessian` gives them."""
        # The result is as large as the matrix; a budget beside it only sets the length of chunks.
        needed = 16 * self.size.dim**2 * self.size.itemsize
        budget = max(DEFAULT_MEMORY_BUDGET, needed)
        problem = self.problem("parameters", budget, compiled=False)
        with torch.no_grad():
            matrices = problem.on_torch(self.weights, TorchBackend.hessian)
        return torch.cat(matrices).view(*self.ensemble, self.size.dim, self.size.dim)

    def loss_gradient(self, memory_budget: int = DEFAULT_MEMORY_BUDGET) -> tuple[Tensor, ...]:
        """The loss's gradient, as :func:`lowland.exact.loss_gradient` gives it."""
        return self._gradients(
            self.trace_problem(memory_budget, "loss"), lambda backend: backend.loss_gradient()
        )

    def trace_gradient(self, memory_budget: int = DEFAULT_MEMORY_BUDGET) -> tuple[Tensor, ...]:
        """The gradient of each network's ``Tr H``, without a graph."""

        def gradient(backend: Backend) -> Sequence[Tensor]:
            one = self.weights[0].new_ones(backend.networks)
            return backend.gradient(one, torch.zeros_like(one), [])

        return self._gradients(self.trace_problem(memory_budget), gradient)

    def gradient(
        self,
        function: Callable[[HessianMoments], Tensor],
        order: OrderChoice = "auto",
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
    ) -> tuple[Tensor, ...]:
        """The gradient of a function of each network's own moments, without a graph.

        A backward pass through :meth:`moments` gives the same, with what autograd costs a step.
        """
        dim = self.size.dim

        def gradient(backend: Backend) -> Sequence[Tensor]:
            first, second, kept = backend.moments()
            with torch.enable_grad():
                leaves = first.detach().requires_grad_(), second.detach().requires_grad_()
                value = function(HessianMoments(dim, *leaves)).sum()
            by_trace, by_square = grad(value, leaves, materialize_grads=True)
            return backend.gradient(by_trace, by_square, kept)

        return self._gradients(self.problem(order, memory_budget), gradient)

    def _gradients(
        self, problem: Problem, compute: Callable[[Backend], Sequence[Tensor]]
    ) -> tuple[Tensor, ...]:
        """A gradient in each layer's weights from what ``compute`` gives for some networks."""
        with torch.no_grad():
            found = problem.on_backend(self.weights, lambda _, backend: compute(backend))
        return self.shaped(join_layers(found, self.weights))

    def shaped(self, layers: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What there is for each layer, with the ensemble's dimensions in front."""
        return tuple(layer.view(*self.ensemble, *layer.shape[1:]) for layer in layers)

    def problem(
        self,
        order: OrderChoice,
        memory_budget: int,
        *,
        compiled: bool = True,
        unbiased: bool = False,
    ) -> Problem:
        """The problem of both moments; ``compiled=False`` insists on PyTorch."""
        memory_budget = check_budget(memory_budget)
        if unbiased:
            self._check_unbiased()
        plan = make_plan(
            self.size,
            order,
            memory_budget,
            on_cpu=self._device.type == "cpu",
            compiled=compiled and not unbiased and self.covered,
        )
        return Problem(self.arch, self.data, plan, self.size, unbiased=unbiased)

    def trace_problem(self, memory_budget: int, quantity: Quantity = "trace") -> Problem:
        """The problem of ``Tr H`` alone, its diagonal, or the loss: no matrix is formed."""
        plan = self._trace_plan(memory_budget, quantity)
        return Problem(self.arch, self.data, plan, self.size, quantity)

    def _trace_plan(self, memory_budget: int, quantity: Quantity = "trace") -> Plan:
        memory_budget = check_budget(memory_budget)
        floats = trace_floats(self.size, in_full=bends_in_full(self.arch))
        return make_trace_plan(
            self.size,
            memory_budget,
            floats if quantity == "trace" else diagonal_floats(self.size),
            on_cpu=self._device.type == "cpu",
            compiled=self.covered,
        )

    @property
    def _device(self) -> torch.device:
        return self.data.x.device

    def _check_unbiased(self) -> None:
        """Require pairs of different samples, and a loss of which they make an unbiased estimate.

        Raises:
            ValueError: If there is a single sample, or the loss is no plain mean.
        """
        if self.size.samples < 2:
            raise ValueError(
                "unbiased=True leaves out each sample's pair with itself, so it needs at least 2 "
                f"samples; got {self.size.samples}"
            )
        if not self.is_mean:
            raise ValueError(
                "unbiased=True estimates the moments of a mean over samples; got a sum, or a mean "
                "weighed by classes, whose denominator depends on the batch: use a mean without "
                "class weights"
            )


def prepare_layers(  # noqa: PLR0917 - as for prepare
    layers: Sequence[tuple[Tensor, Tensor | None]],
    x: Tensor,
    targets: Targets,
    activations: Sequence[Activation],
    loss: Loss,
    rows: Sequence[slice],
) -> Setup:
    """:func:`prepare` of one network that was read from layers which fit, once a step of training.

    Args:
        layers: Each one's weights and biases.
        x: Inputs, ``(samples, inputs)``; results carry gradients in them if they ask for some.
        targets: What the criterion takes its targets for.
        activations: Of all layers but the last.
        loss: Of the logits.
        rows: The trained rows of each layer's weights.
    """
    first, _ = layers[0]
    for index, layer in enumerate(layers):
        for part in layer:
            if part is not None:
                check_features(part, like=first, name=f"weights[{index}]")
    check_features(x, like=first)
    samples, outputs = len(x), layers[-1][0].shape[0]
    check_constant(targets.y, "y")
    y, scale = targets.y, targets.scale
    if not (targets.of_labels and outputs > 1):
        y = as_outputs(y, samples=(samples,), outputs=outputs, loss=loss, like=first)
    check_loss(loss, y, like=first)
    inputs_vary = x.requires_grad and torch.is_grad_enabled()
    data = Data(
        (x if inputs_vary else x.detach()).unsqueeze(0),
        y.detach().unsqueeze(0),
        _mean_or_sum(targets.reduction, samples, outputs, loss)
        if scale is None
        else (scale if scale.ndim == y.ndim else scale.unsqueeze(-1)).unsqueeze(0),
        inputs_vary,
    )
    arch = Architecture(tuple(activations), loss, tuple(rows))
    size = Size(
        1,
        samples,
        (x.shape[1], *(weight.shape[0] for weight, _ in layers)),
        tuple(part.stop - part.start for part in rows),
        first.element_size(),
    )
    return Setup(
        arch,
        data,
        tuple(layers),
        torch.Size(),
        size,
        is_mean=targets.reduction == "mean",
        covered=not inputs_vary and covers(arch, size, data),
    )


def _mean_or_sum(reduction: Reduction, samples: int, outputs: int, loss: Loss) -> float:
    """What every sample, or each of its outputs, weighs."""
    return 1 / (samples * (outputs if loss.per_output else 1)) if reduction == "mean" else 1.0


def prepare(  # noqa: PLR0917 - the arguments of every public function, in their order
    weights: Sequence[Tensor],
    x: Tensor,
    y: Tensor,
    activation: Activations,
    loss: str | Loss,
    reduction: Reduction,
    *,
    inputs_vary: bool = False,
) -> Setup:
    """Check all arguments and bring them into the shapes of :class:`Setup`.

    Args:
        weights: As for :func:`lowland.exact.moments`, like all that follows.
        x: Inputs.
        y: Targets; for classes also a distribution over them for each sample.
        activation: Of all layers but the last, or one for each of them.
        loss: Of the logits.
        reduction: Of the loss over samples.
        inputs_vary: Whether the caller's results carry gradients in ``x``, if it asks for them;
            otherwise such an ``x`` is refused.
    """
    loss = get_loss(loss)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"unknown reduction {reduction!r}: expected 'mean' or 'sum'")
    check_weights(weights)
    first, shapes = weights[0], [each.shape for each in weights]
    activations = _read_activations(activation, len(weights) - 1)
    outputs = shapes[-1][-1]
    check_features(x, like=first)
    inputs_vary = inputs_vary and x.requires_grad and torch.is_grad_enabled()
    if not inputs_vary:
        check_constant(x, "x")
    check_constant(y, "y")
    if x.ndim < 2 or x.shape[-1] + 1 != shapes[0][-2]:
        raise ValueError(
            f"x and weights[0] do not match: expected x of shape (samples, {shapes[0][-2] - 1}) "
            f"for weights[0] of shape {tuple(shapes[0])} (inputs + 1, outputs), bias in row 0; "
            f"got {tuple(x.shape)}"
        )
    y = as_outputs(y, samples=tuple(x.shape[:-1]), outputs=outputs, loss=loss, like=first)
    check_loss(loss, y, like=first)
    leading = {*(shape[:-2] for shape in shapes), x.shape[:-2], y.shape[:-2]}
    try:
        ensemble = leading.pop() if len(leading) == 1 else torch.broadcast_shapes(*leading)
    except RuntimeError as error:
        of_weights = " and ".join(str(tuple(shape[:-2])) for shape in shapes)
        raise ValueError(
            "the leading (ensemble) dimensions do not broadcast: weights "
            f"{of_weights}, x {tuple(x.shape[:-2])}, y {tuple(y.shape[:-2])}"
        ) from error
    networks = math.prod(ensemble)
    if networks == 0:
        raise ValueError(
            f"expected at least one network; got an ensemble of shape {tuple(ensemble)}"
        )
    samples = x.shape[-2]
    scale = _mean_or_sum(reduction, samples, outputs, loss)
    arch = Architecture(activations, loss, tuple(slice(0, shape[-2]) for shape in shapes))
    # Autograd adds up what networks that share x have in it.
    x = x.expand(*ensemble, *x.shape[-2:]) if inputs_vary else x.detach()
    data = Data(_flatten(x, ensemble), _flatten(y.detach(), ensemble), scale, inputs_vary)
    size = Size(
        networks,
        samples,
        (x.shape[-1], *(shape[-1] for shape in shapes)),
        tuple(shape[-2] for shape in shapes),
        first.element_size(),
    )
    return Setup(
        arch,
        data,
        tuple(
            weight.expand(*ensemble, *weight.shape[-2:]).reshape(networks, *weight.shape[-2:])
            for weight in weights
        ),
        ensemble,
        size,
        is_mean=reduction == "mean",
        # The compiled code differentiates in the weights alone.
        covered=not inputs_vary and covers(arch, size, data),
    )


def _with_biases(matrix: Tensor, bias: Tensor | None) -> Tensor:
    """Of one network: ``(1, inputs + 1, outputs)``."""
    weight = matrix.T
    row = weight.new_zeros(1, weight.shape[1]) if bias is None else bias.unsqueeze(0)
    return torch.cat([row, weight]).unsqueeze(0)


def _read_activations(activation: Activations, count: int) -> tuple[Activation, ...]:
    """One activation for each of ``count`` hidden layers, from names or from one for all.

    Raises:
        TypeError: If it is neither a name, an activation, nor a sequence of these.
        ValueError: If they are not as many as hidden layers, or a name is unknown.
    """
    if isinstance(activation, str | Activation):
        return (get_activation(activation),) * count
    if not (
        isinstance(activation, Sequence)
        and all(isinstance(each, str | Activation) for each in activation)
    ):
        raise TypeError(
            "activation must be a name such as 'tanh', a lowland.activations.Activation, or a "
            f"sequence of these, one for each hidden layer; got {activation!r}"
        )
    if len(activation) != count:
        raise ValueError(
            f"expected one activation, or one for each of the {count} hidden layers; got "
            f"{len(activation)}"
        )
    return tuple(get_activation(each) for each in activation)


def _flatten(tensor: Tensor, ensemble: torch.Size) -> Tensor:
    """One dimension for the ensemble before the last two: of size 1 where all networks share it."""
    leading, trailing = tensor.shape[:-2], tensor.shape[-2:]
    if math.prod(leading) == 1:
        return tensor.reshape(1, *trailing)
    return tensor.expand(*ensemble, *trailing).reshape(-1, *trailing)

"""Sharpness-aware minimization around any optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, nullcontext
from functools import partial
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowland._active import window
from lowland._displacement import Displacement, families, inner, norm
from lowland._leftovers import Leftovers, amount, nonzero
from lowland._orthogonal import Orthogonal, copied, gradient
from lowland._sharding import is_flattened, is_spread, local
from lowland._untouched import Untouched
from lowland.errors import UnsupportedModelError
from lowland.passes import frozen_statistics, remember_randomness
from lowland.validation import is_number

_OWN = ("rho", "adaptive", "eta", "steps")
"""What this optimizer adds to the settings of the base optimizer's groups."""

_CARRIED = (
    *("base_optimizer", "perturb", "every", "reuse", "active", "measure", "model", "scaler"),
    "_orthogonal",
)
"""What goes with copies, beside what goes with those of any optimizer."""

_MOMENTA = ("momentum_buffer", "exp_avg")
"""What optimizers call their momentum, in the state of a parameter."""

_UNIT = "orthogonal"
"""What is kept of SAM's gradient, in the state of a parameter."""

_ONE_GRADIENT = (
    "SAM needs two gradients a step, or one at another place than the weights: pass a closure that "
    "zeroes the gradients, computes the loss, calls backward() and returns it; or call "
    "first_step() and second_step(), which take a gradient scaler too; or, in a trainer that calls "
    "step() itself, go backward in accumulate(closure)"
)

_NO_GRADIENT = (
    "no parameter has a gradient: call backward() before first_step() or in the closure, and do "
    "not zero the gradients after it"
)


class SAM(Optimizer):
    r"""Sharpness-aware minimization, plain, adaptive or at less than two gradients a step.

    With the gradient :math:`g = \nabla L(w)`, the base optimizer steps with
    :math:`\nabla L(w + \epsilon)`, where

    .. math:: \epsilon = \rho\, T^2 g / \lVert T g \rVert, \qquad T = 1
        \text{ or, adaptive, } T = \mathrm{diag}(|w| + \eta)

    and the norm is taken over all parameters of all groups. A step takes two gradients, from a
    closure as in the example. Where one does not fit, call :meth:`first_step` after the first
    backward pass, zero the gradients, go backward again, and call :meth:`second_step`. Between
    these two the gradients are those that the base optimizer steps with: this is where to clip
    them. Or let :meth:`accumulate` take both gradients of each micro-batch, and whatever trains
    call :meth:`step` without a closure.

    Three settings make it cheaper, in the same loop: a closure is called as often as it must be.

    * ``perturb="momentum"``, MSAM: :math:`\epsilon = -\rho\, T^2 v / \lVert T v \rVert` with the
      base optimizer's momentum :math:`v`, from one gradient a step, that at :math:`w + \epsilon`.
    * ``every=k``, LookSAM: two gradients in each so many-th step, and in the others one, to which
      :math:`\alpha \lVert g \rVert\, g_v / \lVert g_v \rVert` is added: the component of SAM's
      gradient orthogonal to the plain one, when there last were both, with :math:`\alpha` =
      ``reuse``.
    * ``active=(start, stop)``: in other steps the base optimizer's own, from one gradient.

    Args:
        params: Parameters or parameter groups, as for any optimizer. A group may set ``rho``,
            ``adaptive`` and ``eta`` of its own.
        base_optimizer: The class that makes the step, for example ``torch.optim.SGD``.
        rho: Radius of the neighbourhood, at least zero; zero is the base optimizer alone.
        adaptive: Measure the neighbourhood relative to each weight's size.
        eta: What is added to a weight's size, at least zero; only if adaptive.
        perturb: By what to find the point nearby: ``"gradient"`` or ``"momentum"``, of a base
            optimizer with momentum such as ``torch.optim.SGD`` or ``AdamW``. The best radii of the
            latter are larger.
        every: Take two gradients in each so many-th step only; with ``"gradient"``.
        reuse: How long what is kept of SAM's gradient is in the steps between, in lengths of their
            gradient, at least zero; zero takes the plain gradient there.
        active: The first step with SAM, and the first without it again, counted from 0; with
            ``total_steps`` shares of these, from 0 to 1, of which 1 has no end.
        total_steps: How many steps training takes, where ``active`` is in shares.
        measure: Keep the curvature along the way to the worst point, :attr:`curvature`; with
            ``"gradient"``.
        model: What :meth:`step` and :meth:`accumulate` take as ``model`` where they are given none,
            as by trainers that call them themselves. A copy of the optimizer holds a copy of it, as
            of the parameters; a state does not.
        scaler: What all steps take as ``scaler`` where they are given none.
        **base: Settings of the base optimizer.

    Raises:
        ValueError: If ``rho`` or ``eta`` is negative or not finite; if another setting makes no
            sense, or not with the others; or if the base optimizer has no momentum to perturb by.
        UnsupportedModelError: If ``FullyShardedDataParallel`` sharded the parameters; with those of
            ``torch.distributed.fsdp.fully_shard`` a step is the one of whole parameters.
        TypeError: If ``base_optimizer`` is not a class of optimizers, or its steps need a closure,
            as those of ``torch.optim.LBFGS``, or it has a setting of the same name as one here.

    Attributes:
        curvature: With ``measure``, after a step with two gradients, their difference along the way
            between them, :math:`(\nabla L(w + \epsilon) - \nabla L(w))^T \epsilon / \lVert
            \epsilon \rVert^2`: a one-sided difference of the Rayleigh quotient of the Hessian,
            where ``rho`` is small against how fast that changes. A scalar tensor, for which nothing
            waits; with micro-batches their mean. None where there is none to be had: before and
            between such steps, after :meth:`first_step` and :meth:`second_step`, where a closure
            changes gradients after its backward pass, as by clipping, where ``fully_shard`` keeps
            it from being seen whether one does, and where a gradient scaler leaves the step out.
            Not a number, if gradients were changed after :meth:`accumulate`, as by a scaler that
            the constructor does not know.

    Notes:
        A step costs two gradients, and with ``perturb="momentum"``, or outside ``active``, one.
        Between steps the weights are the weights, also with momentum: what is evaluated or saved
        there is what was trained. Weight decay is that of the weights, too. Steps that a gradient
        scaler leaves out do not count, in ``every`` and ``active``. The count, and what ``every``
        keeps, are part of the state, so that training goes on from it as if it had never stopped;
        with the state of the base optimizer alone both begin anew.

        Learning rate schedulers and checkpoints treat it like any other optimizer: its parameter
        groups and its state are those of the base optimizer, whose own state loads too, as does
        this one's there. Nothing waits for the device, except for what a gradient scaler does, and
        a closure that leaves zeroing to others.

        Under ``DistributedDataParallel`` the neighbourhood is that of the whole batch, since the
        gradients are averaged over processes before :meth:`first_step`. Gradients may be
        accumulated over micro-batches, all of them in both passes: then the neighbourhood is that
        of all of them. With ``micro_batches`` in :meth:`step`, and with :meth:`accumulate`, each
        has its own, as in the paper's experiments, where each device perturbs by its own part of
        the batch: m-sharpness, with m samples in a part. What ``every`` keeps is then found from
        the means of both gradients over all parts. It is added in the step, to gradients that may
        have been clipped before, so that theirs is the length it is measured by.

    References:
        Foret et al., Sharpness-aware minimization for efficiently improving generalization (2021),
        algorithm 1, and section 4.1 for m-sharpness. Kwon et al., ASAM: adaptive sharpness-aware
        minimization (2021), algorithm 1. Becker et al., Momentum-SAM: sharpness aware minimization
        without computational overhead (2024), algorithm 1. Liu et al., Towards efficient and
        scalable sharpness-aware minimization (2022), algorithm 1.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import lowland
        >>> model, criterion = nn.Linear(2, 1), nn.MSELoss()
        >>> x, y = torch.randn(8, 2), torch.randn(8, 1)
        >>> optimizer = lowland.SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.01)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = criterion(model(x), y)
        ...     loss.backward()
        ...     return loss
        >>> loss = optimizer.step(closure, model=model)  # the loss before the step
        >>> bool(criterion(model(x), y) < loss)
        True

        As the paper trains, with a neighbourhood for each of two parts of the batch:

        >>> def closure(part):
        ...     some_x, some_y = part
        ...     loss = criterion(model(some_x), some_y)
        ...     loss.backward()
        ...     return loss
        >>> parts = list(zip(x.chunk(2), y.chunk(2)))
        >>> mean_loss = optimizer.step(closure, micro_batches=parts, model=model)

        At the price of little more than the base optimizer's own steps, by its momentum; by two
        gradients in each fifth step alone; and in the last quarter of a thousand steps:

        >>> momentum = lowland.SAM(
        ...     model.parameters(), torch.optim.SGD, perturb="momentum", lr=0.01, momentum=0.9
        ... )
        >>> look = lowland.SAM(model.parameters(), torch.optim.AdamW, every=5, reuse=0.7, lr=0.001)
        >>> late = lowland.SAM(
        ...     model.parameters(), torch.optim.SGD, active=(0.75, 1.0), total_steps=1000, lr=0.01
        ... )
        >>> for optimizer in (momentum, look, late):
        ...     for _ in range(2):
        ...         loss = optimizer.step(closure, micro_batches=parts)
        >>> momentum.gradients, look.gradients, late.gradients  # that the coming step takes
        (1, 1, 1)
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: type[Optimizer],
        rho: float = 0.05,
        *,
        adaptive: bool = False,
        eta: float = 0.01,
        perturb: Literal["gradient", "momentum"] = "gradient",
        every: int = 1,
        reuse: float = 0.7,
        active: tuple[float, float] = (0, math.inf),
        total_steps: int | None = None,
        measure: bool = False,
        model: nn.Module | None = None,
        scaler: torch.amp.GradScaler | None = None,
        **base: Any,
    ) -> None:
        if not (isinstance(base_optimizer, type) and issubclass(base_optimizer, Optimizer)):
            raise TypeError(
                "base_optimizer must be a class such as torch.optim.SGD, whose settings follow as "
                f"keywords; got {base_optimizer!r}"
            )
        closure = signature(base_optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is closure.empty:
            name = base_optimizer.__name__
            raise TypeError(
                f"base_optimizer must step by the gradients at hand; {name} calls a closure for "
                "others, several times a step: use SAM with torch.optim.SGD or AdamW, or "
                f"{name} with a penalty such as lowland.HSR"
            )
        if shared := {*_OWN, "perturb", "every", "reuse", "active", "total_steps", "measure"} & {
            *signature(base_optimizer).parameters
        }:
            raise TypeError(
                f"{base_optimizer.__name__} and SAM both have a setting {min(shared)!r}, which one "
                "value cannot be for both: use another base_optimizer, such as torch.optim.AdamW"
            )
        _check_settings(perturb, every, reuse, measure)
        self.perturb, self.every, self.reuse, self.measure = perturb, every, reuse, measure
        self.active = window(active, total_steps)
        super().__init__(params, {"rho": rho, "adaptive": adaptive, "eta": eta, "steps": 0})
        for group in self.param_groups:
            for name in ("rho", "eta"):
                if not 0 <= group[name] < float("inf"):
                    raise ValueError(
                        f"{name} must be a finite number of at least 0; got {group[name]}"
                    )
        self._refuse_flattened()
        self.model, self.scaler = model, scaler
        self.base_optimizer = base_optimizer(self.param_groups, **base)
        self.defaults = self.base_optimizer.defaults | self.defaults
        self.param_groups = self.base_optimizer.param_groups
        self.state = self.base_optimizer.state
        if perturb == "momentum" and not all(map(_has_momentum, self.param_groups)):
            raise ValueError(
                f"perturb='momentum' needs momentum in each parameter group, and "
                f"{base_optimizer.__name__} as set has none: use torch.optim.SGD with "
                "momentum=0.9, or torch.optim.AdamW"
            )
        self._orthogonal = Orthogonal()
        self._rest()

    def _rest(self) -> None:
        self._stage: Literal["at rest", "ahead", "moved", "skipped", "back", "gathered"] = "at rest"
        self.curvature: Tensor | None = None
        self._displacement = Displacement()
        self._between: Leftovers | None = None
        self._nothing = torch.zeros(())
        self._plain: dict[Tensor, Tensor] = {}  # gradients at the weights, where both are needed
        self._curvatures: list[Tensor | None] = []
        self._length = torch.zeros(())  # of accumulated gradients, where curvature is measured
        self._ascent = _Part(self, self._move)
        self._descent = _Part(self, self._descend)

    @property
    def gradients(self) -> int:
        """How many gradients the coming step takes: one or two.

        For training by :meth:`first_step` and :meth:`second_step`, of which the first one needs a
        gradient where the step takes two.
        """
        return 2 if self._kind == "both" else 1

    @property
    def _kind(self) -> Literal["both", "ahead", "reuse", "plain"]:
        """What the coming step is: with two gradients, with one nearby, or at the weights."""
        start, stop = self.active
        step = self.param_groups[0]["steps"] - start
        if not 0 <= step < stop - start:
            return "plain"
        if self.perturb == "momentum":
            return "ahead"
        return "reuse" if step % self.every and self._orthogonal.unit else "both"

    @torch.no_grad()
    def first_step(
        self, *, zero_grad: bool = False, scaler: torch.amp.GradScaler | None = None
    ) -> None:
        """Move to the worst point nearby, from the gradient at the weights.

        Where the step takes one gradient, see :attr:`gradients`, there need be none yet: then the
        weights move by the momentum, or stay.

        Args:
            zero_grad: Zero the gradients afterwards.
            scaler: What the loss was scaled by. It unscales the gradients here; if one of them is
                not finite, the weights stay, also in :meth:`second_step`.

        Raises:
            RuntimeError: If the last first step has not been followed by a second one, or no
                parameter has a gradient though it is needed.
            UnsupportedModelError: As the class; or with a scaler and sharded parameters.
        """
        self._check_at_rest()
        scaler = scaler or self.scaler
        self._refuse_parts(scaler)
        self.curvature, self._curvatures = None, [None]  # gradients may be clipped in between
        if self._kind == "both":
            self._ascend(scaler)
        else:
            self._lead()
            self._stage = "moved"
        if zero_grad:
            self.zero_grad()
        self._between = Leftovers(self._parameters())

    @torch.no_grad()
    def second_step(
        self, *, zero_grad: bool = False, scaler: torch.amp.GradScaler | None = None
    ) -> None:
        """Go back to the weights, bit for bit, and step with the gradient found nearby.

        Args:
            zero_grad: Zero the gradients afterwards.
            scaler: The one given to :meth:`first_step`. To clip gradients, call
                ``scaler.unscale_(optimizer)`` and clip before; call ``scaler.update()`` after.
                If a gradient of either pass is not finite, the weights are where they were.

        Raises:
            RuntimeError: If no first step came before it, or the gradients were not zeroed in
                between; the weights are back then.
        """
        if self._stage not in ("moved", "skipped"):
            raise RuntimeError("second_step() needs a first_step() before it")
        skipped = self._stage == "skipped"
        between, self._between = self._between, None
        self._return()
        if between is not None and between.close().added_to():
            raise RuntimeError(
                "the gradients of the second pass were added to those of the first: zero them in "
                "between, with first_step(zero_grad=True) or zero_grad(), so that second_step() "
                "steps with the second ones alone"
            )
        scaler = scaler or self.scaler
        if not skipped:
            self._stage = "back"
            try:  # by way of step(), where schedulers count and hooks wait
                if scaler is None:
                    self.step()
                else:
                    scaler.step(self)
            finally:
                self._stage = "at rest"
        if zero_grad:
            self.zero_grad()

    def step(
        self,
        closure: Callable[..., Any] | None = None,
        *,
        micro_batches: int | Iterable[Any] | None = None,
        model: nn.Module | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Any:
        """Both steps; ``closure`` zeroes the gradients, computes the loss and goes backward.

        Both calls of the closure draw the same random numbers, so that dropout gives both
        gradients the same mask. The second call's gradients are never added to the first one's.

        Args:
            closure: Returns the loss. May be left out after :meth:`accumulate`, or call that, and
                is then called once.
            micro_batches: Parts of the batch, of equal size, or their number. The closure is called
                with each of them, or its index, twice, and does not zero. Each part has a worst
                point of its own; the base optimizer steps with the mean of the gradients there.
            model: The modules whose running statistics, as of batch normalization, only the first
                call of the closure updates.
            scaler: With it the closure calls ``scaler.scale(loss).backward()``. If a gradient is
                not finite, the step is left out; call ``scaler.update()`` after it, as always.

        Returns:
            The loss at the weights, as the closure returned it at first; with ``micro_batches`` the
            mean of these.

        Raises:
            RuntimeError: Without a closure where nothing was accumulated; or if the closure adds to
                gradients that were there before, of which the second pass would know nothing.
            ValueError: If there is no micro-batch.
        """
        scaler = scaler or self.scaler
        if closure is None:
            if self._stage not in ("back", "gathered"):
                raise RuntimeError(_ONE_GRADIENT)
            if self._stage == "gathered":
                self._doubt_scale()
            self._stage = "at rest"
            self._descend()
            return None
        self.curvature = None
        if micro_batches is not None:
            loss = self._gather(closure, micro_batches, model, scaler)
        else:
            loss, _ = self._nearby(closure, model, scaler, scaler)
        if self._stage == "skipped":
            self._stage = "at rest"
        elif scaler is None:
            self._descend()
        else:
            scaler.step(self._descent)  # type: ignore[arg-type]  # needs no more of an optimizer
        return loss

    def _descend(self) -> None:
        """The base optimizer's step with the gradients at hand, and what goes before it."""
        kind, groups = self._kind, self.param_groups
        with torch.no_grad():
            if kind == "reuse":
                self._orthogonal.add(groups, self.reuse)
            elif kind == "both" and self.every > 1:
                self._orthogonal.remember(groups, self._plain)
        found = [each for each in self._curvatures if each is not None]
        if found and len(found) == len(self._curvatures):
            self.curvature = sum(found[1:], found[0])
        self._forget()
        self.base_optimizer.step()
        steps = groups[0]["steps"] + 1
        for group in groups:
            group["steps"] = steps

    def accumulate(self, closure: Callable[[], Any], *, model: nn.Module | None = None) -> Any:
        """Add the gradient of one micro-batch, at that micro-batch's own worst point nearby.

        For trainers that go backward for one micro-batch after the other and then call
        :meth:`step`, or a gradient scaler's ``step``, without a closure. The gradients are those
        that it steps with: clip and unscale them as those of any optimizer.

        Args:
            closure: Computes the loss of a micro-batch, divided by the number of them, and goes
                backward. It is called twice; neither call sees the gradients of micro-batches
                before. If it zeroes the gradients, those before are gone, as one expects.
            model: As in :meth:`step`.

        Returns:
            The loss at the weights, as the closure returned it at first.

        Raises:
            RuntimeError: Between :meth:`first_step` and :meth:`second_step`; if no parameter has a
                gradient; or if there are gradients that this method did not add.

        Notes:
            Of a loss that is scaled against underflow nothing need be said here: the worst point
            does not depend on the scale, and where the gradient at the weights is not finite,
            neither is the one that is added, so that the scaler leaves the step out.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> import lowland
            >>> model, x = nn.Linear(2, 1), torch.randn(8, 2)
            >>> optimizer = lowland.SAM(model.parameters(), torch.optim.SGD, lr=0.01)
            >>> for some_x in x.chunk(4):
            ...     _ = optimizer.accumulate(lambda: (model(some_x).square().mean() / 4).backward())
            >>> optimizer.step()
            >>> optimizer.zero_grad()
        """
        self.curvature = None
        loss = self._add(closure, model, self.scaler)
        self._stage = "gathered"
        if self._curvatures:
            self._length = self._gradient_length()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: FBT001, FBT002 - as its base's
        """Zero the gradients, and forget what was accumulated."""
        super().zero_grad(set_to_none)
        if self._stage == "gathered":
            self._stage = "at rest"

    def _gather(
        self,
        closure: Callable[[Any], Any],
        micro_batches: int | Iterable[Any],
        model: Any,
        scaled_by: torch.amp.GradScaler | None,
    ) -> Any:
        """The mean of the micro-batches' gradients, and that of their losses."""
        parts = range(micro_batches) if isinstance(micro_batches, int) else micro_batches
        self.zero_grad()
        self._forget()
        losses = [self._add(partial(closure, part), model, scaled_by, keep=True) for part in parts]
        if not losses:
            raise ValueError("micro_batches must be at least one, or hold at least one; got none")
        with torch.no_grad():
            for total in self._gradients():
                total.div_(len(losses))
        self._curvatures = [None if c is None else c / len(losses) for c in self._curvatures]
        return None if losses[0] is None else sum(losses) / len(losses)

    def _add(
        self,
        closure: Callable[[], Any],
        model: Any,
        scaled_by: torch.amp.GradScaler | None,
        *,
        keep: bool = False,
    ) -> Any:
        """Add one gradient to what is there, unless the closure zeroes that and it is not kept."""
        self._check_at_rest()
        gathered = self._stage == "gathered"
        if not (keep or gathered):
            self._forget()
        plain, curvatures = self._plain, self._curvatures
        there = {p: p.grad.clone() for p in self._parameters() if p.grad is not None}
        super().zero_grad(set_to_none=False)
        loss, kept = self._nearby(closure, model, scaled_by=scaled_by)
        if not (keep or gathered) and nonzero({p: amount(there[p]) for p in kept}):
            raise RuntimeError(
                "there are gradients that accumulate() did not add, such as those of an earlier "
                "step, or of a micro-batch at the weights themselves: call zero_grad() before the "
                "first micro-batch, and accumulate(closure) for every one"
            )
        with torch.no_grad():
            for p in there if keep else kept:
                p.grad = there[p] if p.grad is None else p.grad.add_(there[p])
                if p in plain:
                    self._plain[p] = plain[p].add_(self._plain[p]) if p in self._plain else plain[p]
        self._curvatures = curvatures + self._curvatures
        return loss

    def _nearby(
        self,
        closure: Callable[[], Any],
        model: nn.Module | None,
        scaler: torch.amp.GradScaler | None = None,
        scaled_by: torch.amp.GradScaler | None = None,
    ) -> tuple[Any, list[Tensor]]:
        """Call the closure at the weights and nearby; the second call's gradients alone are left.

        Or once, where the step takes one gradient.

        Args:
            closure: As of :meth:`step`.
            model: Whose statistics the first call alone updates.
            scaler: What unscales the first gradient.
            scaled_by: What the closure scales the loss by, as far as it is known.

        Returns:
            The loss of the first call, and the parameters whose gradients the closure did not zero.
        """
        self._check_at_rest()
        self._refuse_parts(scaler)
        gathered, both = self._take_gathered(), self._kind == "both"
        again = remember_randomness({p.device for p in self._parameters()}) if both else nullcontext
        with closing(Untouched(self._parameters() if both and self.measure else ())) as untouched:
            with closing(Leftovers(self._parameters())) as leftovers:
                loss, here = self._first_pass(closure, leftovers, gathered=gathered)
            if not here:
                return loss, []
            if leftovers.added_to():
                raise RuntimeError(
                    "the closure added to gradients that were there before it, which its second "
                    "call, or one at another place than the weights, would know nothing of: call "
                    "zero_grad() in it or before it. To accumulate over micro-batches, as a "
                    "trainer's accumulate_grad_batches does, go backward in accumulate(closure) "
                    "for each of them, then call step() without a closure"
                )
            if leftovers.zeroed_late() or next(self._gradients(), None) is None:
                raise RuntimeError(_NO_GRADIENT)
            if not both:
                return loss, leftovers.kept
            clean = bool(untouched)  # before a scaler changes them
            if not self._ascend(scaler):
                return loss, []
            model = self.model if model is None else model
            frozen = nullcontext() if model is None else frozen_statistics(model)
            try:
                slope = self._slope(None if scaler else scaled_by) if clean else None
                super().zero_grad(set_to_none=False)  # in place: a CUDA graph writes where they are
                with torch.enable_grad(), again(), frozen:
                    closure()
                self._measure(slope if untouched else None, scaled_by)
            finally:
                self._return()
        if not (leftovers.arrived or any(map(amount, self._gradients()))):
            raise RuntimeError(_ONE_GRADIENT)
        self._doubt()
        return loss, leftovers.kept

    def _first_pass(
        self, closure: Callable[[], Any], leftovers: Leftovers, *, gathered: bool
    ) -> tuple[Any, bool]:
        """The first call of a closure, or the only one; and whether its gradients are to be used.

        Otherwise those are that were accumulated, in it or before one that does nothing, as some
        trainers pass.
        """
        try:
            self._lead()
            with torch.enable_grad():
                loss = closure()
            if self._take_gathered() or (gathered and not leftovers.arrived):
                return loss, False
            self._forget()
            if not leftovers.arrived and self._kind != "both":
                # What wrote over them, as a replayed graph does, does so again.
                super().zero_grad(set_to_none=False)
                with torch.enable_grad():
                    closure()
                if not any(map(amount, self._gradients())):
                    raise RuntimeError(_ONE_GRADIENT)
        finally:
            if self._stage == "ahead":
                self._return()
        return loss, True

    def _check_at_rest(self) -> None:
        if self._stage == "ahead":  # in a step's closure, which accumulates itself
            self._return()
        if self._stage in ("moved", "skipped"):
            raise RuntimeError(
                "the weights are where first_step() moved them; call second_step() before another "
                "step"
            )

    def _take_gathered(self) -> bool:
        """Whether gradients were accumulated, which is forgotten then."""
        gathered = self._stage == "gathered"
        if gathered:
            self._stage = "at rest"
        return gathered

    def _forget(self) -> None:
        """Drop what a step remembers of its first gradients."""
        self._plain, self._curvatures = {}, []

    @torch.no_grad()
    def _lead(self) -> None:
        """Move against the momentum, where this takes the place of the gradient."""
        if self._kind == "ahead":
            self._displacement.move(self.param_groups, self._momentum, sign=-1)
            self._stage = "ahead"

    def _momentum(self, p: Tensor) -> Tensor | None:
        state = self.state.get(p)
        if not state or not p.requires_grad:
            return None
        for name in _MOMENTA:
            if name in state:
                momentum: Tensor | None = state[name]
                return momentum
        raise RuntimeError(
            f"perturb='momentum' needs the momentum that {type(self.base_optimizer).__name__} "
            f"keeps, as {' or '.join(_MOMENTA)}; its state has {', '.join(map(str, state))}"
        )

    @torch.no_grad()
    def _ascend(self, scaler: torch.amp.GradScaler | None) -> bool:
        """Move by the gradients at hand, unless the scaler finds that one is not finite.

        Raises:
            RuntimeError: If there is none.
        """
        if next(self._gradients(), None) is None:
            raise RuntimeError(_NO_GRADIENT)
        if self.every > 1:
            self._plain = copied(self.param_groups)
        if scaler is None:
            self._move()
        else:
            scaler.step(self._ascent)  # type: ignore[arg-type]  # needs no more of an optimizer
        if not self._displacement:
            self._stage = "skipped"
        return bool(self._displacement)

    def _move(self) -> None:
        """Keep the weights and add ``epsilon`` to them."""
        length = self._displacement.move(self.param_groups, gradient)
        if length is not None:
            self._nothing = length - length  # NaN where a gradient is not finite
        self._stage = "moved"

    def _return(self) -> None:
        """Put the weights back, if they were moved."""
        self._stage = "at rest"
        with torch.no_grad():
            self._displacement.back()

    @torch.no_grad()
    def _doubt(self) -> None:
        """Let no gradient pass for finite that was found where one led that is not."""
        one = next((g for g in self._gradients() if not g.is_sparse), None)
        if one is not None:
            local(one).add_(self._nothing.to(local(one)))

    @torch.no_grad()
    def _slope(self, scaled_by: torch.amp.GradScaler | None) -> Tensor:
        """The inner product of the gradients at hand and the way that the weights were moved."""
        slope = inner(self._displacement.way(), gradient)
        return slope if scaled_by is None else slope / scaled_by.scale(torch.ones_like(slope))

    @torch.no_grad()
    def _measure(self, slope: Tensor | None, scaled_by: torch.amp.GradScaler | None) -> None:
        """The curvature along the way that the weights were moved, from both ends' slopes."""
        if self.measure:
            self._curvatures = [None]
            if slope is not None:
                square = norm(self._displacement.way()).square()
                self._curvatures = [(self._slope(scaled_by) - slope) / square]

    @torch.no_grad()
    def _gradient_length(self) -> Tensor:
        return norm(families(self.param_groups, gradient))

    def _doubt_scale(self) -> None:
        """Let no curvature stand of gradients that were unscaled by who knows what."""
        if any(each is not None for each in self._curvatures) and self.scaler is None:
            same = self._gradient_length() == self._length
            self._curvatures.append(torch.where(same, 0.0, torch.nan).to(self._length))

    def _parameters(self) -> Iterator[Tensor]:
        return (p for group in self.param_groups for p in group["params"])

    def _gradients(self) -> Iterator[Tensor]:
        return (p.grad for p in self._parameters() if p.grad is not None)

    def _refuse_flattened(self) -> None:
        if any(map(is_flattened, self._parameters())):
            raise UnsupportedModelError(
                "SAM needs the norm of the whole gradient, of which a process sees only its part "
                "under FullyShardedDataParallel: shard with torch.distributed.fsdp.fully_shard, "
                "for which steps are those of whole parameters, or use DistributedDataParallel"
            )

    def _refuse_parts(self, scaler: torch.amp.GradScaler | None) -> None:
        """Refuse parameters that are sharded in a way that does not go."""
        self._refuse_flattened()
        if scaler is not None and scaler.is_enabled() and any(map(is_spread, self._parameters())):
            raise UnsupportedModelError(
                "a gradient scaler looks at one process's part of sharded gradients alone: train "
                "in bfloat16, which needs none"
            )

    def state_dict(self) -> dict[str, Any]:
        """The state of the base optimizer, with what this one adds to its groups and its state."""
        state_dict = super().state_dict()
        state = dict(state_dict["state"])
        for index, p in enumerate(self._parameters()):
            if p in self._orthogonal.unit:
                state[index] = {**state.get(index, {}), _UNIT: self._orthogonal.unit[p]}
        return state_dict | {"state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this optimizer, or of the base optimizer alone.

        What a state of the base optimizer does not have, the radius and the like, stays.

        Args:
            state_dict: What ``state_dict()`` of either returned.
        """
        groups = state_dict["param_groups"]
        if len(groups) == len(self.param_groups):
            own = [{name: group[name] for name in _OWN} for group in self.param_groups]
            groups = [mine | group for mine, group in zip(own, groups, strict=True)]
        # Apart from the base optimizer's, which takes a parameter without state for a new one.
        state, units = dict(state_dict["state"]), {}
        for index, kept in state_dict["state"].items():
            if isinstance(kept, dict) and _UNIT in kept:
                state[index] = {name: value for name, value in kept.items() if name != _UNIT}
                units[index] = kept[_UNIT]
        super().load_state_dict(state_dict | {"state": state, "param_groups": groups})
        indices = (index for group in groups for index in group["params"])
        self._orthogonal.unit = {
            p: units[index].detach().to(p.device, p.dtype)
            for index, p in zip(indices, self._parameters(), strict=True)
            if index in units
        }

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {name: getattr(self, name) for name in _CARRIED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # also what load_state_dict() ends with
        # One state and one list of groups for both, so that neither can fall behind. The base
        # optimizer's own way of taking them adds settings that older versions did not have.
        self.base_optimizer.__setstate__({"state": self.state, "param_groups": self.param_groups})
        if "_stage" not in self.__dict__:
            self._rest()


class _Part:
    """One of a step's two parts as a gradient scaler takes it: unscaled, and only if all is finite.

    A scaler unscales once per step and optimizer, and tells optimizers apart by identity. So the
    two gradients of a step need two of them, and its update() looks at what it found in both.
    """

    def __init__(self, optimizer: SAM, step: Callable[[], None]) -> None:
        self._optimizer, self.step = optimizer, step

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups


def _check_settings(perturb: object, every: object, reuse: object, measure: object) -> None:
    if perturb not in ("gradient", "momentum"):
        raise ValueError(f"perturb must be 'gradient' or 'momentum'; got {perturb!r}")
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ValueError(f"every must be a whole number of at least 1; got {every!r}")
    if not (is_number(reuse) and 0 <= reuse < math.inf):
        raise ValueError(f"reuse must be a finite number of at least 0; got {reuse!r}")
    if perturb == "momentum" and every > 1:
        raise ValueError(
            "every= saves second gradients, and perturb='momentum' takes none: leave one of the "
            "two out"
        )
    if perturb == "momentum" and measure:
        raise ValueError(
            "measure= needs two gradients a step, and perturb='momentum' takes one: leave one of "
            "the two out"
        )


def _has_momentum(group: dict[str, Any]) -> bool:
    """Whether a group's settings are those of an optimizer with momentum."""
    return bool(group.get("momentum", group.get("betas", (0,))[0]) > 0)

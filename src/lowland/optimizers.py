"""Sharpness-aware minimization around any optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from inspect import signature
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowland._leftovers import Leftovers, amount, nonzero
from lowland._sharding import (
    is_flattened,
    is_spread,
    layout,
    local,
    local_like,
    sum_over_parts,
)
from lowland.errors import UnsupportedModelError
from lowland.passes import frozen_statistics, remember_randomness

_OWN = ("rho", "adaptive", "eta")
"""What this optimizer adds to the settings of the base optimizer's groups."""

_ONE_GRADIENT = (
    "SAM needs two gradients a step: pass a closure that zeroes the gradients, computes the loss, "
    "calls backward() and returns it; or call first_step() and second_step(), which take a "
    "gradient scaler too; or, in a trainer that calls step() itself, go backward in "
    "accumulate(closure)"
)

_NO_GRADIENT = (
    "no parameter has a gradient: call backward() before first_step() or in the closure, and do "
    "not zero the gradients after it"
)


class _Family(NamedTuple):
    """What operations on lists take at once: one group's tensors of one device, type and layout.

    Of parameters that are spread over processes these are the parts that lie here.
    """

    group: dict[str, Any]
    layout: Any
    parameters: list[Tensor]
    weights: list[Tensor]
    gradients: list[Tensor]


class SAM(Optimizer):
    r"""Sharpness-aware minimization, plain or adaptive, around any optimizer.

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

    Args:
        params: Parameters or parameter groups, as for any optimizer. A group may set ``rho``,
            ``adaptive`` and ``eta`` of its own.
        base_optimizer: The class that makes the step, for example ``torch.optim.SGD``.
        rho: Radius of the neighbourhood, at least zero; zero is the base optimizer alone.
        adaptive: Measure the neighbourhood relative to each weight's size.
        eta: What is added to a weight's size, at least zero; only if adaptive.
        model: What :meth:`step` and :meth:`accumulate` take as ``model`` where they are given none,
            as by trainers that call them themselves. A copy of the optimizer holds a copy of it, as
            of the parameters; a state does not.
        scaler: What all steps take as ``scaler`` where they are given none.
        **base: Settings of the base optimizer.

    Raises:
        ValueError: If ``rho`` or ``eta`` is negative or not finite.
        UnsupportedModelError: If ``FullyShardedDataParallel`` sharded the parameters; with those of
            ``torch.distributed.fsdp.fully_shard`` a step is the one of whole parameters.
        TypeError: If ``base_optimizer`` is not a class of optimizers, or its steps need a closure,
            as those of ``torch.optim.LBFGS``.

    Notes:
        A step costs two gradients. Learning rate schedulers and checkpoints treat it like any other
        optimizer: its parameter groups and its state are those of the base optimizer, whose own
        state loads too, as does this one's there. Nothing waits for the device, except for what a
        gradient scaler does, and a closure that leaves zeroing to others.

        Under ``DistributedDataParallel`` the neighbourhood is that of the whole batch, since the
        gradients are averaged over processes before :meth:`first_step`. Gradients may be
        accumulated over micro-batches, all of them in both passes: then the neighbourhood is that
        of all of them. With ``micro_batches`` in :meth:`step`, and with :meth:`accumulate`, each
        has its own, as in the paper's experiments, where each device perturbs by its own part of
        the batch: m-sharpness, with m samples in a part.

    References:
        Foret et al., Sharpness-aware minimization for efficiently improving generalization (2021),
        algorithm 1, and section 4.1 for m-sharpness. Kwon et al., ASAM: adaptive sharpness-aware
        minimization (2021), algorithm 1.

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
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: type[Optimizer],
        rho: float = 0.05,
        *,
        adaptive: bool = False,
        eta: float = 0.01,
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
        super().__init__(params, {"rho": rho, "adaptive": adaptive, "eta": eta})
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
        self._rest()

    def _rest(self) -> None:
        self._stage: Literal["at rest", "moved", "skipped", "back", "gathered"] = "at rest"
        self._moved: list[tuple[Tensor, Tensor]] = []
        self._before: dict[Tensor, Tensor] = {}
        self._between: Leftovers | None = None
        self._nothing = torch.zeros(())
        self._ascent = _Ascent(self)

    @torch.no_grad()
    def first_step(
        self, *, zero_grad: bool = False, scaler: torch.amp.GradScaler | None = None
    ) -> None:
        """Move to the worst point nearby, from the gradient at the weights.

        Args:
            zero_grad: Zero the gradients afterwards.
            scaler: What the loss was scaled by. It unscales the gradients here; if one of them is
                not finite, the weights stay, also in :meth:`second_step`.

        Raises:
            RuntimeError: If the last first step has not been followed by a second one, or no
                parameter has a gradient.
            UnsupportedModelError: As the class; or with a scaler and sharded parameters.
        """
        self._check_at_rest()
        self._ascend(scaler or self.scaler)
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
        if closure is None:
            if self._stage not in ("back", "gathered"):
                raise RuntimeError(_ONE_GRADIENT)
            self._stage = "at rest"
            self.base_optimizer.step()
            return None
        scaler = scaler or self.scaler
        if micro_batches is not None:
            loss = self._gather(closure, micro_batches, model)
        else:
            loss, _ = self._nearby(closure, model, scaler)
        if self._stage == "skipped":
            self._stage = "at rest"
        elif scaler is None:
            self.base_optimizer.step()
        else:
            scaler.unscale_(self.base_optimizer)  # before its hooks, which may clip
            scaler.step(self.base_optimizer)
        return loss

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
        loss = self._add(closure, model)
        self._stage = "gathered"
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: FBT001, FBT002 - as its base's
        """Zero the gradients, and forget what was accumulated."""
        super().zero_grad(set_to_none)
        if self._stage == "gathered":
            self._stage = "at rest"

    def _gather(
        self, closure: Callable[[Any], Any], micro_batches: int | Iterable[Any], model: Any
    ) -> Any:
        """The mean of the micro-batches' gradients, and that of their losses."""
        parts = range(micro_batches) if isinstance(micro_batches, int) else micro_batches
        self.zero_grad()
        losses = [self._add(partial(closure, part), model, keep=True) for part in parts]
        if not losses:
            raise ValueError("micro_batches must be at least one, or hold at least one; got none")
        with torch.no_grad():
            for gradient in self._gradients():
                gradient.div_(len(losses))
        return None if losses[0] is None else sum(losses) / len(losses)

    def _add(self, closure: Callable[[], Any], model: Any, *, keep: bool = False) -> Any:
        """Add one gradient to what is there, unless the closure zeroes that and it is not kept."""
        self._check_at_rest()
        gathered = self._stage == "gathered"
        there = {p: p.grad.clone() for p in self._parameters() if p.grad is not None}
        super().zero_grad(set_to_none=False)
        loss, kept = self._nearby(closure, model)
        if not (keep or gathered) and nonzero({p: amount(there[p]) for p in kept}):
            raise RuntimeError(
                "there are gradients that accumulate() did not add, such as those of an earlier "
                "step, or of a micro-batch at the weights themselves: call zero_grad() before the "
                "first micro-batch, and accumulate(closure) for every one"
            )
        with torch.no_grad():
            for p in there if keep else kept:
                p.grad = there[p] if p.grad is None else p.grad.add_(there[p])
        return loss

    def _nearby(
        self,
        closure: Callable[[], Any],
        model: nn.Module | None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> tuple[Any, list[Tensor]]:
        """Call the closure at the weights and nearby; the second call's gradients alone are left.

        Returns:
            The loss at the weights, and the parameters whose gradients the closure did not zero.
        """
        self._check_at_rest()
        gathered = self._take_gathered()
        again = remember_randomness({p.device for p in self._parameters()})
        leftovers = Leftovers(self._parameters())
        try:
            with torch.enable_grad():
                loss = closure()
        finally:
            leftovers.close()
        # By the closure itself, or before one that does nothing, as some trainers pass.
        if self._take_gathered() or (gathered and not leftovers.arrived):
            return loss, []
        if leftovers.added_to():
            raise RuntimeError(
                "the closure added to gradients that were there before it, which its second call "
                "would know nothing of: call zero_grad() in it or before it. To accumulate over "
                "micro-batches, as a trainer's accumulate_grad_batches does, go backward in "
                "accumulate(closure) for each of them, then call step() without a closure"
            )
        if leftovers.zeroed_late():
            raise RuntimeError(_NO_GRADIENT)
        if not self._ascend(scaler):
            return loss, []
        model = self.model if model is None else model
        frozen = nullcontext() if model is None else frozen_statistics(model)
        try:
            super().zero_grad(set_to_none=False)  # in place: a CUDA graph writes where they are
            with torch.enable_grad(), again(), frozen:
                closure()
        finally:
            self._return()
        if not (leftovers.arrived or any(map(amount, self._gradients()))):
            raise RuntimeError(_ONE_GRADIENT)
        self._doubt()
        return loss, leftovers.kept

    def _check_at_rest(self) -> None:
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

    @torch.no_grad()
    def _ascend(self, scaler: torch.amp.GradScaler | None) -> bool:
        """Move by the gradients at hand, unless the scaler finds that one is not finite.

        Raises:
            RuntimeError: If there is none.
            UnsupportedModelError: If the parameters are sharded in a way that does not go.
        """
        self._refuse_flattened()
        if next(self._gradients(), None) is None:
            raise RuntimeError(_NO_GRADIENT)
        if scaler is None:
            self._move()
        elif scaler.is_enabled() and any(map(is_spread, self._parameters())):
            raise UnsupportedModelError(
                "a gradient scaler looks at one process's part of sharded gradients alone: train "
                "in bfloat16, which needs none"
            )
        else:
            scaler.step(self._ascent)  # type: ignore[arg-type]  # needs no more of an optimizer
        if not self._moved:
            self._stage = "skipped"
        return bool(self._moved)

    def _move(self) -> None:
        """Keep the weights and add ``epsilon`` to them."""
        families = self._families()
        norm = self._norm(families)
        self._nothing = norm - norm  # NaN where a gradient is not finite
        # Where every gradient is zero, so is the step, without a 0 / 0. Other norms are larger than
        # this, since squares of smaller numbers vanish.
        inverse = norm.clamp_(min=torch.finfo(norm.dtype).tiny ** 0.75).reciprocal_()
        for group, _, parameters, weights, gradients in families:
            before = [self._kept(p, w) for p, w in zip(parameters, weights, strict=True)]
            self._moved += zip(weights, before, strict=True)
            torch._foreach_copy_(before, weights)
            factor = inverse.to(weights[0])
            factors = [factor] * len(weights)
            if group["adaptive"]:
                factors = _sizes(weights, group["eta"])
                torch._foreach_mul_(factors, factors)
                torch._foreach_mul_(factors, factor.to(factors[0]))
            torch._foreach_addcmul_(weights, gradients, factors, value=group["rho"])
        self._stage = "moved"
        torch.clear_autocast_cache()  # or a surrounding autocast goes on with the old weights

    def _return(self) -> None:
        """Put the weights back, if they were moved."""
        self._stage = "at rest"
        if self._moved:
            with torch.no_grad():
                weights, before = map(list, zip(*self._moved, strict=True))
                torch._foreach_copy_(weights, before)
            self._moved = []
            torch.clear_autocast_cache()

    @torch.no_grad()
    def _doubt(self) -> None:
        """Let no gradient pass for finite that was found where one led that is not."""
        gradient = next((g for g in self._gradients() if not g.is_sparse), None)
        if gradient is not None:
            local(gradient).add_(self._nothing.to(local(gradient)))

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

    def _kept(self, p: Tensor, like: Tensor) -> Tensor:
        """Where the weights are kept; the same memory every step, since fresh pages cost more."""
        before = self._before.get(p)
        if before is None or (before.shape, before.dtype, before.device) != (
            like.shape,
            like.dtype,
            like.device,
        ):
            before = self._before[p] = torch.empty_like(like, requires_grad=False)
        return before

    def _families(self) -> list[_Family]:
        """The parameters with gradients, by group, device, type and layout."""
        families: dict[Any, _Family] = {}
        for index, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p.grad is not None:
                    key = (index, p.device, p.dtype, layout(p))
                    family = families.setdefault(key, _Family(group, layout(p), [], [], []))
                    family.parameters.append(p)
                    family.weights.append(local(p))
                    gradient = local_like(p.grad, p)
                    family.gradients.append(gradient.to_dense() if gradient.is_sparse else gradient)
        return list(families.values())

    def _norm(self, families: list[_Family]) -> Tensor:
        """``||T g||`` over all groups and processes, on the device of the first parameter."""
        norms: list[Tensor] = []
        for group, how, _, weights, gradients in families:
            scaled = gradients
            if group["adaptive"]:
                scaled = list(torch._foreach_mul(gradients, _sizes(weights, group["eta"])))  # noqa: SLF001
            # The norm may be beyond half precision though its parts are not.
            half = weights[0].dtype in (torch.float16, torch.bfloat16)
            each = torch._foreach_norm(scaled, 2, torch.float32 if half else None)  # noqa: SLF001
            norm = torch.linalg.vector_norm(torch.stack(each))
            if how is not None:  # double, for squares of large ones
                norm = sum_over_parts(norm.double().square(), how).sqrt().to(norm)
            norms.append(norm)
        if len(norms) == 1:
            return norms[0]
        total: Tensor = torch.linalg.vector_norm(torch.stack([n.to(norms[0]) for n in norms]))
        return total

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
        super().load_state_dict(state_dict | {"param_groups": groups})

    def __getstate__(self) -> dict[str, Any]:
        more = ("base_optimizer", "model", "scaler")
        return super().__getstate__() | {name: getattr(self, name) for name in more}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # also what load_state_dict() ends with
        # One state and one list of groups for both, so that neither can fall behind. The base
        # optimizer's own way of taking them adds settings that older versions did not have.
        self.base_optimizer.__setstate__({"state": self.state, "param_groups": self.param_groups})
        if "_stage" not in self.__dict__:
            self._rest()


class _Ascent:
    """The first step as a gradient scaler takes it: unscaled, and only if all is finite.

    A scaler unscales once per step and optimizer, and tells optimizers apart by identity. So the
    two gradients of a step need two of them, and its update() looks at what it found in both.
    """

    def __init__(self, optimizer: SAM) -> None:
        self._optimizer = optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups

    def step(self) -> None:
        self._optimizer._move()  # noqa: SLF001


def _sizes(weights: list[Tensor], eta: float) -> list[Tensor]:
    """``T``, the sizes by which the adaptive neighbourhood is measured."""
    sizes = list(torch._foreach_abs(weights))  # noqa: SLF001
    torch._foreach_add_(sizes, eta)
    return sizes

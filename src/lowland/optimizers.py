"""Sharpness-aware minimization around any optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from inspect import signature
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lowland.passes import frozen_statistics, remember_randomness


class _Family(NamedTuple):
    """What operations on lists take at once: one group's tensors of one device and type."""

    group: dict[str, Any]
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
    them.

    Args:
        params: Parameters or parameter groups, as for any optimizer. A group may set ``rho``,
            ``adaptive`` and ``eta`` of its own.
        base_optimizer: The class that makes the step, for example ``torch.optim.SGD``.
        rho: Radius of the neighbourhood, at least zero; zero is the base optimizer alone.
        adaptive: Measure the neighbourhood relative to each weight's size.
        eta: What is added to a weight's size, at least zero; only if adaptive.
        **base: Settings of the base optimizer.

    Raises:
        ValueError: If ``rho`` or ``eta`` is negative or not finite.
        TypeError: If ``base_optimizer`` is not a class of optimizers, or its steps need a closure,
            as those of ``torch.optim.LBFGS``.

    Notes:
        A step costs two gradients. Learning rate schedulers and checkpoints treat it like any other
        optimizer: its parameter groups and its state are those of the base optimizer. Nothing waits
        for the device, except for what a gradient scaler does.

        Under ``DistributedDataParallel`` the neighbourhood is that of the whole batch, since the
        gradients are averaged over processes before :meth:`first_step`. Gradients may be
        accumulated over micro-batches, all of them in both passes.

    References:
        Foret et al., Sharpness-aware minimization for efficiently improving generalization (2021),
        algorithm 1. Kwon et al., ASAM: adaptive sharpness-aware minimization (2021), algorithm 1.

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
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: type[Optimizer],
        rho: float = 0.05,
        *,
        adaptive: bool = False,
        eta: float = 0.01,
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
        self.base_optimizer = base_optimizer(self.param_groups, **base)
        self.defaults = self.base_optimizer.defaults | self.defaults
        self.param_groups = self.base_optimizer.param_groups
        self.state = self.base_optimizer.state
        self._rest()

    def _rest(self) -> None:
        self._stage: Literal["at rest", "moved", "skipped", "back"] = "at rest"
        self._moved: list[Tensor] = []
        self._before: dict[Tensor, Tensor] = {}
        self._ascent = _Ascent(self)

    def _share(self) -> None:
        """One state and one list of groups for both, so that neither can fall behind."""
        self.base_optimizer.param_groups = self.param_groups
        self.base_optimizer.state = self.state

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
        """
        if self._stage != "at rest":
            raise RuntimeError(
                "first_step() was called twice in a row; call second_step() in between"
            )
        if all(p.grad is None for group in self.param_groups for p in group["params"]):
            raise RuntimeError("no parameter has a gradient; call backward() before first_step()")
        if scaler is None:
            self._move()
        else:
            scaler.step(self._ascent)  # type: ignore[arg-type]  # needs no more of an optimizer
        if not self._moved:
            self._stage = "skipped"
        if zero_grad:
            self.zero_grad()

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
            RuntimeError: If no first step came before it.
        """
        if self._stage == "at rest":
            raise RuntimeError("second_step() needs a first_step() before it")
        skipped = self._stage == "skipped"
        self._return()
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
        closure: Callable[[], Any] | None = None,
        *,
        model: nn.Module | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Any:
        """Both steps; ``closure`` zeroes the gradients, computes the loss and goes backward.

        Both calls of the closure draw the same random numbers, so that dropout gives both
        gradients the same mask.

        Args:
            closure: Returns the loss.
            model: The modules whose running statistics, as of batch normalization, only the first
                call of the closure updates.
            scaler: With it the closure calls ``scaler.scale(loss).backward()``. If a gradient is
                not finite, the step is left out; call ``scaler.update()`` after it, as always.

        Returns:
            The loss at the weights, as the closure returned it at first.

        Raises:
            RuntimeError: Without a closure.
        """
        if closure is None:
            if self._stage != "back":
                raise RuntimeError(
                    "SAM needs two gradients a step: pass a closure that zeroes the gradients, "
                    "computes the loss, calls backward() and returns it; or call first_step() and "
                    "second_step(), which take a gradient scaler too"
                )
            self.base_optimizer.step()
            return None
        again = remember_randomness(
            {p.device for group in self.param_groups for p in group["params"]}
        )
        with torch.enable_grad():
            loss = closure()
        self.first_step(scaler=scaler)
        if self._stage == "skipped":
            self._return()
            return loss
        frozen = nullcontext() if model is None else frozen_statistics(model)
        try:
            with torch.enable_grad(), again(), frozen:
                closure()
        finally:
            self._return()
        if scaler is None:
            self.base_optimizer.step()
        else:
            scaler.unscale_(self.base_optimizer)  # before its hooks, which may clip
            scaler.step(self.base_optimizer)
        return loss

    def _move(self) -> None:
        """Keep the weights and add ``epsilon`` to them."""
        families = self._families()
        norm = self._norm(families)
        # Where every gradient is zero, so is the step, without a 0 / 0. Other norms are larger than
        # this, since squares of smaller numbers vanish.
        inverse = norm.clamp_(min=torch.finfo(norm.dtype).tiny ** 0.75).reciprocal_()
        for group, weights, gradients in families:
            self._moved += weights
            torch._foreach_copy_([self._kept(p) for p in weights], weights)
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
                torch._foreach_copy_(self._moved, [self._before[p] for p in self._moved])
            self._moved = []
            torch.clear_autocast_cache()

    def _kept(self, p: Tensor) -> Tensor:
        """Where the weights are kept; the same memory every step, since fresh pages cost more."""
        before = self._before.get(p)
        if before is None or (before.shape, before.dtype, before.device) != (
            p.shape,
            p.dtype,
            p.device,
        ):
            before = self._before[p] = torch.empty_like(p, requires_grad=False)
        return before

    def _families(self) -> list[_Family]:
        """The parameters with gradients, by group, device and type."""
        families: dict[Any, _Family] = {}
        for index, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p.grad is not None:
                    key = (index, p.device, p.dtype)
                    family = families.setdefault(key, _Family(group, [], []))
                    family.weights.append(p)
                    family.gradients.append(p.grad)
        return list(families.values())

    def _norm(self, families: list[_Family]) -> Tensor:
        """``||T g||`` over all groups, on the device of the first parameter."""
        norms: list[Tensor] = []
        for group, weights, gradients in families:
            scaled = gradients
            if group["adaptive"]:
                scaled = list(torch._foreach_mul(gradients, _sizes(weights, group["eta"])))  # noqa: SLF001
            # The norm may be beyond half precision though its parts are not.
            half = weights[0].dtype in (torch.float16, torch.bfloat16)
            each = torch._foreach_norm(scaled, 2, torch.float32 if half else None)  # noqa: SLF001
            norms.append(torch.linalg.vector_norm(torch.stack(each)))
        if len(norms) == 1:
            return norms[0]
        total: Tensor = torch.linalg.vector_norm(torch.stack([n.to(norms[0]) for n in norms]))
        return total

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"base_optimizer": self.base_optimizer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # also what load_state_dict() ends with
        self._share()
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

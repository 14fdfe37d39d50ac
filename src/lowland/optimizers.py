"""Sharpness-aware minimization around any optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class SAM(Optimizer):
    r"""Sharpness-aware minimization, plain or adaptive, around any optimizer.

    With the gradient :math:`g = \nabla L(w)`, the base optimizer steps with
    :math:`\nabla L(w + \epsilon)`, where

    .. math:: \epsilon = \rho\, T^2 g / \lVert T g \rVert, \qquad T = 1
        \text{ or, adaptive, } T = \mathrm{diag}(|w| + \eta)

    and the norm is taken over all parameters of all groups. Two gradients a step::

        def closure():
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            return loss

        optimizer = lowland.SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1)
        loss = optimizer.step(closure)

    Where a closure does not fit, call :meth:`first_step` after the first backward pass, zero the
    gradients, go backward again, and call :meth:`second_step`.

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
        TypeError: If ``base_optimizer`` is not a class of optimizers.

    Notes:
        A step costs two gradients. Learning rate schedulers and checkpoints treat it like any other
        optimizer: its parameter groups and its state are those of the base optimizer.

    References:
        Foret et al., Sharpness-aware minimization for efficiently improving generalization (2021),
        algorithm 1. Kwon et al., ASAM: adaptive sharpness-aware minimization (2021), algorithm 1.
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
        self._before: dict[Tensor, Tensor] = {}

    def _share(self) -> None:
        """One state and one list of groups for both, so that neither can fall behind."""
        self.base_optimizer.param_groups = self.param_groups
        self.base_optimizer.state = self.state

    @torch.no_grad()
    def first_step(self, *, zero_grad: bool = False) -> None:
        """Move to the worst point nearby, from the gradient at the weights.

        Raises:
            RuntimeError: If the last first step has not been followed by a second one, or no
                parameter has a gradient.
        """
        if self._before:
            raise RuntimeError(
                "first_step() was called twice in a row; call second_step() in between"
            )
        norm = self._norm()
        for group in self.param_groups:
            # Where every gradient is zero, so is the step; the clamp keeps 0 / 0 out of it.
            scale = group["rho"] / norm.clamp(min=torch.finfo(norm.dtype).tiny)
            for p in group["params"]:
                if p.grad is None:
                    continue
                self._before[p] = p.detach().clone()
                direction = p.grad
                if group["adaptive"]:
                    direction = direction * (p.abs() + group["eta"]).square()
                p.add_(direction * scale.to(p))
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, *, zero_grad: bool = False) -> None:
        """Go back to the weights, bit for bit, and step with the gradient found nearby.

        Raises:
            RuntimeError: If no first step came before it.
        """
        if not self._before:
            raise RuntimeError("second_step() needs a first_step() before it")
        for p, before in self._before.items():
            p.copy_(before)
        self._before.clear()
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Both steps; ``closure`` zeroes the gradients, computes the loss and goes backward.

        Returns:
            The loss at the weights, as the closure returned it at first.

        Raises:
            RuntimeError: Without a closure.
        """
        if closure is None:
            raise RuntimeError(
                "SAM needs two gradients a step: pass a closure that zeroes the gradients, "
                "computes the loss, calls backward() and returns it; or call first_step() and "
                "second_step()"
            )
        with torch.enable_grad():
            loss = closure()
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()
        return loss

    def _norm(self) -> Tensor:
        """``||T g||`` over all groups, on the device of the first parameter."""
        norms = [
            torch.linalg.vector_norm(
                p.grad * (p.abs() + group["eta"]) if group["adaptive"] else p.grad
            )
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        if not norms:
            raise RuntimeError("no parameter has a gradient; call backward() before first_step()")
        total: Tensor = torch.linalg.vector_norm(torch.stack([n.to(norms[0]) for n in norms]))
        return total

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"base_optimizer": self.base_optimizer, "_before": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # also what load_state_dict() ends with
        self._share()

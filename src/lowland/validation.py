"""Checks at the door, shared by every engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import TypeGuard

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.parameter import Parameter, UninitializedParameter

from lowland._sharding import is_flattened, is_sharded
from lowland.errors import UnsupportedModelError
from lowland.losses import Loss

_RUN = 1 << 16  # values looked at together, so that a check's own memory stays constant
_TYPES = (torch.float32, torch.float64)


def check_tensor(value: object, name: str) -> None:
    """Require a tensor with all of its numbers.

    Raises:
        TypeError: If it is something else, such as an array.
        UnsupportedModelError: If it is spread over processes.
        RuntimeError: If it stands for a batch of tensors within ``torch.func.vmap``.
    """
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be a torch.Tensor; got {type(value).__module__}.{type(value).__name__}: "
            "convert it with torch.as_tensor"
        )
    if is_sharded(value):
        raise UnsupportedModelError(
            f"{name} is spread over processes; use {name}.full_tensor() in each of them"
        )
    if _is_batched(value):
        raise RuntimeError(
            f"{name} comes from torch.func.vmap, which does not go through the closed form; give "
            "lowland.exact the whole batch instead: leading dimensions of weights, x and y are "
            "those of an ensemble, which is computed in one call"
        )


def check_strided(tensor: Tensor, name: str) -> None:
    """Require a tensor that holds its zeros too.

    Raises:
        UnsupportedModelError: If it is sparse.
    """
    if tensor.layout != torch.strided:
        raise UnsupportedModelError(
            f"{name} is sparse, which the closed form does not take; use {name}.to_dense()"
        )


def _is_batched(value: Tensor) -> bool:
    functorch = torch._C._functorch  # noqa: SLF001 - PyTorch has no public name for it
    while functorch.is_functorch_wrapped_tensor(value):
        if functorch.is_batchedtensor(value):
            return True
        value = functorch.get_unwrapped(value)
    return False


def check_parameters(named: Mapping[str, Tensor]) -> None:
    """Require parameters that have shapes and are all here.

    Raises:
        ValueError: If a lazy layer has not seen any data.
        UnsupportedModelError: If each process holds a part of them.
    """
    if all(type(part) is Parameter and not is_flattened(part) for part in named.values()):
        return
    lazy = [name for name, part in named.items() if isinstance(part, UninitializedParameter)]
    if lazy:
        raise ValueError(
            f"the model's parameter {lazy[0]!r} belongs to a lazy layer that has no weights yet; "
            "call model(x) once first"
        )
    sharded = [name for name, part in named.items() if is_sharded(part)]
    if sharded:
        raise UnsupportedModelError(
            f"the model's parameter {sharded[0]!r} is sharded: each process holds a part of it, "
            "and the curvature in a part is not that in the whole. Load into a model that is not "
            "what torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
            "options=StateDictOptions(full_state_dict=True)) gathers, or train with "
            "DistributedDataParallel"
        )


def check_types(parameters: Mapping[str, Tensor]) -> None:
    """Require parameters of types whose curvature is more than rounding.

    Raises:
        TypeError: If one is neither float32 nor float64.
    """
    for name, part in parameters.items():
        if part.dtype not in _TYPES:
            raise TypeError(
                f"the model must be float32 or float64; {name!r} is "
                f"{str(part.dtype).removeprefix('torch.')}. Convert it, with model.float() or "
                "model.double(), and x likewise; torch.autocast may then run it in half precision"
            )


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a real number of any library."""
    return isinstance(value, Real)


def check_l2(l2: object) -> None:
    """Require a weight decay.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is negative or not finite.
    """
    if not is_number(l2):
        raise TypeError(f"l2 must be a number, such as an optimizer's weight_decay; got {l2!r}")
    if not (math.isfinite(l2) and l2 >= 0):
        raise ValueError(f"l2 must be a finite number of at least 0; got {l2}")


def check_tolerance(prune: object) -> None:
    """Require a relative tolerance of what is left out.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is not between 0 and 1.
    """
    if not is_number(prune):
        raise TypeError(f"prune must be a relative tolerance, such as 1e-3, or None; got {prune!r}")
    if not 0 < prune < 1:
        raise ValueError(
            f"prune must be a relative tolerance above 0 and below 1, or None; got {prune}"
        )


def check_budget(budget: float) -> int:
    """A budget in bytes.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is not finite.
    """
    if not is_number(budget):
        raise TypeError(
            f"memory_budget must be a number of bytes, such as 1 << 30 for 1 GiB; got {budget!r}"
        )
    if not math.isfinite(budget):
        raise ValueError(f"memory_budget must be a finite number of bytes; got {budget}")
    return int(budget)


def check_constant(value: object, name: str) -> None:
    """Require data that ask for no gradient: the closed form has none to give them.

    Raises:
        UnsupportedModelError: If a gradient would silently be left out.
    """
    if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
        raise UnsupportedModelError(
            f"expected {name} without requires_grad, since the closed form has no gradients in it "
            f"here; use {name}.detach(), or method='dense' of lowland.hessian_moments, which "
            "differentiates in all data"
        )


def check_features(tensor: Tensor, *, like: Tensor, name: str = "x") -> None:
    """Require a finite tensor of a floating-point type that the closed form supports.

    Raises:
        TypeError: If the type or the device is not that of ``like``.
        ValueError: If the tensor is empty or has NaN or infinite values.
    """
    # What nearly every tensor is, told in few steps: these are taken in each step of a training.
    plain = type(tensor) in (Tensor, Parameter) and tensor.layout is torch.strided
    if not plain or is_flattened(tensor) or _is_batched(tensor):
        check_tensor(tensor, name)
        check_strided(tensor, name)
    if tensor.dtype not in _TYPES:
        use = like.dtype if like.dtype in _TYPES else torch.float64
        raise TypeError(
            f"{name} must be float32 or float64; got {str(tensor.dtype).removeprefix('torch.')}. "
            f"Convert it, for example with {name}.to({use})"
        )
    if tensor.dtype != like.dtype or tensor.device != like.device:
        raise TypeError(
            f"{name} is {_describe(tensor)} but the weights are {_describe(like)}; use one type "
            "and one device for both"
        )
    check_values(tensor, name)


def check_values(tensor: Tensor, name: str) -> None:
    """Require at least one value, and finite ones.

    Values are looked at on the CPU only; elsewhere the look would wait for the device.

    Raises:
        ValueError: If the tensor is empty or has NaN or infinite values.
    """
    if tensor.numel() == 0:
        raise ValueError(f"{name} is empty: got shape {tuple(tensor.shape)}")
    if tensor.is_floating_point() and tensor.device.type == "cpu":
        check_finite(tensor, name)


def check_finite(tensor: Tensor, name: str) -> None:
    """Require finite values.

    Raises:
        ValueError: With the number of offending values.
    """
    # One sum finds nearly every case without a temporary; only a suspicious one is looked into.
    if math.isfinite(tensor.detach().sum().item()):
        return
    bad = sum(int((~torch.isfinite(run)).sum()) for run in tensor.detach().flatten().split(_RUN))
    if bad:
        raise ValueError(
            f"{name} has {bad} NaN or infinite value{'s' if bad > 1 else ''} out of "
            f"{tensor.numel()}; remove or impute them first"
        )


def check_weights(weights: Sequence[Tensor]) -> None:
    """Require weights of layers that follow one another.

    Raises:
        TypeError: If their types or devices differ, or the closed form has no such type.
        ValueError: If there is none, a shape does not suit, or a value is not finite.
    """
    if isinstance(weights, Tensor) or not len(weights):
        got = "a tensor" if isinstance(weights, Tensor) else "none"
        raise ValueError(f"expected a sequence of weight tensors, one for each layer; got {got}")
    for index, weight in enumerate(weights):
        name = f"weights[{index}]"
        check_tensor(weight, name)
        if weight.ndim < 2:
            raise ValueError(
                f"expected {name} of shape (*ensemble, inputs + 1, outputs), bias in row 0; got "
                f"{tuple(weight.shape)}"
            )
        check_features(weight, like=weights[0], name=name)
        if index and weight.shape[-2] != weights[index - 1].shape[-1] + 1:
            before = weights[index - 1]
            raise ValueError(
                f"weights do not chain: weights[{index - 1}] of shape {tuple(before.shape)} has "
                f"{before.shape[-1]} outputs, so {name} must have {before.shape[-1] + 1} rows, "
                f"bias in row 0; got {tuple(weight.shape)}"
            )


def as_outputs(
    y: Tensor, *, samples: tuple[int, ...], outputs: int, loss: Loss, like: Tensor
) -> Tensor:
    """Targets with one column for each output, after a look at their shape and their values.

    Returns:
        ``(..., samples, outputs)``; labels of classes become distributions.

    Raises:
        TypeError: If ``y`` is complex or on another device.
        ValueError: If its shape does not match or its values do not suit the loss.
    """
    check_tensor(y, "y")
    check_strided(y, "y")
    if y.device != like.device or y.is_complex():
        raise TypeError(f"y is {_describe(y)} but the weights are {_describe(like)}")
    count = samples[-1]
    if loss.targets == "classes":
        if outputs < 2:
            raise ValueError(
                f"{loss.name!r} takes one logit for each of at least two classes; got one output: "
                "use 'bce' for one logit"
            )
        if y.is_floating_point() and tuple(y.shape[-2:]) == (count, outputs):
            _check_distributions(y)
            return y.to(like.dtype)
        if y.shape[-1:] != (count,) and tuple(y.shape[-2:]) == (count, outputs):
            check_one_per_sample(y)
    elif outputs > 1:
        if y.ndim < 2 or tuple(y.shape[-2:]) != (count, outputs):
            raise ValueError(
                f"x and y do not match: with {count} samples and {outputs} outputs y must have "
                f"shape ({count}, {outputs}) for {loss.name!r}; got {tuple(y.shape)}"
            )
        check_targets(y, loss)
        return y
    # A column for one output too, as PyTorch's criteria take it.
    column = loss.targets != "classes" and y.ndim > 1 and tuple(y.shape[-2:]) == (count, 1)
    y = y.squeeze(-1) if column else y
    if y.ndim < 1 or y.shape[-1] != count:
        also = "" if loss.targets == "classes" else f" or ({count}, 1)"
        raise ValueError(
            f"x and y do not match: x has {count} samples, so y must have shape "
            f"({count},){also}; got {tuple(y.shape)}"
        )
    if loss.targets != "classes":
        check_targets(y, loss)
        return y.unsqueeze(-1)
    check_labels(y, outputs)
    return functional.one_hot(y.long(), outputs).to(like.dtype)


def check_targets(y: Tensor, loss: Loss) -> None:
    """Require targets that suit a loss with one of them for each logit.

    Raises:
        ValueError: If a value is not finite, or not one that the loss takes.
    """
    if y.device.type != "cpu":
        return
    if y.is_floating_point():
        check_finite(y, "y")
    if loss.targets == "real" or is_binary(y):
        return
    if loss.targets == "binary":
        expected, bad = "labels 0 or 1", _first(y, lambda run: (run != 0) & (run != 1))
    else:
        expected, bad = "labels between 0 and 1", _first(y, lambda run: (run < 0) | (run > 1))
    if bad is not None:
        raise ValueError(
            f"y must hold {expected} for {loss.name!r}; got {bad:g}. Encode two classes as 0 and 1"
        )


def is_binary(y: Tensor) -> bool:
    """Whether all targets are 0 or 1; a look at their values."""
    # 0 and 1 alone are their own squares, in arithmetic of whole numbers that wraps around too.
    return all(torch.equal(run * run, run) for run in y.detach().reshape(-1).split(_RUN))


def _first(y: Tensor, wrong: Callable[[Tensor], Tensor]) -> float | None:
    """The first value that is wrong, if there is one."""
    for run in y.detach().reshape(-1).split(_RUN):
        found = wrong(run)
        if bool(found.any()):
            return float(run[found][0])
    return None


def check_one_per_sample(y: Tensor) -> None:
    """Refuse labels that were encoded as rows of whole numbers.

    Raises:
        ValueError: If there are several numbers for a sample.
    """
    if y.ndim > 1:
        raise ValueError(
            f"labels of classes must be one whole number for each sample; got shape "
            f"{tuple(y.shape)}, as of one-hot rows: use y.argmax(-1), or make distributions of "
            "them with y.double()"
        )


def are_labels(y: Tensor, classes: int) -> bool:
    """Whether whole numbers on the processor are one of so many labels each."""
    if y.device.type != "cpu" or not y.numel():
        return False
    least, most = y.aminmax()
    return bool(least.item() >= 0 and most.item() < classes)


def check_labels(y: Tensor, classes: int) -> None:
    """Require labels from 0 on, one for each class at most.

    Raises:
        ValueError: If a label is another number.
    """
    if y.device.type != "cpu":
        return
    if y.is_floating_point():
        check_finite(y, "y")
    elif are_labels(y, classes):
        return

    def wrong(run: Tensor) -> Tensor:
        outside = (run < 0) | (run >= classes)
        return outside | (run != run.floor()) if y.is_floating_point() else outside

    bad = _first(y, wrong)
    if bad is not None:
        raise ValueError(
            f"y must hold labels from 0 to {classes - 1}, one for each output; got {bad:g}"
        )


def _check_distributions(y: Tensor) -> None:
    if y.device.type != "cpu":
        return
    check_finite(y, "y")
    if bool((y < 0).any()):
        raise ValueError(
            f"y must hold a probability for each class; got {y[y < 0][0].item()}, which is negative"
        )


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"

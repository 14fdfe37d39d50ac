"""Checks at the door, shared by every engine."""

from __future__ import annotations

import torch
from torch import Tensor

from lowland.losses import Loss

_RUN = 1 << 16  # values looked at together, so that a check's own memory stays constant


def check_features(tensor: Tensor, *, like: Tensor, name: str = "x") -> None:
    """Require a finite tensor of a floating-point type that the closed form supports.

    Raises:
        TypeError: If the type or the device is not that of ``like``.
        ValueError: If the tensor is empty or has NaN or infinite values.
    """
    if tensor.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{name} must be float32 or float64; got {str(tensor.dtype).removeprefix('torch.')}. "
            f"Convert it, for example with {name.partition('[')[0]}.double()"
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
    if bool(torch.isfinite(tensor.detach().sum())):
        return
    bad = sum(int((~torch.isfinite(run)).sum()) for run in tensor.detach().flatten().split(_RUN))
    if bad:
        raise ValueError(
            f"{name} has {bad} NaN or infinite value{'s' if bad > 1 else ''} out of "
            f"{tensor.numel()}; remove or impute them first"
        )


def check_targets(y: Tensor, *, samples: tuple[int, ...], loss: Loss, like: Tensor) -> None:
    """Require one target per sample, of values that the loss can take.

    Raises:
        TypeError: If ``y`` is complex or on another device.
        ValueError: If its shape does not end in the number of samples or its values do not suit.
    """
    if y.device != like.device or y.is_complex():
        raise TypeError(f"y is {_describe(y)} but the weights are {_describe(like)}")
    if y.ndim < 1 or y.shape[-1] != samples[-1]:
        raise ValueError(
            f"x and y do not match: x has {samples[-1]} samples, so y must have shape "
            f"({samples[-1]},); got {tuple(y.shape)}"
        )
    if y.device.type != "cpu":
        return
    if y.is_floating_point():
        check_finite(y, "y")
    if loss.binary:
        for run in y.detach().reshape(-1).split(_RUN):
            if not bool(((run == 0) | (run == 1)).all()):
                bad = run[(run != 0) & (run != 1)][0].item()
                raise ValueError(
                    f"y must hold labels 0 or 1 for {loss.name!r}; got {bad}. Encode two classes "
                    "as 0 and 1"
                )


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"

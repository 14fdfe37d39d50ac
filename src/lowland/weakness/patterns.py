r"""Activation patterns: which units of a layer are active, and where no training point tells."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from lowland.validation import check_finite, check_tensor

_BITS = 8  # in a byte, the smallest thing that can be compared


def pack(active: Bool[Tensor, "points units"]) -> UInt8[Tensor, "points bytes"]:
    """Each row's bits in as few bytes as hold them; the last byte is filled with zeros."""
    points, units = active.shape
    size = -(-units // _BITS)
    padded = torch.zeros(points, size * _BITS, dtype=torch.uint8, device=active.device)
    padded[:, :units] = active
    # Halving three times reads each bit once, and eightfold copies are never made.
    while padded.shape[1] > size:
        shift = padded.shape[1] // size
        padded = padded.view(points, padded.shape[1] // 2, 2)
        width = _BITS // shift
        padded = (padded[..., 0] << width) | padded[..., 1]
    return padded


def activation_patterns(
    activations: Float[Tensor, "points units"],
) -> tuple[UInt8[Tensor, "patterns bytes"], Int[Tensor, " points"]]:
    """The patterns ``1[a > 0]`` that occur, and which of them each point has.

    For ReLU it is the same before and after the activation.

    Args:
        activations: A layer's outputs, of any type.

    Returns:
        The distinct patterns, packed eight units a byte, the first unit in the highest bit; and
        the index of each point's pattern.

    Raises:
        ValueError: If it is no matrix, or holds NaN or infinite values.

    Example:
        >>> import torch
        >>> from lowland.weakness import activation_patterns
        >>> train = torch.tensor([[0.0, 2.0], [0.0, 1.0], [3.0, 0.0]])  # two units at three points
        >>> patterns, index = activation_patterns(train)
        >>> len(patterns), bool(index[0] == index[1] != index[2])
        (2, True)
    """
    packed = pack(_active(activations, "activations"))
    words = _words(packed)
    if words.shape[1] == 1:
        unique, index = torch.unique(words[:, 0], return_inverse=True)
    else:
        unique, index = _unique_rows(words)
    first = torch.empty(len(unique), dtype=torch.long, device=index.device)
    first[index] = torch.arange(len(index), device=index.device)
    return packed[first], index


def count_patterns(activations: Float[Tensor, "points units"]) -> int:
    """How many distinct patterns occur.

    Example:
        >>> import torch
        >>> from lowland.weakness import count_patterns
        >>> train = torch.tensor([[0.0, 2.0], [0.0, 1.0], [3.0, 0.0]])  # two units at three points
        >>> count_patterns(train)
        2
    """
    return len(activation_patterns(activations)[0])


def free_regions(
    activations_train: Float[Tensor, "train units"],
    activations_unseen: Float[Tensor, "unseen units"],
) -> int:
    r"""How many patterns occur on unseen points and on no training point: ``k_free``.

    Training labels say nothing there. In the vocabulary of regions and K classes the weakness of
    the training labels' policy is :math:`(K + 1)^{k_\mathrm{free}}`.

    Raises:
        ValueError: If the layers' numbers of units differ.

    References:
        arXiv:2605.05209, table 3.

    Example:
        >>> import torch
        >>> from lowland.weakness import free_regions
        >>> train = torch.tensor([[0.0, 2.0], [0.0, 1.0], [3.0, 0.0]])  # two units at three points
        >>> unseen = torch.tensor([[1.0, 1.0], [0.0, 5.0]])
        >>> free_regions(train, unseen)  # no training point has both units active
        1
    """
    counts, unseen = _counts(activations_train, activations_unseen)
    return int((unseen & (counts == 0)).sum())


def free_parameters(
    activations_train: Float[Tensor, "train units"],
    num_classes: int,
    activations_unseen: Float[Tensor, "unseen units"] | None = None,
) -> int:
    r"""Parameters of a last layer for each region, less the training points that pin them.

    :math:`\sum_r \max(0, D K + K - n_r)` over patterns r with :math:`n_r` training points.

    Args:
        activations_train: The last hidden layer's outputs at training points, ``D`` units.
        num_classes: ``K``.
        activations_unseen: At further points, whose patterns count too.

    Raises:
        ValueError: If the layers' numbers of units differ, or there is no class.

    References:
        arXiv:2605.05209, table 3.

    Example:
        >>> import torch
        >>> from lowland.weakness import free_parameters
        >>> train = torch.tensor([[0.0, 2.0], [0.0, 1.0], [3.0, 0.0]])  # two units at three points
        >>> free_parameters(train, num_classes=2)  # 6 a region, less two points and less one
        9
    """
    if num_classes < 1:
        raise ValueError(f"num_classes must be positive; got {num_classes}")
    further = activations_train[:0] if activations_unseen is None else activations_unseen
    counts, _ = _counts(activations_train, further)
    each = (activations_train.shape[1] + 1) * num_classes
    return int((each - counts).clamp_min(0).sum())


def _counts(
    train: Float[Tensor, "train units"], unseen: Float[Tensor, "unseen units"]
) -> tuple[Int[Tensor, " patterns"], Bool[Tensor, " patterns"]]:
    """Of each pattern how many training points have it, and whether any unseen one does."""
    first, second = _active(train, "activations_train"), _active(unseen, "activations_unseen")
    if first.shape[1] != second.shape[1]:
        raise ValueError(
            "activations of training and of unseen points must have as many units; got shapes "
            f"{tuple(train.shape)} and {tuple(unseen.shape)}"
        )
    patterns, index = activation_patterns(torch.cat([first, second]).to(train.dtype))
    counts = torch.bincount(index[: len(first)], minlength=len(patterns))
    return counts, torch.bincount(index[len(first) :], minlength=len(patterns)) > 0


def _active(activations: Tensor, name: str) -> Bool[Tensor, "points units"]:
    check_tensor(activations, name)
    if activations.ndim != 2:
        raise ValueError(
            f"{name} must have shape (points, units); got {tuple(activations.shape)}: flatten "
            "channels and positions into units"
        )
    if activations.is_floating_point() and activations.device.type == "cpu":
        check_finite(activations, name)
    return activations.detach() > 0


def _words(packed: UInt8[Tensor, "points bytes"]) -> Int[Tensor, "points words"]:
    """Rows of bits, eight to a byte, as rows of whole numbers of 64 bits."""
    points, size = packed.shape
    wide = packed.new_zeros(points, max(-(-size // 8), 1) * 8)
    wide[:, :size] = packed
    return wide.view(torch.int64)


def _unique_rows(
    words: Int[Tensor, "points words"],
) -> tuple[Int[Tensor, " patterns"], Int[Tensor, " points"]]:
    """Number the distinct rows, one column after another.

    The numbers so far and the next column's stay below the points' number each, so that a pair of
    them is one whole number: columns are sorted by themselves, which is far faster than rows.
    """
    _, index = torch.unique(words[:, 0], return_inverse=True)
    for column in words.T[1:]:
        _, other = torch.unique(column, return_inverse=True)
        _, index = torch.unique(index * len(words) + other, return_inverse=True)
    return torch.arange(int(index.max()) + 1 if len(index) else 0, device=index.device), index

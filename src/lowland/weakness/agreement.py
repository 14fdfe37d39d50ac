"""Whether networks are wrong about the same points."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor


def ensemble_agreement(
    predictions: Int[Tensor, "networks unseen"], labels: Int[Tensor, " unseen"]
) -> Float[Tensor, " networks"]:
    """How many of the others get right what a network gets wrong.

    Args:
        predictions: Each network's classes of the unseen points.
        labels: The right ones.

    Returns:
        For each network, over the unseen points that it gets wrong, the mean fraction of the other
        networks that get them right; NaN for a network that gets none wrong.

    Raises:
        ValueError: If there are fewer than two networks, predictions are no classes, or the numbers
            of points differ.

    References:
        arXiv:2605.05209, tables 1 and 2.

    Example:
        >>> import torch
        >>> from lowland.weakness import ensemble_agreement
        >>> predictions = torch.tensor([[0, 1, 1], [0, 1, 0], [1, 1, 0]])  # three networks
        >>> ensemble_agreement(predictions, labels=torch.tensor([0, 1, 1]))
        tensor([   nan, 0.5000, 0.7500], dtype=torch.float64)
    """
    if predictions.ndim != 2 or len(predictions) < 2:
        raise ValueError(
            "expected predictions of at least two networks, shape (networks, unseen); got "
            f"{tuple(predictions.shape)}"
        )
    if predictions.is_floating_point():
        raise ValueError(
            f"expected classes, whole numbers; got {predictions.dtype}: of logits take argmax(-1)"
        )
    if labels.shape != predictions.shape[1:]:
        raise ValueError(
            f"labels must hold one class for each of {predictions.shape[1]} unseen points; got "
            f"shape {tuple(labels.shape)}"
        )
    right = (predictions == labels).double()
    wrong = 1 - right
    # Where a network is wrong, all that are right are others.
    others = right.sum(dim=0) / (len(predictions) - 1)
    return (wrong @ others) / wrong.sum(dim=1)

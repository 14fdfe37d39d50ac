"""Operations of PyTorch whose higher derivatives are missing or wrong, written out in others.

Normalization by statistics of its own inputs has second derivatives, but third ones come out wrong,
without a sign of it (under ``torch.func.vmap`` the second ones too: pytorch/functorch#534); weight
normalization has second ones that are wrong. Distances, bags of embeddings, margin losses and
``hardsigmoid`` have none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def _layer_norm(  # noqa: PLR0917 - PyTorch's order
    input: Tensor,  # noqa: A002 - PyTorch's name
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,  # noqa: ARG001, FBT001, FBT002
) -> Tensor:
    return _normalized(input, range(-len(normalized_shape), 0), weight, bias, eps)[0]


def _native_layer_norm(
    input: Tensor,  # noqa: A002
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _normalized(input, range(-len(normalized_shape), 0), weight, bias, eps)


def _batch_norm(  # noqa: PLR0917 - PyTorch's order
    input: Tensor,  # noqa: A002
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,  # noqa: FBT001, FBT002
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training:  # it is linear, and right
        return functional.batch_norm(
            input, running_mean, running_var, weight, bias, training, momentum, eps
        )
    if running_mean is not None:
        with torch.no_grad():  # to update them
            functional.batch_norm(
                input, running_mean, running_var, training=True, momentum=momentum
            )
    return _by_batch(input, weight, bias, eps)[0]


def _aten_batch_norm(  # noqa: PLR0917
    input: Tensor,  # noqa: A002
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,  # noqa: FBT001
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,  # noqa: ARG001, FBT001, FBT002
) -> Tensor:
    return _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _native_batch_norm(  # noqa: PLR0917
    input: Tensor,  # noqa: A002
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,  # noqa: FBT001
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if not training:
        return torch.native_batch_norm(
            input, weight, bias, running_mean, running_var, training, momentum, eps
        )
    output = _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    _, mean, scale = _by_batch(input, None, None, eps)
    return output, mean.flatten(), scale.flatten()


def _by_batch(
    input: Tensor,  # noqa: A002
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    others = [0, *range(2, input.ndim)]
    return _normalized(input, others, _by_channel(weight, input), _by_channel(bias, input), eps)


def _instance_norm(  # noqa: PLR0917 - PyTorch's order
    input: Tensor,  # noqa: A002
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,  # noqa: FBT001, FBT002
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:
        return functional.instance_norm(
            input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
        )
    if running_mean is not None:
        with torch.no_grad():
            functional.instance_norm(input, running_mean, running_var, momentum=momentum)
    others = range(2, input.ndim)
    weight, bias = _by_channel(weight, input), _by_channel(bias, input)
    return _normalized(input, others, weight, bias, eps)[0]


def _aten_instance_norm(  # noqa: PLR0917
    input: Tensor,  # noqa: A002
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,  # noqa: FBT001
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,  # noqa: ARG001, FBT001, FBT002
) -> Tensor:
    return _instance_norm(
        input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
    )


def _normalized(
    x: Tensor, dims: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the mean, and what the centered input was multiplied by."""
    # Statistics of 16-bit numbers need more digits than these have.
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = wide.mean(tuple(dims), keepdim=True)
    centered = wide - mean
    scale = torch.rsqrt(centered.square().mean(tuple(dims), keepdim=True) + eps)
    result = centered * scale
    if weight is not None:
        result = result * weight
    return (result if bias is None else result + bias).to(x.dtype), mean, scale


def _by_channel(values: Tensor | None, x: Tensor) -> Tensor | None:
    return None if values is None else values.view(-1, *[1] * (x.ndim - 2))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    others = [d for d in range(v.ndim) if d != dim % v.ndim or dim == -1]
    wide = v.to(torch.promote_types(v.dtype, torch.float32))
    length = wide.square().sum(others, keepdim=True).sqrt()
    return v * (g / length.to(g.dtype))


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:  # noqa: A002, ARG001, FBT001, FBT002
    return (input + 3).clamp(0, 6) / 6


def _cdist(
    x1: Tensor,
    x2: Tensor,
    p: float = 2.0,
    compute_mode: Any = None,  # noqa: ARG001 - a way to compute the same
) -> Tensor:
    return _length(x1.unsqueeze(-2) - x2.unsqueeze(-3), p)


def _pdist(input: Tensor, p: float = 2.0) -> Tensor:  # noqa: A002
    first, second = torch.triu_indices(len(input), len(input), 1, device=input.device)
    return _length(input[first] - input[second], p)


def _length(way: Tensor, p: float) -> Tensor:
    """The p-norm of the last dimension, whose derivatives at zero are zero, as PyTorch has them."""
    size = way.abs()
    if p == 0:
        return (way != 0).to(way.dtype).sum(-1)
    if p == float("inf"):
        return size.amax(-1) if way.shape[-1] else way.sum(-1)
    if p == 1:
        return size.sum(-1)
    # Where a part is zero, powers below the derivative's order have none.
    powers = torch.where(size > 0, size, 1).pow(p) * (size > 0) if p != 2 else way.square()
    total = powers.sum(-1)
    return torch.where(total > 0, total, 1).pow(1 / p) * (total > 0)


def _embedding(  # noqa: PLR0917 - PyTorch's order
    input: Tensor,  # noqa: A002
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,  # noqa: ARG001, FBT001, FBT002 - no gradient of the loss
    sparse: bool = False,  # noqa: ARG001, FBT001, FBT002 - a gradient with zeros is the same
) -> Tensor:
    return functional.embedding(input, _padded(weight, padding_idx), None, max_norm, norm_type)


def _padded(weight: Tensor, padding_idx: int | None) -> Tensor:
    """The weights, of which the row for padding is a constant."""
    if padding_idx is None:
        return weight
    constant = torch.zeros_like(weight, dtype=torch.bool)
    constant[padding_idx] = True
    return torch.where(constant, weight.detach(), weight)


def _embedding_bag(  # noqa: PLR0917 - PyTorch's order
    input: Tensor,  # noqa: A002
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,  # noqa: ARG001, FBT001, FBT002
    mode: str = "mean",
    sparse: bool = False,  # noqa: ARG001, FBT001, FBT002
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,  # noqa: FBT001, FBT002
    padding_idx: int | None = None,
) -> Tensor:
    rows = functional.embedding(
        input.reshape(-1), _padded(weight, padding_idx), None, max_norm, norm_type
    )
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.reshape(-1, 1)
    if offsets is None:
        sizes = input.new_full((len(input),), input.shape[1] if input.ndim > 1 else 1)
    else:
        ends = offsets[1:] if include_last_offset else offsets.new_tensor([*offsets[1:], len(rows)])
        sizes = ends - offsets[: len(ends)]
    bag = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)
    if padding_idx is not None:
        kept = input.reshape(-1) != padding_idx % len(weight)
        rows, bag = rows[kept], bag[kept]
    if mode == "max":
        parts = (rows[bag == index] for index in range(len(sizes)))
        return torch.stack([part.amax(0) if len(part) else part.sum(0) for part in parts])
    total = rows.new_zeros(len(sizes), weight.shape[1]).index_add(0, bag, rows)
    if mode == "sum":
        return total
    count = torch.bincount(bag, minlength=len(sizes)).clamp(min=1)
    return total / count.unsqueeze(1).to(total.dtype)


def _multi_margin_loss(  # noqa: PLR0917 - PyTorch's order
    input: Tensor,  # noqa: A002
    target: Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    size_average: bool | None = None,  # noqa: FBT001
    reduce: bool | None = None,  # noqa: FBT001
    reduction: str = "mean",
) -> Tensor:
    rows, labels = torch.atleast_2d(input), torch.atleast_1d(target)
    right = rows.gather(1, labels.unsqueeze(1))
    short = (margin - right + rows).clamp(min=0) ** p
    if weight is not None:
        short = short * weight[labels].unsqueeze(1)
    others = torch.ones_like(short).scatter(1, labels.unsqueeze(1), 0)
    losses = (short * others).sum(1) / rows.shape[1]
    return _reduced(losses.view(target.shape), reduction, size_average, reduce)


def _multilabel_margin_loss(
    input: Tensor,  # noqa: A002
    target: Tensor,
    size_average: bool | None = None,  # noqa: FBT001
    reduce: bool | None = None,  # noqa: FBT001
    reduction: str = "mean",
) -> Tensor:
    rows, labels = torch.atleast_2d(input), torch.atleast_2d(target)
    named = (labels >= 0).cumprod(1).bool()  # those before the first -1
    right = torch.zeros_like(rows, dtype=torch.int64)
    right = right.scatter_add(1, labels.clamp(min=0), named.long()) > 0
    reached = rows.gather(1, labels.clamp(min=0))
    short = (1 - reached.unsqueeze(2) + rows.unsqueeze(1)).clamp(min=0)
    counts = named.unsqueeze(2) & ~right.unsqueeze(1)
    losses = (short * counts).sum((1, 2)) / rows.shape[1]
    return _reduced(losses.view(input.shape[:-1]), reduction, size_average, reduce)


def _reduced(losses: Tensor, reduction: str, *formerly: bool | None) -> Tensor:
    if formerly != (None, None):
        size_average, reduce = formerly
        reduction = "none" if reduce is False else "sum" if size_average is False else "mean"
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.mean()


def _of_aten(*names: str) -> Iterable[Any]:
    """Functions as exported programs call them, in all forms; older PyTorch lacks some."""
    for name in names:
        packet = getattr(torch.ops.aten, name, None)
        for overload in packet.overloads() if packet is not None else ():
            if not overload.endswith("out"):
                yield getattr(packet, overload)


PLAIN: dict[Any, Callable[..., Any]] = {
    functional.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    torch.native_layer_norm: _native_layer_norm,
    functional.batch_norm: _batch_norm,
    torch.batch_norm: _aten_batch_norm,
    torch.native_batch_norm: _native_batch_norm,
    functional.instance_norm: _instance_norm,
    torch.instance_norm: _aten_instance_norm,
    torch._weight_norm: _weight_norm,  # noqa: SLF001 - all weight normalization comes here
    functional.hardsigmoid: _hardsigmoid,
    torch.cdist: _cdist,
    functional.pdist: _pdist,
    functional.embedding: _embedding,
    functional.embedding_bag: _embedding_bag,
    functional.multi_margin_loss: _multi_margin_loss,
    functional.multilabel_margin_loss: _multilabel_margin_loss,
    **dict.fromkeys(_of_aten("layer_norm"), _layer_norm),
    **dict.fromkeys(_of_aten("native_layer_norm"), _native_layer_norm),
    **dict.fromkeys(_of_aten("batch_norm"), _aten_batch_norm),
    **dict.fromkeys(_of_aten("native_batch_norm"), _native_batch_norm),
    **dict.fromkeys(_of_aten("instance_norm"), _aten_instance_norm),
    **dict.fromkeys(_of_aten("_weight_norm"), _weight_norm),
    **dict.fromkeys(_of_aten("hardsigmoid"), _hardsigmoid),
    **dict.fromkeys(_of_aten("cdist"), _cdist),
    **dict.fromkeys(_of_aten("pdist"), _pdist),
}
"""What each of PyTorch's functions is replaced by: the same value, and derivatives of any order."""

"""Networks in the shapes that people train: of ResNet-18 for small images, and of GPT-2."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """Two convolutions and what goes around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.inside = nn.Sequential(
            *(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)),
            *(nn.ReLU(), nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)),
            nn.BatchNorm2d(outputs),
        )
        same = stride == 1 and inputs == outputs
        around = nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
        self.around = nn.Identity() if same else nn.Sequential(*around)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.inside(x) + self.around(x))


def resnet18(width: int, classes: int) -> nn.Module:
    widths = [width, width, *(2 * [2 * width]), *(2 * [4 * width]), *(2 * [8 * width])]
    return residual_network([width, *widths], classes)


def resnet8(width: int, classes: int) -> nn.Module:
    return residual_network([width, width, 2 * width, 4 * width], classes)


def residual_network(widths: list[int], classes: int) -> nn.Module:
    """Blocks between these widths, at half the height and width where there are more channels."""
    first = widths[0]
    layers = [nn.Conv2d(3, first, 3, 1, 1, bias=False), nn.BatchNorm2d(first), nn.ReLU()]
    layers += [
        Block(inputs, outputs, 1 if inputs == outputs else 2)
        for inputs, outputs in pairwise(widths)
    ]
    head = nn.Linear(widths[-1], classes)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


class Attention(nn.Module):
    """A layer of a decoder: attention to what was before, and a network of two layers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.asked, self.told = nn.Linear(width, 3 * width), nn.Linear(width, width)
        widen, narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.network = nn.Sequential(widen, nn.GELU(approximate="tanh"), narrow)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.asked(self.norms[0](x)).unflatten(-1, (3, self.heads, -1))
        found = functional.scaled_dot_product_attention(
            *parts.permute(2, 0, 3, 1, 4), is_causal=True
        )
        x = x + self.told(found.transpose(1, 2).flatten(2))
        return x + self.network(self.norms[1](x))


class GPT(nn.Module):
    """Logits of the next token, for each place: rows of all places."""

    def __init__(self, tokens: int, width: int, heads: int, layers: int, places: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(tokens, width), nn.Embedding(places, width)
        self.layers = nn.Sequential(*(Attention(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, tokens, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        inside = self.layers(self.tokens(x) + self.places(places))
        return self.head(self.norm(inside)).flatten(0, 1)

"""The loss surface that the README shows: drawn to docs/assets/surface.png, its words printed.

A small network on MNIST's digits, from the folder that ``LOWLAND_DATA`` names. The page with the
one to turn goes to the file that is named on the command line, if one is.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from torch import nn

import lowland
from lowland.display import styled
from lowland.studies.data.images import data_folder, mnist_test

PICTURE = Path(__file__).parents[1] / "docs" / "assets" / "surface.png"
SAMPLES, EPOCHS, POINTS = 1000, 8, 31


def network() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 28, 28)), nn.Conv2d(1, 8, 5, stride=2), nn.BatchNorm2d(8)),
        *(nn.ReLU(), nn.Conv2d(8, 16, 5, stride=2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(256, 10)),
    )


def draw(random: lowland.LossSurface, path: lowland.LossSurface) -> None:
    with styled():
        figure = plt.figure(figsize=(12, 5.4))
        random.plot(ax=figure.add_axes((0.07, 0.1, 0.41, 0.8)))
        path.plot("surface", ax=figure.add_axes((0.51, 0.08, 0.44, 0.86), projection="3d"))
        figure.savefig(PICTURE, dpi=100)


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    digits = mnist_test(data_folder())
    x, y = digits.x[:SAMPLES], digits.y[:SAMPLES]
    model, criterion = network(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    states = []
    for _ in range(EPOCHS):
        for number, batch in enumerate(torch.randperm(SAMPLES).split(64)):
            if number % 4 == 0:
                states.append({name: part.clone() for name, part in model.state_dict().items()})
            optimizer.zero_grad()
            criterion(model(x[batch]), y[batch]).backward()
            optimizer.step()
    model.eval()
    random = lowland.surface(model, criterion, (x, y), points=POINTS, extent=1.5)
    path = lowland.surface(model, criterion, (x, y), path=states, points=POINTS)
    for surface in (random, path):
        print(surface.caption)
    draw(random, path)
    if len(sys.argv) > 1:
        path.to_html(sys.argv[1], title="A small network on MNIST")


if __name__ == "__main__":
    main()

"""The audit that the README shows: drawn to docs/assets/audit.png, its table printed."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import lowland
from lowland.studies.data.carried import digits

PICTURE = Path(__file__).parents[1] / "docs" / "assets" / "audit.png"
TRAIN, UNSEEN = 250, 100


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    data = digits()
    chosen = torch.randperm(len(data.y))[: TRAIN + UNSEEN]
    x, y = (data.x[chosen] / 16).float(), data.y[chosen]
    model = nn.Sequential(
        *(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
    )
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(300):
        for batch in torch.randperm(TRAIN).split(64):
            optimizer.zero_grad()
            criterion(model(x[batch]), y[batch]).backward()
            optimizer.step()
    audit = lowland.audit(model, criterion, x[:TRAIN], y[:TRAIN], x[TRAIN:])
    print(audit)
    audit.plot().savefig(PICTURE, dpi=110)


if __name__ == "__main__":
    main()

"""A training with a penalty that is interrupted, and one that goes on from where it was."""

import copy

import torch
from any_models import build


def resumed(penalty, steps):
    """Models and penalties after twice so many steps, without a break and with one.

    The second training starts from another seed, and loads the states of the first one. ``penalty``
    makes a penalty from the generator that it draws by.
    """

    def start(seed):
        model, *data = build("cnn", seed=seed)
        drawn = torch.Generator().manual_seed(seed)
        return [model, penalty(drawn), torch.optim.Adam(model.parameters())], data

    def train(parts, x, y):
        model, penalty, optimizer = parts
        for _ in range(steps):
            optimizer.zero_grad()
            penalty.loss(model, x, y).backward()
            optimizer.step()

    first, data = start(0)
    train(first, *data)
    states = [copy.deepcopy(part.state_dict()) for part in first]
    drawn = first[1].estimation.generator.get_state()
    train(first, *data)
    second, _ = start(1)
    for part, state in zip(second, states, strict=True):
        part.load_state_dict(state)
    second[1].estimation.generator.set_state(drawn)
    train(second, *data)
    return first, second

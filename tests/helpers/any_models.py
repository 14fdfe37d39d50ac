"""Small models beyond the closed form, each with data, for what holds of any module."""

import torch
from torch import nn

CROSS_ENTROPY = nn.CrossEntropyLoss()


class Attention(nn.Module):
    """A transformer encoder layer over two tokens, with its fused attention."""

    def __init__(self, activation="gelu"):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(
            2, 1, 3, dropout=0.0, activation=activation, batch_first=True
        )
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.encoder(x.unflatten(1, (2, 2))).flatten(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(2, 2, batch_first=True)
        self.head = nn.Linear(2, 2)

    def forward(self, x):
        return self.head(self.lstm(x.unflatten(1, (2, 2)))[0][:, -1])


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2))


def cnn():
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)),
        nn.Conv2d(1, 3, 2, padding=1),
        nn.BatchNorm2d(3),
        nn.GELU(),
        nn.AvgPool2d(2, 1),
        nn.Flatten(),
        nn.Linear(12, 2),
    )


def cnn_in_evaluation():
    model = cnn()
    for _ in range(3):
        model(torch.randn(9, 4) + 1)
    return model.eval()


def tied():
    """Twice the same layer, and one weight under two names."""
    layer, other = nn.Linear(4, 4), nn.Linear(4, 4)
    other.weight = layer.weight
    return nn.Sequential(layer, nn.Tanh(), layer, nn.GELU(), other, nn.Tanh(), nn.Linear(4, 2))


def frozen():
    model = mlp()
    model[0].weight.requires_grad_(requires_grad=False)
    model[4].bias.requires_grad_(requires_grad=False)
    return model


MODELS = {
    make.__name__: make
    for make in (mlp, cnn, cnn_in_evaluation, Attention, Recurrent, tied, frozen)
}


class Routed(nn.Module):
    """Of which one part is used by nobody."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x):
        return self.one(x).tanh()


def build(name, *, samples=8, dtype=torch.float64, seed=0):
    """A model with inputs and classes."""
    torch.manual_seed(seed)
    model = MODELS[name]().to(dtype)
    return model, torch.randn(samples, 4).to(dtype), torch.arange(samples) % 2


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def flat(parts):
    return torch.cat([part.reshape(-1) for part in parts])


def error(actual, expected):
    """Of a tensor or a list of them, relative to the length of the expected one."""
    if not isinstance(actual, torch.Tensor):
        actual, expected = flat(actual), flat(expected)
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


def differences_of_loss(model, loss_of):
    """:func:`differences` of a loss written by hand."""
    parameters = list(model.parameters())
    return differences(model, lambda: torch.autograd.grad(loss_of(), parameters))


def differences(model, gradient):
    """The Hessian by central differences of first gradients, lists with a part a parameter."""
    parameters = list(model.parameters())
    columns = []
    for parameter in parameters:
        for entry in parameter.data.view(-1):
            start, step = entry.clone(), 1e-5
            sides = []
            for sign in (1, -1):
                entry.copy_(start + sign * step)
                sides.append(flat(gradient()))
            entry.copy_(start)
            columns.append((sides[0] - sides[1]) / (2 * step))
    return torch.stack(columns)

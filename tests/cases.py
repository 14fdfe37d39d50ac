"""Problems that hypothesis draws: shapes from 1, every activation, loss, reduction and type."""

import itertools
from dataclasses import dataclass

import oracle
import torch
from hypothesis import strategies as st

ORDERS = ("samples", "parameters")
TOLERANCES = {  # of moments, of gradients
    torch.float64: (1e-10, 1e-9),
    torch.float32: (1e-4, 1e-4),
}


@dataclass(frozen=True)
class Case:
    """One call of the library, and the plain networks it is about."""

    network: oracle.Network
    weights: list[torch.Tensor]
    x: torch.Tensor
    y: torch.Tensor
    ensemble: tuple[int, ...]

    @property
    def arguments(self):
        return (self.weights, self.x, self.y)

    @property
    def settings(self):
        network = self.network
        return {
            "activation": network.activation,
            "loss": network.loss,
            "reduction": network.reduction,
        }

    @property
    def tolerances(self):
        return TOLERANCES[self.x.dtype]

    def singles(self):
        """``(index, flat, x, y)`` of each network, in float64 from the very same values."""
        weight, output = (part.detach().double() for part in self.weights)
        weight = weight.expand(*self.ensemble, *weight.shape[-2:])
        output = output.expand(*self.ensemble, *output.shape[-2:])
        x = self.x.double().expand(*self.ensemble, *self.x.shape[-2:])
        y = self.y.double().expand(*self.ensemble, self.y.shape[-1])
        for index in itertools.product(*map(range, self.ensemble)):
            yield index, oracle.flatten([weight[index], output[index]]), x[index], y[index]


def make(
    network, samples, *, seed=0, ensemble=(), dtype=torch.float64, gain=1.0, own_data=False, y=None
):
    """A random case; ``gain`` multiplies weights of the usual size."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    leading = ensemble if own_data else ()
    x = normal(*leading, samples, network.inputs)
    weight = normal(*ensemble, network.inputs + 1, network.hidden)
    output = normal(*ensemble, network.hidden + 1, 1)
    if y is None:
        y = normal(*leading, samples)
        if network.loss == "bce":
            y = (y > 0).double()
    weights = [
        (gain * weight / (network.inputs + 1) ** 0.5).to(dtype),
        (gain * output / (network.hidden + 1) ** 0.5).to(dtype),
    ]
    return Case(network, weights, x.to(dtype), y.to(dtype), ensemble)


@st.composite
def cases(draw, dtypes=(torch.float64,), *, ensembles=True, activations=tuple(oracle.ACTIVATIONS)):
    network = oracle.Network(
        inputs=draw(st.integers(1, 5), label="inputs"),
        hidden=draw(st.integers(1, 5), label="hidden"),
        activation=draw(st.sampled_from(activations)),
        loss=draw(st.sampled_from(sorted(oracle.LOSSES))),
        reduction=draw(st.sampled_from(["mean", "sum"])),
    )
    ensemble = draw(st.sampled_from([(), (1,), (3,), (2, 2)])) if ensembles else ()
    return make(
        network,
        samples=draw(st.integers(1, 12), label="samples"),
        seed=draw(st.integers(0, 2**31)),
        ensemble=ensemble,
        dtype=draw(st.sampled_from(dtypes)),
        gain=draw(st.sampled_from([0.3, 1.0, 4.0])),
        own_data=draw(st.booleans()),
    )


def smallest_budget(call):
    """The smallest power of two of bytes that ``call(memory_budget=...)`` accepts: many pieces."""
    for exponent in range(4, 40):
        try:
            call(memory_budget=2**exponent)
        except ValueError as error:
            if "memory budget" not in str(error):
                raise
        else:
            return 2**exponent
    raise AssertionError("no budget was accepted")


def relative_error(actual, expected):
    """The largest deviation, relative to the largest entry.

    Entries of a gradient may cancel to zero exactly, so each has no natural scale of its own.
    """
    scale = expected.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    return float((actual.double() - expected).abs().max() / scale)

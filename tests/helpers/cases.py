"""Problems that hypothesis draws: any depth, widths from 1, every activation, loss and type."""

import itertools
from dataclasses import dataclass, replace

import oracle
import torch
from hypothesis import strategies as st

from lowland.exact.c_backend import covers
from lowland.exact.setup import _flatten
from lowland.exact.setup import prepare as prepare_tensors
from lowland.losses import Coupled, Loss, Separable

ORDERS = ("samples", "parameters")
TOLERANCES = {  # of moments, of gradients
    torch.float64: (1e-10, 1e-9),
    torch.float32: (1e-4, 1e-4),
}


def _poisson(s, y):
    rate = s.exp()
    return Separable(rate - y, rate, rate)


def _distance(s, y):
    apart = s - y
    h = (1 + apart.square().sum(-1, keepdim=True)).sqrt()
    eye = torch.eye(s.shape[-1], dtype=s.dtype, device=s.device)
    outer = apart.unsqueeze(-1) * apart.unsqueeze(-2)

    def third(A):
        along = (A @ apart.unsqueeze(-1)).squeeze(-1)
        both = (along * apart).sum(-1, keepdim=True)
        trace = A.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
        return (3 * both / h**2 * apart - trace * apart - 2 * along) / h**3

    return Coupled(apart / h, (eye - outer / h.unsqueeze(-1) ** 2) / h.unsqueeze(-1), third)


OF_ONES_OWN = {
    "poisson": Loss("poisson", oracle.OF_ONES_OWN["poisson"], _poisson),
    "distance": Loss("distance", oracle.OF_ONES_OWN["distance"], _distance),
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
            "loss": OF_ONES_OWN.get(network.loss, network.loss),
            "reduction": network.reduction,
        }

    @property
    def tolerances(self):
        return TOLERANCES[self.x.dtype]

    @property
    def samples(self):
        return self.x.shape[-2]

    def with_gradients(self):
        """The same with weights that ask for them."""
        return replace(
            self, weights=[part.detach().clone().requires_grad_() for part in self.weights]
        )

    def in_double(self):
        return replace(self, weights=[part.double() for part in self.weights], x=self.x.double())

    def singles(self):
        """``(index, flat, x, y)`` of each network, in float64 from the very same values."""
        weights = [part.detach().double() for part in self.weights]
        weights = [part.expand(*self.ensemble, *part.shape[-2:]) for part in weights]
        x = self.x.double().expand(*self.ensemble, *self.x.shape[-2:])
        y = self.y if self.y.dtype == torch.int64 else self.y.double()
        own = 2 if self.network.takes_columns or self.is_soft else 1
        y = y.expand(*self.ensemble, *y.shape[-own:])
        for index in itertools.product(*map(range, self.ensemble)):
            yield index, oracle.flatten([part[index] for part in weights]), x[index], y[index]

    @property
    def is_soft(self):
        """Whether the targets are distributions over classes."""
        return self.network.loss == "ce" and self.y.is_floating_point()


def make(
    network,
    samples,
    *,
    seed=0,
    ensemble=(),
    dtype=torch.float64,
    gain=1.0,
    own_data=False,
    soft=False,
    y=None,
):
    """A random case; ``gain`` multiplies weights of the usual size."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    leading = ensemble if own_data else ()
    x = normal(*leading, samples, network.inputs)
    weights = [
        (gain * normal(*ensemble, rows, columns) / rows**0.5).to(dtype)
        for rows, columns in network.shapes
    ]
    if y is None:
        columns = () if network.outputs == 1 else (network.outputs,)
        y = normal(*leading, samples, *columns)
        if network.loss == "bce":
            # Some labels stay hard among the soft ones.
            y = torch.where(y.abs() > 1, y > 0, y.sigmoid()) if soft else (y > 0).double()
        elif network.loss == "poisson":
            y = (4 * y.abs()).floor()
        elif network.loss == "ce":
            y = y.softmax(-1) if soft else y.argmax(-1)
    return Case(
        network, weights, x.to(dtype), y if y.dtype == torch.int64 else y.to(dtype), ensemble
    )


def shallow(losses=("bce", "mse"), activations=tuple(oracle.ACTIVATIONS)):
    """Networks of one hidden layer and one output, which the compiled code covers."""
    return st.builds(
        oracle.Network,
        inputs=st.integers(1, 5),
        hidden=st.integers(1, 5),
        activation=st.sampled_from(activations),
        loss=st.sampled_from(losses),
        reduction=st.sampled_from(["mean", "sum"]),
    )


@st.composite
def general(draw, activations=tuple(oracle.ACTIVATIONS), losses=tuple(oracle.LOSSES)):
    """Networks of 0 to 4 hidden layers, of any number of outputs."""
    depth = draw(st.integers(0, 4), label="depth")
    hidden = tuple(draw(st.integers(1, 4), label="width") for _ in range(depth))
    loss = draw(st.sampled_from(losses))
    return oracle.Network(
        inputs=draw(st.integers(1, 4), label="inputs"),
        hidden=hidden,
        activation=tuple(draw(st.sampled_from(activations)) for _ in hidden),
        loss=loss,
        reduction=draw(st.sampled_from(["mean", "sum"])),
        outputs=draw(st.integers(2 if loss == "ce" else 1, 4), label="outputs"),
    )


def wide():
    """Networks whose last hidden layer is so wide that pairs of samples do not form its ``B``."""
    return st.builds(
        oracle.Network,
        inputs=st.integers(1, 2),
        hidden=st.sampled_from([(17,), (2, 18)]),
        activation=st.sampled_from(["sigmoid", "gelu"]),
        loss=st.sampled_from(["ce", "mse"]),
        outputs=st.just(2),
    )


@st.composite
def cases(draw, dtypes=(torch.float64,), *, ensembles=True, networks=None, most_samples=12):
    """Problems; every fourth or so of a kind that the compiled code covers."""
    softens = ("ce", "bce") if networks is None else ("ce",)  # compiled code takes hard labels
    if networks is None:
        networks = st.one_of(shallow(), general(), general(), wide())
    network = draw(networks)
    ensemble = draw(st.sampled_from([(), (1,), (3,), (2, 2)])) if ensembles else ()
    return make(
        network,
        samples=draw(st.integers(1, most_samples), label="samples"),
        seed=draw(st.integers(0, 2**31)),
        ensemble=ensemble,
        dtype=draw(st.sampled_from(dtypes)),
        gain=draw(st.sampled_from([0.3, 1.0, 4.0 if len(network.widths) < 4 else 2.0])),
        own_data=draw(st.booleans()),
        soft=draw(st.booleans()) if network.loss in softens else False,
    )


def prepare(case, *, activation=None, rows=None, scale=None):
    """The library's own preparation of a case, and what only a model's reading gives.

    ``activation`` takes the place of the case's; ``rows`` are those of each layer that are trained,
    ``scale`` the weight of each sample, or of each of its outputs.
    """
    names = case.settings
    activation = activation or names["activation"]
    setup = prepare_tensors(*case.arguments, activation, names["loss"], names["reduction"])
    arch, size, data = setup.arch, setup.size, setup.data
    if rows is not None:
        arch = replace(arch, rows=tuple(rows))
        size = replace(size, rows=tuple(each.stop - each.start for each in rows))
    if scale is not None:
        # As y has it: a dimension of samples and one of outputs.
        own = scale if scale.ndim == case.x.ndim else scale.unsqueeze(-1)
        data = replace(data, scale=_flatten(own.to(data.x.dtype), setup.ensemble))
    mean = setup.is_mean and scale is None
    covered = covers(arch, size, data)
    return replace(setup, arch=arch, size=size, data=data, is_mean=mean, covered=covered)


def smallest_budget(case, order, **options):
    """The smallest budget in bytes that PyTorch's path accepts: many pieces."""
    setup = prepare(case, **options)
    low, high = 1, 1 << 32
    while low < high:
        middle = (low + high) // 2
        try:
            setup.problem(order, middle, compiled=False)
        except ValueError:
            low = middle + 1
        else:
            high = middle
    return low


def relative_error(actual, expected):
    """The largest deviation, relative to the largest entry.

    Entries of a gradient may cancel to zero exactly, so each has no natural scale of its own.
    """
    scale = expected.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    return float((actual.double() - expected).abs().max() / scale)

"""What every public call that looks at a model's curvature refuses, in the same words."""

import pytest
import torch
from torch import nn

import lowland


def network(*, sparse=False):
    torch.manual_seed(0)
    layers = nn.Embedding(9, 3, sparse=sparse), nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)
    return nn.Sequential(*layers).double()


class Functional(nn.Module):
    """An embedding that no layer tells of."""

    def __init__(self, *, sparse):
        super().__init__()
        self.table, self.last = nn.Parameter(torch.randn(9, 3)), nn.Linear(3, 1)
        self.sparse = sparse

    def forward(self, x):
        return self.last(nn.functional.embedding(x, self.table, sparse=self.sparse))


def moments(method, **settings):
    def call(model, x, y):
        return lowland.hessian_moments(model, nn.MSELoss(), x, y, method, **settings).trace

    return call


def loader(model, x, y):
    return lowland.hessian_moments(model, nn.MSELoss(), [(x, y)]).trace


def penalty(kind, **settings):
    def call(model, x, y):
        return kind(nn.MSELoss(), 0.1, **settings)(model, x, y)

    return call


CALLS = {
    "auto": moments("auto"),
    "probes": moments("probes"),
    "differences": moments("probes", products="differences"),
    "dense": moments("dense"),
    "loader": loader,
    "HSR": penalty(lowland.HSR),
    "HessianTrace": penalty(lowland.HessianTrace),
    "FlatnessAware": penalty(lowland.FlatnessAware, method="probes", products="differences"),
    "spectrum": lambda m, x, y: lowland.spectrum(m, nn.MSELoss(), (x, y), k=2),
    "layer_spectra": lambda m, x, y: lowland.layer_spectra(m, nn.MSELoss(), (x, y)),
    "eigenvalues_over": lambda m, x, y: (
        lowland.eigenvalues_over(m, nn.MSELoss(), (x, y), [m.state_dict()]).eigenvalues
    ),
    "surface": lambda m, x, y: lowland.surface(m, nn.MSELoss(), (x, y), points=3).losses,
}


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_refused_in_one_sentence(call, dtype):
    dense = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    convolutional = nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 2, 2), nn.Flatten())
    said = set()
    for model in (dense, convolutional):
        x = torch.randn(6, 4, dtype=dtype)
        y = torch.zeros_like(model.to(dtype)(x))
        with pytest.raises(TypeError) as caught:
            call(model, x, y)
        said.add(str(caught.value).replace("1.weight", "0.weight"))
        call(model.float(), x.float(), y.float())  # as it says
    kind = str(dtype).removeprefix("torch.")
    (sentence,) = said
    assert sentence == (
        f"the model must be float32 or float64; '0.weight' is {kind}. Convert it, with "
        "model.float() or model.double(), and x likewise; torch.autocast may then run it in "
        "half precision"
    )


def test_frozen_parameters_may_be_of_half_precision():
    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.Linear(4, 3).bfloat16().requires_grad_(requires_grad=False)
            self.head = nn.Linear(3, 1)

        def forward(self, x):
            return self.head(self.base(x.bfloat16()).float())

    model, x = Adapted(), torch.randn(6, 4)
    assert lowland.hessian_moments(model, nn.MSELoss(), x, x[:, :1]).dim == 4


def value_of(found):
    if isinstance(found, dict):
        return torch.tensor([value_of(each) for each in found.values()])
    return torch.as_tensor(found.trace if isinstance(found, lowland.Spectrum) else found).detach()


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("kind", [network, Functional])
def test_sparse_gradients_count_as_the_dense_ones_that_they_stand_for(call, kind):
    x, y = torch.tensor([1, 4, 4, 7]), torch.linspace(-1, 1, 4).reshape(4, 1).double()
    found = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = kind(sparse=sparse).double()
        found.append(value_of(call(model, x, y)))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("layout", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_sparse_inputs_are_those_that_they_stand_for(layout):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    x, y = torch.randn(6, 4).relu().double(), torch.randn(6, 1).double()
    sparse, expected = layout(x), lowland.hessian_moments(model, nn.MSELoss(), x, y, "dense")
    found = lowland.hessian_moments(model, nn.MSELoss(), sparse, y)
    torch.testing.assert_close(found.trace_sq, expected.trace_sq, rtol=1e-10, atol=0)
    for kind in (lowland.HSR, lowland.HessianTrace, lowland.FlatnessAware):
        assert kind(nn.MSELoss(), 0.1)(model, sparse, y).isfinite()
    spectrum = lowland.spectrum(model, nn.MSELoss(), (sparse, y), k=1)
    assert spectrum.trace == pytest.approx(expected.trace.item(), rel=1e-10)
    with pytest.raises(lowland.UnsupportedModelError, match="takes x as a dense tensor"):
        lowland.hessian_moments(model, nn.MSELoss(), sparse, y, "exact")
    weights = [torch.ones(5, 3).double(), torch.ones(4, 1).double()]
    with pytest.raises(lowland.UnsupportedModelError, match=r"x is sparse, .*use x\.to_dense\(\)"):
        lowland.exact.moments(weights, sparse, y[:, 0], activation="tanh", loss="mse")

"""The largest eigenvalues over training, against those of brute force at each checkpoint."""

import math

import pytest
import torch
from any_models import MODELS, build
from torch import nn

import lowland
from lowland.dense import dense_hessian
from lowland.spectra.lanczos import largest

CE = nn.CrossEntropyLoss()


def trained(name="mlp", count=4, samples=16, rate=0.3):
    """A model at the end of some steps, and copies of its state on the way."""
    model, x, y = build(name, samples=samples)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    states = []
    for _ in range(count):
        states.append({n: part.clone() for n, part in model.state_dict().items()})
        optimizer.zero_grad()
        CE(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model, x, y, states


# Values


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"cnn"}))
def test_each_checkpoint_has_the_eigenvalues_of_its_own_hessian(name):
    model, x, y, states = trained(name)
    history = lowland.eigenvalues_over(model, CE, (x, y), states, k=3, tolerance=1e-8)
    for index, state in enumerate(states):
        other, _, _ = build(name)
        other.load_state_dict(state)
        matrix = dense_hessian(other, CE, x, y).detach()
        expected = torch.linalg.eigvalsh((matrix + matrix.T) / 2).flip(0)
        scale = float(expected.abs().max())
        torch.testing.assert_close(
            history.eigenvalues[index], expected[:3], rtol=0, atol=1e-7 * scale
        )
        with torch.no_grad():
            assert float(history.losses[index]) == pytest.approx(float(CE(other(x), y)))
    assert (history.residuals <= 1e-8 * history.eigenvalues[:, :1].abs().max()).all()


def test_the_statistics_of_a_checkpoint_are_its_own():
    model, x, y = build("cnn_in_evaluation")
    other, _, _ = build("cnn_in_evaluation", seed=3)
    history = lowland.eigenvalues_over(model, CE, (x, y), [other, model], k=1, tolerance=1e-9)
    for index, each in enumerate((other, model)):
        expected = lowland.spectrum(each, CE, (x, y), k=1).eigenvalues
        torch.testing.assert_close(history.eigenvalues[index], expected)


def test_batches_give_what_their_data_give_at_once():
    model, x, y, states = trained()
    whole = lowland.eigenvalues_over(model, CE, (x, y), states, tolerance=1e-9)
    parts = lowland.eigenvalues_over(
        model, CE, [(x[:5], y[:5]), (x[5:], y[5:])], states, tolerance=1e-9
    )
    torch.testing.assert_close(whole.eigenvalues, parts.eigenvalues)
    torch.testing.assert_close(whole.losses, parts.losses)


def test_a_model_of_few_parameters_has_all_of_its_eigenvalues():
    torch.manual_seed(0)
    model, x, y = nn.Linear(2, 1).double(), torch.randn(9, 2).double(), torch.randn(9, 1).double()
    history = lowland.eigenvalues_over(model, nn.MSELoss(), (x, y), [model], k=3, tolerance=1e-9)
    expected = lowland.spectrum(model, nn.MSELoss(), (x, y), k=3).eigenvalues
    torch.testing.assert_close(history.eigenvalues[0], expected)


def test_single_precision_keeps_the_tolerance():
    model, x, y, states = trained()
    model.float()
    history = lowland.eigenvalues_over(model, CE, (x.float(), y), states, k=2, tolerance=1e-4)
    double = lowland.eigenvalues_over(model.double(), CE, (x, y), states, k=2, tolerance=1e-9)
    torch.testing.assert_close(history.eigenvalues, double.eigenvalues, rtol=1e-4, atol=1e-5)


def test_a_tolerance_that_rounding_does_not_allow_is_pointed_to():
    model, x, y, states = trained()
    model.float()
    with pytest.warns(RuntimeWarning, match=r"beyond the tolerance .* use model.double\(\)"):
        lowland.eigenvalues_over(model, CE, (x.float(), y), states[:1], tolerance=1e-12)


# The iteration


class Matrix:
    """A symmetric matrix that counts its products."""

    def __init__(self, values, seed=0):
        torch.manual_seed(seed)
        self.values = torch.as_tensor(values, dtype=torch.float64)
        dim = len(self.values)
        self.vectors = torch.linalg.qr(torch.randn(dim, dim).double())[0]
        self.matrix = (self.vectors * self.values) @ self.vectors.T
        self.shape, self.products = (dim, dim), 0
        self.device, self.dtype = self.matrix.device, self.matrix.dtype

    def __matmul__(self, vector):
        self.products += 1
        return self.matrix @ vector


def top(matrix, k, start=None, tolerance=1e-8, limit=2000):
    generator = torch.Generator().manual_seed(0)
    if start is None:
        start = torch.randn(matrix.shape[0], generator=generator).double()
    return largest(matrix, k, start, tolerance=tolerance, limit=limit, generator=generator)


@pytest.mark.parametrize(
    "values",
    [
        torch.linspace(-1, 1, 200),
        torch.logspace(-6, 0, 300),
        -torch.logspace(-1, 1, 150),
        torch.cat([torch.ones(3), torch.zeros(97)]),
        torch.tensor([2.0]),
        torch.zeros(5),
    ],
    ids=["even", "decades", "negative", "copies", "one", "zero"],
)
def test_the_largest_eigenvalues_are_found_with_their_residuals(values):
    matrix = Matrix(values)
    k = min(3, len(values))
    found = top(matrix, k)
    expected = matrix.values.sort(descending=True).values[:k]
    torch.testing.assert_close(
        found.values, expected, rtol=0, atol=1e-8 * float(values.abs().max())
    )
    assert found.products == matrix.products
    images = matrix.matrix @ found.vectors
    own = torch.linalg.vector_norm(images - found.vectors * found.values, dim=0)
    torch.testing.assert_close(found.residuals, own, rtol=0, atol=1e-13)
    eye = torch.eye(k).double()
    torch.testing.assert_close(found.vectors.T @ found.vectors, eye, rtol=0, atol=1e-10)


def test_it_says_when_products_do_not_suffice():
    with pytest.raises(RuntimeError, match=r"after 30 products .* a larger tolerance"):
        top(Matrix(torch.linspace(0, 1, 500)), 1, limit=30)


def test_a_start_close_to_the_eigenvectors_takes_fewer_products():
    matrix = Matrix(torch.linspace(0, 1, 400) ** 4)
    cold = top(matrix, 2, tolerance=1e-4)
    torch.manual_seed(1)
    noise = torch.randn(400).double() * 1e-3
    warm = top(matrix, 2, cold.vectors.sum(1) + noise, tolerance=1e-4)
    assert warm.products < 0.7 * cold.products


@pytest.mark.parametrize("hidden", [1.02, 2.0])
def test_an_eigenvalue_that_overtakes_the_others_is_found(hidden):
    """The largest so far stays an eigenvector, to which the new one is orthogonal."""
    torch.manual_seed(0)
    x = torch.diag(torch.tensor([1.0, 0.5, 0.3, 0.2, 0.1] + [0.01] * 60).double())
    y = torch.zeros(65, 65).double()

    class Growing(nn.Module):
        """Half of ``sum_i c_i w_i^2`` at any weights, with ``c`` a buffer."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(65).double())
            self.register_buffer("scale", torch.ones(65).double())

        def forward(self, x):
            return (x * self.weight * self.scale).sum(1)

    model = Growing()
    before = {n: part.clone() for n, part in model.state_dict().items()}
    after = {n: part.clone() for n, part in before.items()}
    after["scale"][40] = 100 * math.sqrt(hidden)
    history = lowland.eigenvalues_over(
        model,
        lambda output, _: output.square().sum() / 2,
        (x, y[0]),
        [before, {n: part.clone() for n, part in before.items()}, after],
    )
    found = history.eigenvalues[:, 0].tolist()
    assert found == pytest.approx([1.0, 1.0, hidden], rel=1e-4)


# What it takes, and what it leaves


def test_the_model_and_the_checkpoints_are_left_as_they_were():
    model, x, y, states = trained("Recurrent")
    model.eval()
    before = {n: (id(p), p._version, p.detach().clone()) for n, p in model.state_dict().items()}
    parameters = [(id(p), p._version, p.requires_grad, p.grad) for p in model.parameters()]
    flat = [id(p) for p in model.lstm._flat_weights]
    kept = [{n: part.clone() for n, part in state.items()} for state in states]
    generator = torch.get_rng_state()

    def stop(title, done, total):
        assert (title, total) == ("checkpoints", 4)
        if done == 2:
            raise KeyboardInterrupt

    lowland.eigenvalues_over(model, CE, (x, y), states)
    with pytest.raises(KeyboardInterrupt):
        lowland.eigenvalues_over(model, CE, (x, y), states, on_progress=stop)
    assert torch.equal(torch.get_rng_state(), generator)
    assert parameters == [(id(p), p._version, p.requires_grad, p.grad) for p in model.parameters()]
    assert [id(p) for p in model.lstm._flat_weights] == flat
    for name, part in model.state_dict().items():
        assert torch.equal(part, before[name][2])
    for state, copy in zip(states, kept, strict=True):
        assert all(torch.equal(state[n], copy[n]) for n in state)
        assert not any(part.requires_grad for part in state.values())


def test_a_reference_to_the_models_own_state_has_its_values():
    """As it would not if checkpoints were copied into the parameters, one after the other."""
    model, x, y, states = trained()
    history = lowland.eigenvalues_over(
        model, CE, (x, y), [states[0], model.state_dict(), states[1]], tolerance=1e-9
    )
    expected = lowland.spectrum(model, CE, (x, y), k=1).eigenvalues
    torch.testing.assert_close(history.eigenvalues[1], expected)


def test_references_to_one_state_are_refused():
    model, x, y, _ = trained()
    with pytest.raises(ValueError, match=r"checkpoints 0 and 1 are the same tensors"):
        lowland.eigenvalues_over(model, CE, (x, y), [model.state_dict(), model.state_dict()])


def test_training_may_go_on_while_checkpoints_are_read():
    model, x, y, states = trained()
    model.load_state_dict(states[0])

    def training():
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        for _ in states:
            yield model.state_dict()
            optimizer.zero_grad()
            CE(model(x), y).backward()
            optimizer.step()

    whole = lowland.eigenvalues_over(model, CE, (x, y), states, tolerance=1e-9)
    model.load_state_dict(states[0])
    online = lowland.eigenvalues_over(model, CE, (x, y), training(), tolerance=1e-9)
    torch.testing.assert_close(online.eigenvalues, whole.eigenvalues)


def test_a_checkpoint_that_diverged_is_not_a_number():
    model, x, y, states = trained()
    states[1] = {n: part * math.nan for n, part in states[1].items()}
    states[2] = {n: part * 1e200 for n, part in states[2].items()}
    history = lowland.eigenvalues_over(model, CE, (x, y), states)
    assert history.eigenvalues[[0, 3]].isfinite().all()
    assert history.eigenvalues[[1, 2]].isnan().all()
    assert history.products[1] == 0
    labels = {text.get_text() for text in history.plot().get_legend().get_texts()}
    assert "no finite loss" in labels


@pytest.mark.usefixtures("as_installed")
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"k": 0}, ValueError, "k must be at least 1"),
        ({"k": 1.5}, TypeError, "k must be a whole number"),
        ({"k": 10**6}, ValueError, "k must be at most 51"),
        ({"tolerance": 0.0}, ValueError, "tolerance must be between 0 and 1"),
        ({"limit": 0}, ValueError, "limit must be at least 1"),
        ({"steps": [1, 2]}, ValueError, "one for each of 4 checkpoints; got 2"),
    ],
)
def test_what_is_out_of_range_is_refused(arguments, error, message):
    model, x, y, states = trained()
    with pytest.raises(error, match=message):
        lowland.eigenvalues_over(model, CE, (x, y), states, **arguments)


# Table and figure


def test_a_frame_has_a_row_for_each_eigenvalue():
    model, x, y, states = trained()
    history = lowland.eigenvalues_over(model, CE, (x, y), states, k=2, steps=[0, 10, 20, 40])
    table = history.to_frame()
    assert table.shape == (8, 6)
    wide = table.pivot_table(index="step", columns="rank", values="eigenvalue")
    assert wide.to_numpy() == pytest.approx(history.eigenvalues.numpy())
    assert wide.index.tolist() == [0, 10, 20, 40]


def test_the_figure_shows_where_gradient_descent_becomes_unstable():
    model, x, y, states = trained()
    history = lowland.eigenvalues_over(model, CE, (x, y), states, k=2)
    ax = history.plot(learning_rate=0.1, momentum=0.9)
    *eigenvalues, edge = ax.get_lines()
    assert [line.get_ydata().tolist() for line in eigenvalues] == history.eigenvalues.T.tolist()
    assert edge.get_ydata() == pytest.approx([38, 38])
    assert "38.0" in edge.get_label()
    schedule = history.plot(learning_rate=[0.1, 0.1, 0.05, 0.05]).get_lines()[-1]
    assert schedule.get_ydata() == pytest.approx([20, 20, 40, 40])
    for arguments, message in (
        ({"learning_rate": -1.0}, "must be positive"),
        ({"learning_rate": [1.0, 2.0]}, "each of 4 checkpoints; got 2"),
        ({"learning_rate": 1.0, "momentum": 1.0}, "momentum must be"),
    ):
        with pytest.raises(ValueError, match=message):
            history.plot(**arguments)

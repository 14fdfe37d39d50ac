import pytest
import torch
from torch import nn

import lowland
from lowland.dense import dense_hessian, dense_moments

MSE = nn.MSELoss()


@pytest.fixture
def data(generator):
    x = torch.randn(9, 2, generator=generator, dtype=torch.float64)
    return x, torch.randn(9, generator=generator, dtype=torch.float64)


def regression(model, x):
    """``H = 2/n X~^T X~`` of a linear model, weights first, then the bias."""
    design = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    return 2 / len(x) * design.T @ design


def test_linear_regression_has_its_known_hessian(data):
    model = nn.Linear(2, 1).double()
    expected = regression(model, data[0])
    torch.testing.assert_close(dense_hessian(model, MSE, *data), expected)
    moments = dense_moments(model, MSE, *data)
    assert moments.dim == 3
    torch.testing.assert_close(moments.trace, expected.trace())
    torch.testing.assert_close(moments.trace_sq, (expected @ expected).trace())


def test_four_moments_are_traces_of_powers(data):
    expected = regression(nn.Linear(2, 1), data[0])
    model = nn.Linear(2, 1).double()
    third, fourth = dense_moments(model, MSE, *data, moments=4).higher
    torch.testing.assert_close(third, expected.matrix_power(3).trace())
    torch.testing.assert_close(fourth, expected.matrix_power(4).trace())
    (grad,) = torch.autograd.grad(third + fourth, model.weight)
    assert not grad.any()  # a linear model's Hessian is constant
    assert dense_moments(model, MSE, *data).higher is None


@pytest.mark.parametrize("power", [1, 2, 3, 4])
def test_the_gradient_of_each_moment_is_that_of_the_trace_of_a_power(power, data):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    found = dense_moments(model, MSE, *data, moments=4)
    moment = (found.trace, found.trace_sq, *found.higher)[power - 1]
    expected = dense_hessian(model, MSE, *data).matrix_power(power).trace()
    mine, theirs = (
        torch.autograd.grad(each, list(model.parameters())) for each in (moment, expected)
    )
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("as_installed")
def test_another_number_of_moments_is_refused(data):
    with pytest.raises(ValueError, match=r"moments must be 2 or 4.*got 3"):
        dense_moments(nn.Linear(2, 1).double(), MSE, *data, moments=3)


def test_frozen_parameters_leave_the_matrix(data):
    model = nn.Linear(2, 1).double()
    model.bias.requires_grad_(requires_grad=False)
    expected = regression(model, data[0])[:2, :2]
    torch.testing.assert_close(dense_hessian(model, MSE, *data), expected)


def test_tied_parameters_count_once(data):
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
            self.second = self.first

        def forward(self, x):
            return self.first * self.second * x[:, 0]

    x, y = data
    model = Product()
    # d2/dw2 mean (w^2 x - y)^2 = mean (12 w^2 x^2 - 4 x y)
    expected = (12 * 1.5**2 * x[:, 0] ** 2 - 4 * x[:, 0] * y).mean()
    torch.testing.assert_close(dense_hessian(model, MSE, x, y), expected.detach().view(1, 1))


def test_moments_can_be_differentiated_even_twice(data):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    weight = model[0].weight
    moments = dense_moments(model, MSE, *data)
    (first,) = torch.autograd.grad(moments.trace_sq, weight, create_graph=True)
    (second,) = torch.autograd.grad(first[0, 0], weight)
    step = 1e-5
    shifted = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[0, 0] += sign * step
        (grad,) = torch.autograd.grad(dense_moments(model, MSE, *data).trace_sq, weight)
        shifted.append(grad)
        with torch.no_grad():
            weight[0, 0] -= sign * step
    torch.testing.assert_close(second, (shifted[0] - shifted[1]) / (2 * step), rtol=1e-6, atol=1e-8)


def test_any_criterion_and_target_are_taken(generator):
    x = torch.randn(7, 2, generator=generator, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    model = nn.Linear(2, 3).double()
    matrix = dense_hessian(model, nn.CrossEntropyLoss(), x, y)
    assert matrix.shape == (9, 9)
    # Softmax does not see a shift of all logits: the biases' block has that null vector.
    torch.testing.assert_close(matrix[6:, 6:].sum(1), torch.zeros(3, dtype=torch.float64))


def test_flat_targets_are_one_a_sample(data):
    x, y = data
    model = nn.Linear(2, 1).double()
    flat = dense_moments(model, MSE, x, y)
    column = dense_moments(model, MSE, x, y.unsqueeze(1))
    assert torch.equal(flat.trace_sq, column.trace_sq)


def test_a_matrix_beyond_the_limit_is_not_begun(data):
    model = nn.Linear(2, 1).double()
    with pytest.raises(
        ValueError, match=r"of 3 parameters .*dense_moments or .* larger memory_limit"
    ):
        dense_hessian(model, MSE, *data, memory_limit=71)
    dense_hessian(model, MSE, *data, memory_limit=72)


def test_a_loss_that_is_no_scalar(data):
    with pytest.raises(ValueError, match=r"got shape \(9, 1\): use reduction='mean' or 'sum'"):
        dense_hessian(nn.Linear(2, 1).double(), nn.MSELoss(reduction="none"), *data)


def test_a_model_without_trainable_parameters(data):
    model = nn.Linear(2, 1).double().requires_grad_(requires_grad=False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        dense_moments(model, MSE, *data)


def test_a_model_with_a_layer_that_occurs_twice_is_left_as_it_was():
    torch.manual_seed(0)
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(3, 1)).double()
    x, y = torch.randn(9, 3).double(), torch.randn(9, 1).double()
    before = list(model.parameters())
    first = lowland.hessian_moments(model, nn.MSELoss(), x, y)
    second = lowland.hessian_moments(model, nn.MSELoss(), x, y)
    assert all(one is other for one, other in zip(before, model.parameters(), strict=True))
    assert torch.equal(first.trace_sq, second.trace_sq)
    second.upper.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("x", "message"),
    [(torch.zeros(0, 3), "x is empty"), (torch.full((4, 3), float("nan")), "x has 12 NaN")],
)
def test_brute_force_looks_at_its_data_too(x, message):
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1))
    with pytest.raises(ValueError, match=message):
        lowland.hessian_moments(model, nn.MSELoss(), x, torch.zeros(len(x), 1))


def test_layers_in_training_mode_are_measured_by_their_batch_and_left_as_they_were():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).double()
    x, y = torch.randn(9, 3).double(), torch.randn(9, 1).double()
    before = [buffer.clone() for buffer in model.buffers()]
    found = lowland.hessian_moments(model, nn.MSELoss(), x, y, "dense")
    found.upper.backward()
    assert all(map(torch.equal, before, model.buffers()))
    by_hand = nn.Sequential(model[0], Normalized(model[1]), model[2])
    expected = torch.autograd.functional.hessian
    parameters = tuple(p.detach() for p in model.parameters())

    def loss(*values):
        names = [name for name, _ in by_hand.named_parameters()]
        output = torch.func.functional_call(by_hand, dict(zip(names, values, strict=True)), (x,))
        return nn.functional.mse_loss(output, y)

    blocks = expected(loss, parameters)
    square = sum(block.square().sum() for row in blocks for block in row)
    torch.testing.assert_close(found.trace_sq.detach(), square, rtol=1e-10, atol=0)
    assert lowland.hessian_moments(model, nn.MSELoss(), x, y).method == "probes"
    assert lowland.hessian_moments(model.eval(), nn.MSELoss(), x, y).dim == 22


class Normalized(nn.Module):
    """A batch normalization in training mode, in plain operations."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x):
        centered = x - x.mean(0)
        return centered / (centered.square().mean(0) + self.eps).sqrt() * self.weight + self.bias


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def test_a_matrix_leaves_random_numbers_alone(device):
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(), nn.Linear(3, 1)).to(device)
    x, y = torch.randn(9, 3, device=device), torch.randn(9, 1, device=device)
    torch.manual_seed(0)
    expected = torch.rand(5, device=device)
    torch.manual_seed(0)
    dense_hessian(model, MSE, x, y)
    assert torch.equal(torch.rand(5, device=device), expected)


def test_a_loss_without_a_graph_is_no_flat_one(data):
    class Accuracy(nn.Module):
        def forward(self, output, y):
            return (output.argmax(1) == y).double().mean()

    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)).double()
    with pytest.raises(ValueError, match="the loss has no graph"):
        lowland.hessian_moments(model, Accuracy(), data[0], torch.zeros(len(data[0])))


def test_what_the_model_does_not_take_is_said_without_derivatives(data):
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)).double()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        lowland.hessian_moments(model, nn.MSELoss(), data[0], torch.zeros(len(data[0]), 3))
    assert "differentiate" not in str(caught.value)

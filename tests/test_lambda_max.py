"""The largest eigenvalue as a penalty, and what it follows."""

import copy
import pickle

import parallel_lambda_max
import pytest
import torch
import two_processes
from any_models import CROSS_ENTROPY, MODELS, build, error, trainable
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import grad

import lowland
from lowland.dense import dense_hessian
from lowland.passes import frozen_statistics
from lowland.tracking import Tracked, begun, followed, lanczos

PRODUCTS = ["autograd", "differences"]


def drawn(seed=0):
    return torch.Generator().manual_seed(seed)


def made(products="auto", weight=1.0, **more):
    settings = {"limit": 1e9, "products": products, "generator": drawn(), **more}
    return lowland.LambdaMax(CROSS_ENTROPY, weight, **settings)


def matrix_of(model, x, y, criterion=CROSS_ENTROPY):
    with frozen_statistics(model):
        return dense_hessian(model, criterion, x, y)


def top(model, x, y):
    return float(torch.linalg.eigvalsh(matrix_of(model, x, y).detach())[-1])


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits  # noqa: PLC0415 - slow

    data = load_digits()
    return torch.tensor(data.data) / 6 - 0.8, torch.tensor(data.target)


# The value and its gradient.


def _slow_but(quick, names):
    return [name if name == quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("name", _slow_but("mlp", MODELS))
def test_where_nothing_moves_it_is_the_largest_eigenvalue_with_its_gradient(name, products):
    model, x, y = build(name)
    penalty = made(products, 0.5)
    for _ in range(80):
        value = penalty(model, x, y)
    matrix = matrix_of(model, x, y)
    values, vectors = torch.linalg.eigh(matrix.detach())
    torch.testing.assert_close(value, 0.5 * values[-1], rtol=1e-6, atol=0)
    found = grad(value, trainable(model))
    expected = grad(0.5 * (vectors[:, -1] @ matrix @ vectors[:, -1]), trainable(model))
    assert error(found, expected) < (1e-6 if products == "autograd" else 1e-3)
    assert penalty.used == products
    torch.testing.assert_close(penalty.known.eigenvalue, 2 * value.detach())
    assert penalty.known.residual < 1e-6


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("name", ["mlp", "cnn", "Attention"])
def test_loss_is_both_and_counts_as_one_pass(name, products):
    model, x, y = build(name)
    two, once = copy.deepcopy(model), copy.deepcopy(model)
    total = made(products, 0.3).loss(model, x, y)
    total.backward()
    loss = CROSS_ENTROPY(once(x), y)
    with frozen_statistics(two):
        apart = CROSS_ENTROPY(two(x), y) + made(products, 0.3)(two, x, y)
    apart.backward()
    torch.testing.assert_close(total, apart)
    assert total > loss
    for one, other in zip(model.buffers(), once.buffers(), strict=True):
        torch.testing.assert_close(one, other)
    assert error(*([p.grad for p in m.parameters()] for m in (model, two))) < 1e-8


@pytest.mark.parametrize("products", PRODUCTS)
def test_at_any_time_it_is_a_lower_bound_with_an_eigenvalue_within_the_residual(products):
    for seed in range(5):
        model, x, y = build("mlp", seed=seed)
        penalty = lowland.LambdaMax(CROSS_ENTROPY, 1.0, products=products, generator=drawn(seed))
        for _ in range(4):
            penalty(model, x, y)
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(torch.randn_like(p), alpha=0.1)
            penalty(model, x, y)
            values = torch.linalg.eigvalsh(matrix_of(model, x, y).detach())
            value, residual = penalty.known.eigenvalue, penalty.known.residual
            assert value <= values[-1] + 1e-6
            assert (values - value).abs().min() <= residual + 1e-6


@pytest.mark.parametrize("products", PRODUCTS)
def test_single_precision_is_about_double(products):
    model, x, y = build("mlp", samples=64)
    penalty = made(products)
    for _ in range(30):
        value = penalty(model, x, y)
    expected = grad(value, trainable(model))
    single, narrow = copy.deepcopy(model).float(), made(products)
    for _ in range(30):
        found = narrow(single, x.float(), y)
    torch.testing.assert_close(found.double(), value, rtol=1e-3, atol=0)
    assert error(grad(found, trainable(single)), expected) < 0.05


def test_a_loss_of_higher_slope_goes_backward_as_it_should():
    """Neither the loss's slope nor the value's is one."""
    for products in PRODUCTS:
        model, x, y = build("mlp")
        penalty = made(products, 0.2)
        total = 3 * penalty.loss(model, x, y) ** 2
        found = grad(total, trainable(model))
        loss = CROSS_ENTROPY(model(x), y) + made(products, 0.2)(model, x, y)
        assert error(found, grad(3 * loss**2, trainable(model))) < 1e-6


# Tracking.


@pytest.mark.slow
@pytest.mark.parametrize(("activation", "least"), [(nn.Tanh, 0.94), (nn.ReLU, 0.92)])
def test_it_follows_the_largest_eigenvalue_along_training(activation, least, digits):
    """By steps large enough to raise it by a third within ten of them."""
    x, y = (each[:600] for each in digits)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 5), activation(), nn.Linear(5, 10)).double()
    penalty, optimizer = made(weight=0.01), torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    ratios = []
    for step in range(120):
        optimizer.zero_grad()
        penalty.loss(model, x, y).backward()
        if step % 10 == 0:
            ratios.append(float(penalty.known.eigenvalue) / top(model, x, y))
        optimizer.step()
    assert max(ratios) <= 1 + 1e-9
    assert min(ratios) > 0.8
    assert sum(ratios) / len(ratios) > least


@pytest.mark.parametrize("products", PRODUCTS)
def test_of_slow_training_it_follows_within_a_percent(products, digits):
    x, y = (each[:200] for each in digits)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 3), nn.Tanh(), nn.Linear(3, 10)).double()
    penalty = made(products, 0.01)
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    ratios = []
    for step in range(81):
        optimizer.zero_grad()
        penalty.loss(model, x, y).backward()
        if step % 20 == 0:
            ratios.append(float(penalty.known.eigenvalue) / top(model, x, y))
        optimizer.step()
    assert 0.97 < min(ratios) <= max(ratios) < 1 + 1e-6


@given(
    st.floats(0.05, 4.0),
    st.floats(-3.0, 0.9),
    st.integers(3, 40),
    st.integers(0, 1000),
    st.sampled_from([1e-4, 1.0, 1e5]),
)
@settings(max_examples=25, deadline=None)
def test_of_any_matrix_the_largest_eigenvalue_is_found_not_the_one_of_largest_magnitude(
    depth, second, size, seed, scale
):
    generator = drawn(seed)
    rotation = torch.linalg.qr(torch.randn(size, size, generator=generator).double())[0]
    values = torch.empty(size).double().uniform_(-depth, max(second, -depth), generator=generator)
    values[0], values[1] = 1.0, -depth
    matrix = scale * rotation @ torch.diag(values) @ rotation.T

    def multiply(vector):
        return [matrix @ vector[0]]

    tracked = begun(multiply, [torch.randn(size, generator=generator).double()], 8)
    for _ in range(300):
        product = multiply(tracked.vector)
        tracked, pair = followed(tracked, tracked.vector[0] @ product[0], product)
    assert abs(float(pair.eigenvalue) / scale - 1) < 1e-3
    assert abs(float(tracked.vector[0].norm()) - 1) < 1e-8


def test_where_all_eigenvalues_are_negative_it_goes_to_the_least_negative_one():
    values = torch.tensor([-5.0, -3.0, -1.0]).double()
    start = torch.tensor([0.9, 0.3, 0.3]).double()
    depth = torch.tensor(5.0).double()  # as a look around has it
    tracked = Tracked([start / start.norm()], depth)
    for _ in range(300):
        product = [values * tracked.vector[0]]
        tracked, pair = followed(tracked, tracked.vector[0] @ product[0], product)
    assert abs(float(pair.eigenvalue) + 1) < 1e-3


@pytest.mark.slow
def test_a_hessian_deeper_than_high():
    """A loss that is its own negative: the magnitude of the lowest eigenvalue is the larger one."""

    def negative(output, y):
        return -CROSS_ENTROPY(output, y)

    model, x, y = build("mlp")
    penalty = lowland.LambdaMax(negative, 1.0, generator=drawn(), limit=None)
    for _ in range(300):
        value = penalty(model, x, y)
    values = torch.linalg.eigvalsh(matrix_of(model, x, y, negative).detach())
    assert -values[0] > 1.5 * values[-1]
    torch.testing.assert_close(value.detach(), values[-1], rtol=1e-3, atol=0)


def test_an_eigenvector_that_it_had_no_part_of_is_found_when_it_looks_around():
    """Two networks side by side, of which one has grown since."""

    class Apart(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Linear(3, 1).double(), nn.Linear(3, 1).double()

        def forward(self, x):
            return torch.cat([self.one(x[:, :3]) * 1.0, self.other(x[:, 3:])], 1)

    model, x = Apart(), torch.randn(20, 6, generator=drawn()).double()
    x[:, 3:] *= 0.1
    y = torch.zeros(20, 2).double()
    penalty = lowland.LambdaMax(nn.MSELoss(), 1.0, generator=drawn(), refresh=40)
    for _ in range(40):
        penalty(model, x, y)
    x[:, 3:] *= 1000
    penalty._tracked.vector[2].zero_()
    penalty._tracked.vector[3].zero_()
    penalty(model, x, y)
    for _ in range(5):
        value = penalty(model, x, y)
    matrix = dense_hessian(model, nn.MSELoss(), x, y).detach()
    torch.testing.assert_close(value.detach(), torch.linalg.eigvalsh(matrix)[-1], rtol=1e-3, atol=0)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_lanczos_values_lie_within_the_spectrum_and_end_at_it(size, count, seed):
    matrix = torch.randn(size, size, generator=drawn(seed)).double()
    matrix = matrix + matrix.T
    start = [torch.randn(size, generator=drawn(seed + 1)).double()]
    vector, found = lanczos(lambda v: [matrix @ v[0]], start, count)
    values = torch.linalg.eigvalsh(matrix)
    assert found[-1] <= values[-1] + 1e-9
    assert found[0] >= values[0] - 1e-9
    torch.testing.assert_close(vector[0] @ matrix @ vector[0], found[-1])
    if count >= size:
        torch.testing.assert_close(found[-1], values[-1])


def test_training_with_it_ends_flatter():
    after = []
    for weight in (0.0, 0.3):
        model, x, y = build("cnn", samples=32, dtype=torch.float32)
        penalty, optimizer = made(weight=weight), torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(40):
            optimizer.zero_grad()
            penalty.loss(model, x, y).backward()
            optimizer.step()
        after.append(top(model, x, y))
    assert after[1] < 0.8 * after[0]


# When it begins anew, and what it keeps.


def products_of(penalty, model, x, y, monkeypatch):
    """How many Lanczos runs a call makes."""
    import lowland.lambda_max as home  # noqa: PLC0415

    runs = []
    for name in ("begun", "looked_around"):
        whole = getattr(home, name)
        monkeypatch.setattr(
            home, name, lambda *a, name=name, whole=whole: (runs.append(name), whole(*a))[1]
        )
    penalty(model, x, y)
    monkeypatch.undo()
    return runs


def test_it_begins_anew_for_another_model_or_other_parameters_and_for_nothing_else(monkeypatch):
    model, x, y = build("mlp")
    penalty = made(refresh=5)

    def runs(model=model):
        return products_of(penalty, model, x, y, monkeypatch)

    assert runs() == ["begun"]
    assert [runs() for _ in range(5)] == [[], [], [], [], ["looked_around"]]
    assert runs(copy.deepcopy(model)) == ["begun"]
    assert runs() == ["begun"]
    model[0].weight.requires_grad_(requires_grad=False)
    assert runs() == ["begun"]
    assert runs() == []
    before = [part.clone() for part in penalty._tracked.vector]
    penalty.eval()
    assert runs() == []
    assert runs(copy.deepcopy(model)) == ["begun"]
    penalty.train()
    assert all(torch.equal(a, b) for a, b in zip(before, penalty._tracked.vector, strict=True))
    assert runs() == []
    model[0] = nn.Linear(4, 5).double()
    assert runs() == ["begun"]
    other, narrow = build("mlp")[0].requires_grad_(), copy.deepcopy(x)
    other[4] = nn.Linear(3, 4).double()
    assert products_of(penalty, other, narrow, y, monkeypatch) == ["begun"]


def test_it_goes_with_the_model_to_another_precision(monkeypatch):
    model, x, y = build("mlp")
    penalty = made()
    for _ in range(20):
        value = penalty(model, x, y)
    model.float()
    assert products_of(penalty, model, x.float(), y, monkeypatch) == []
    assert penalty.known.eigenvalue.dtype == torch.float32
    torch.testing.assert_close(penalty.known.eigenvalue.double(), value.detach(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("products", PRODUCTS)
def test_a_checkpoint_continues_bit_for_bit(products, tmp_path):
    def start(seed):
        model, x, y = build("cnn", seed=seed)
        penalty = lowland.LambdaMax(
            CROSS_ENTROPY,
            0.1,
            products=products,
            generator=drawn(seed),
            refresh=3,
            every=2,
            active=(1, 15),
        )
        return model, penalty, torch.optim.Adam(model.parameters()), x, y

    def train(model, penalty, optimizer, x, y):
        for _ in range(8):
            optimizer.zero_grad()
            penalty.loss(model, x, y).backward()
            optimizer.step()

    first = start(0)
    train(*first)
    torch.save([part.state_dict() for part in first[:3]], tmp_path / "state.pt")
    random = first[1].estimation.generator.get_state()
    train(*first)
    second = start(1)
    for part, state in zip(second[:3], torch.load(tmp_path / "state.pt"), strict=True):
        part.load_state_dict(state)
    second[1].estimation.generator.set_state(random)
    train(*second[:3], *first[3:])
    for one, other in zip(first[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(one, other)


def test_what_is_loaded_does_not_fit_a_model_of_another_form(monkeypatch):
    model, x, y = build("mlp")
    penalty, other = made(), made()
    penalty(model, x, y)
    other.load_state_dict(penalty.state_dict())
    assert products_of(other, build("cnn")[0], x, y, monkeypatch) == ["begun"]
    other.load_state_dict(made().state_dict())
    assert products_of(other, model, x, y, monkeypatch) == ["begun"]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])  # noqa: S301
def test_copies_go_on_as_the_original_does(duplicate):
    model, x, y = build("mlp")
    penalty = lowland.LambdaMax(CROSS_ENTROPY, 0.3)
    for _ in range(3):
        penalty(model, x, y)
    twin = duplicate(penalty)
    assert torch.equal(twin(model, x, y), penalty(model, x, y))


def test_in_evaluation_mode_it_gives_its_value_and_changes_nothing():
    model, x, y = build("cnn")
    penalty = made(weight=0.5, every=4, active=(3, 5))
    plain = CROSS_ENTROPY(model(x), y)
    assert penalty(model, x, y) == 0
    torch.testing.assert_close(penalty.loss(model, x, y), plain)
    assert penalty.known is None
    penalty.eval()
    assert penalty(model, x, y) > 0
    assert penalty.loss(model, x, y) > plain
    assert penalty._tracked is None
    assert penalty.calls == 2
    with torch.no_grad():
        assert not penalty(model, x, y).requires_grad


# In training as people do it.


@pytest.mark.parametrize("products", PRODUCTS)
def test_dropout_draws_one_mask_for_both(products):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Dropout(), nn.Linear(8, 2)).double()
    x, y = torch.randn(8, 4).double(), torch.arange(8) % 2
    penalty = made(products, 0.5)
    penalty.loss(model, x, y)  # the look at derivatives is over
    vector = penalty._tracked.vector
    torch.manual_seed(1)
    total, after = penalty.loss(model, x, y), torch.rand(1)
    torch.manual_seed(1)
    mask = (model[2](torch.ones(8, 8).double()) > 0).double() * 2
    assert torch.equal(after, torch.rand(1))

    class Times(nn.Module):
        def forward(self, x):
            return x * mask

    fixed = nn.Sequential(model[0], model[1], Times(), model[3])
    matrix = dense_hessian(fixed, CROSS_ENTROPY, x, y)
    flat = torch.cat([part.reshape(-1) for part in vector])
    expected = CROSS_ENTROPY(fixed(x), y) + 0.5 * flat @ matrix @ flat
    assert error(total, expected) < 1e-6
    assert error(grad(total, trainable(model)), grad(expected, trainable(model))) < 1e-3


@pytest.mark.parametrize("products", PRODUCTS)
def test_a_subset_of_the_parameters_is_as_if_the_others_were_frozen(products):
    model, x, y = build("mlp")
    whole = [p for layer in model[2:] for p in layer.parameters()]
    total = made(products, 0.5, parameters=iter(whole)).loss(model, x, y)
    total.backward()
    other = copy.deepcopy(model).requires_grad_(requires_grad=False)
    other[2:].requires_grad_()
    frozen = made(products, 0.5)(other, x, y)
    torch.testing.assert_close(total, CROSS_ENTROPY(model(x), y) + frozen)
    loss, parts = grad(CROSS_ENTROPY(model(x), y), whole), grad(frozen, trainable(other))
    assert error([p.grad for p in whole], [a + b for a, b in zip(loss, parts, strict=True)]) < 1e-6
    assert model[0].weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("products", PRODUCTS)
def test_training_under_autocast_with_a_scaler_survives_overflows(products, dtype):
    model, x, y = build("cnn", samples=64, dtype=torch.float32)
    y = (x[:, 0] > 0).long()
    penalty, optimizer = made(products, 0.01), torch.optim.SGD(model.parameters(), lr=0.3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = CROSS_ENTROPY(model(x), y)
    for step in range(20):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            total = penalty.loss(model, x, y)
        scaler.scale(total * (torch.inf if step == 3 else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert CROSS_ENTROPY(model(x), y) < 0.8 * before
    assert abs(float(penalty.known.eigenvalue) / top(model, x, y) - 1) < 0.1


def test_an_overflow_of_the_product_leaves_the_vector_where_it_was():
    model, x, y = build("mlp", dtype=torch.float32)
    penalty = made("autograd")
    with torch.autocast("cpu", torch.float16):
        penalty(model, x, y)
        before = [part.clone() for part in penalty._tracked.vector]
        assert penalty(model, 1e5 * x, y) == 0
        assert all(torch.equal(a, b) for a, b in zip(before, penalty._tracked.vector, strict=True))
        assert penalty(model, x, y).isfinite()


@pytest.mark.slow
def test_compiled_models_are_penalized_as_they_were_written():
    found = []
    for compiled in (True, False):
        model, x, y = build("cnn")
        wrapped = torch.compile(model, backend="aot_eager") if compiled else model
        penalty = made(weight=0.1)
        for _ in range(2):
            model.zero_grad()
            (CROSS_ENTROPY(wrapped(x), y) + penalty(wrapped, x, y)).backward()
        found.append([p.grad for p in model.parameters()])
    assert error(*found) < 1e-9


def test_parameters_that_the_loss_does_not_depend_on_and_batches_of_names():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 2).double(), nn.Linear(4, 2).double()
            self.rows = nn.Embedding(3, 2, padding_idx=0).double()

        def forward(self, x, ids, y):
            del y  # the criterion's
            return torch.tanh(self.used(x)) + self.rows(ids)

    def criterion(output, batch):
        return CROSS_ENTROPY(output, batch["y"])

    torch.manual_seed(0)
    batch = {"x": torch.randn(9, 4).double(), "ids": torch.arange(9) % 3, "y": torch.arange(9) % 2}
    for products in PRODUCTS:
        model = Named()
        penalty = lowland.LambdaMax(criterion, 1.0, products=products, generator=drawn())
        for _ in range(60):
            value = penalty(model, batch)
        matrix = dense_hessian(model, criterion, batch, batch)
        largest = torch.linalg.eigvalsh(matrix.detach())[-1]
        torch.testing.assert_close(value.detach(), largest, rtol=1e-4, atol=0)
        penalty.loss(model, batch).backward()
        assert model.unused.weight.grad is None or not model.unused.weight.grad.any()


def test_kinks_are_gone_through_by_autograd_and_warned_of_with_differences():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    x, y = torch.randn(8, 4).double(), torch.arange(8) % 2
    penalty = made()
    penalty(model, x, y)
    assert penalty.used == "autograd"
    with pytest.warns(UserWarning, match="the gradient jumps at its kinks"):
        made("differences")(model, x, y)


@pytest.mark.slow
def test_several_processes_track_one_vector_of_all_samples(tmp_path):
    expected = parallel_lambda_max.alone()
    for results in two_processes.run(parallel_lambda_max.in_parallel, tmp_path):
        for products, one, other in zip(PRODUCTS * 2, results, expected, strict=True):
            assert error(one, other) < (1e-9 if products == "autograd" else 1e-3)


# Bad input.


@pytest.mark.usefixtures("as_installed")
@pytest.mark.parametrize(
    ("given_", "raised", "message"),
    [
        ({"refresh": 0}, ValueError, "refresh must be a whole number of at least 1; got 0"),
        ({"refresh": 2.5}, ValueError, "refresh must be a whole number"),
        ({"products": "x"}, ValueError, "unknown products 'x'"),
        ({"every": 0}, ValueError, "every must be a whole number"),
        ({"parameters": []}, ValueError, "parameters= must name at least one"),
        ({"generator": 3}, TypeError, "generator must be a torch.Generator"),
        ({"weight": -1}, ValueError, "weight must be a finite number of at least 0"),
        ({"weight": "a"}, TypeError, "weight must be a finite number"),
    ],
)
def test_settings_that_make_no_sense(given_, raised, message):
    with pytest.raises(raised, match=message):
        lowland.LambdaMax(CROSS_ENTROPY, **{"weight": 0.1, **given_})


def test_a_hessian_of_zeros_is_refused_as_elsewhere():
    model, x = nn.Linear(3, 1).double(), torch.randn(5, 3).double()
    with pytest.raises(ValueError, match="its Hessian is zero"):
        lowland.LambdaMax(nn.L1Loss(), 1.0, products="autograd")(model, x, x[:, :1] + 1)


def test_print_shows_what_is_not_usual():
    assert "LambdaMax(" in repr(lowland.LambdaMax(CROSS_ENTROPY, 0.1))
    shown = repr(lowland.LambdaMax(CROSS_ENTROPY, 0.1, products="differences", refresh=7))
    assert "weight=0.1, products='differences', refresh=7" in shown

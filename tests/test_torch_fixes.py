"""Second derivatives under vmap, which PyTorch's own kernels lack or get wrong."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian

from lowland.dense import dense_hessian
from lowland.torch_fixes import differentiable_operations, is_ordinary

DOUBLE = torch.float64
NORMS = {
    "layer": (nn.LayerNorm(4), (6, 4)),
    "layer over two dimensions": (nn.LayerNorm((3, 4)), (6, 3, 4)),
    "layer without parameters": (nn.LayerNorm(4, elementwise_affine=False), (6, 4)),
    "layer without a bias": (nn.LayerNorm(4, bias=False), (6, 4)),
    "batch by the batch": (nn.BatchNorm1d(4, track_running_stats=False), (6, 4)),
    "batch of images": (nn.BatchNorm2d(4, track_running_stats=False), (3, 4, 2, 2)),
    "batch by its statistics": (nn.BatchNorm1d(4).eval(), (6, 4)),
    "instance": (nn.InstanceNorm1d(4, affine=True), (3, 4, 5)),
    "instance without parameters": (nn.InstanceNorm2d(4), (3, 4, 2, 2)),
    "instance by its own": (nn.InstanceNorm1d(4, track_running_stats=True).eval(), (3, 4, 5)),
    "group": (nn.GroupNorm(2, 4), (6, 4)),
    "root mean square": (nn.RMSNorm(4), (6, 4)),
}  # fmt: skip


class Scaled(nn.Module):
    """A normalization whose inputs depend on a parameter, and not linearly."""

    def __init__(self, norm, shape):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.scale = nn.Parameter(torch.randn(shape[1:], generator=generator))
        self.norm = norm
        for name, part in norm.state_dict().items():
            if part.is_floating_point():
                noise = torch.rand(part.shape, generator=generator)
                part.copy_(0.5 + noise if "var" in name or "weight" in name else noise)

    def forward(self, x):
        return self.norm((self.scale * x).sin()).exp()


def problem(name):
    norm, shape = NORMS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    return Scaled(norm, shape).double(), x


def by_rows(model, x):
    """``H`` of the mean output by two backward passes for each row, without vmap."""
    parameters = list(model.parameters())
    gradient = torch.autograd.grad(model(x).mean(), parameters, create_graph=True)
    flat = torch.cat([part.reshape(-1) for part in gradient])
    rows = [
        torch.autograd.grad(g, parameters, retain_graph=True, materialize_grads=True) for g in flat
    ]
    return torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])


@pytest.mark.parametrize("name", NORMS)
def test_values_stay_and_second_derivatives_are_right(name):
    model, x = problem(name)
    named = dict(model.named_parameters())
    sizes = [p.numel() for p in named.values()]

    def mean(flat):
        parts = flat.split(sizes)
        own = {n: part.view_as(p) for (n, p), part in zip(named.items(), parts, strict=True)}
        return functional_call(model, own, (x,)).mean()

    value, expected = model(x), by_rows(model, x)
    with differentiable_operations(model):
        torch.testing.assert_close(model(x), value)
        found = hessian(mean)(torch.cat([p.detach().reshape(-1) for p in named.values()]))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_brute_force_is_right_about_a_transformer():
    """It could not differentiate fused attention, and was wrong about LayerNorm."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 5, 0.1, "gelu", batch_first=True)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(12, 2)).double().eval()
    x, y = torch.randn(7, 3, 4, dtype=DOUBLE), torch.randint(2, (7,))
    parameters = list(model.parameters())
    criterion = nn.CrossEntropyLoss()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        gradient = torch.autograd.grad(criterion(model(x), y), parameters, create_graph=True)
    flat = torch.cat([part.reshape(-1) for part in gradient])
    v = torch.randn(len(flat), dtype=DOUBLE)
    product = torch.autograd.grad(flat @ v, parameters)
    matrix = dense_hessian(model, criterion, x, y)
    torch.testing.assert_close(matrix @ v, torch.cat([part.reshape(-1) for part in product]))


def test_settings_are_given_back():
    model = nn.LSTM(2, 2)
    before = torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled
    with differentiable_operations(model):
        assert not torch.backends.mkldnn.enabled
        assert not torch.backends.cudnn.enabled
    assert before == (torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled)
    assert torch.backends.cuda.flash_sdp_enabled()


def test_only_pytorchs_own_plain_modules_are_ordinary():
    plain = nn.Sequential(nn.Conv2d(1, 2, 3), nn.GELU(), nn.Flatten(), nn.Linear(2, 2))
    assert is_ordinary(plain, nn.CrossEntropyLoss())

    class Own(nn.Linear):
        pass

    hooked = nn.Linear(2, 2)
    hooked.register_forward_hook(lambda module, inputs, output: output)
    others = nn.LayerNorm(2), nn.MultiheadAttention(2, 1), nn.LSTM(2, 2), Own(2, 2), hooked
    for other in others:
        assert not is_ordinary(nn.Sequential(nn.Linear(2, 2), other))

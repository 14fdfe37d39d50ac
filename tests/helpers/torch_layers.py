"""Every layer of torch.nn that has values to differentiate, each in a small network with a loss."""

import warnings
from functools import partial

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations

EYE = torch.eye(3).double()


class Within(nn.Module):
    """A layer behind a linear one, whose outputs have the shape that it takes."""

    def __init__(self, layer, shape, call=None):
        super().__init__()
        self.front = nn.Linear(2, torch.Size(shape).numel())
        self.layer, self.shape, self.call = layer, shape, call

    def forward(self, x):
        inside = torch.tanh(self.front(x)).mul(1.3).reshape(len(x), *self.shape)
        output = self.call(self.layer, inside) if self.call else self.layer(inside)
        return output[0] if isinstance(output, tuple) else output


def smooth(output, y):
    """A loss with derivatives of all orders, other ones for each output."""
    weights = torch.linspace(-1, 1.5, output.numel(), dtype=output.dtype).view(output.shape)
    return ((output * (1 + weights)).sin() + output.square() * weights).sum() / len(y)


def of(layer, *shape, call=None):
    return lambda: Within(layer(), shape, call)


def function(call, *shape):
    return of(nn.Identity, *shape, call=lambda _, h: call(h))


def twice(layer, h):
    return layer(h, h.cos())


def packed(layer, h):
    sequences = nn.utils.rnn.pack_padded_sequence(h, [3, 2, 1], batch_first=True)
    return layer(sequences)[0].data


def unpooled(layer, h):
    pool = {3: functional.max_pool1d, 4: functional.max_pool2d, 5: functional.max_pool3d}[h.ndim]
    values, indices = pool(h, 2, return_indices=True)
    return layer(values.square(), indices)


def rows(layer, h):
    return layer(torch.tensor([0, 2, 2])) * h.sum(1, keepdim=True)


def bags(layer, h):
    return layer(torch.tensor([[0, 2], [2, 1], [3, 4]])).tanh() * h.sum(1, keepdim=True)


def weighed_bags(layer, h):
    return layer(torch.tensor([[0, 2], [2, 1], [3, 4]]), per_sample_weights=h).tanh()


def offset_bags(layer, h):
    return layer(torch.tensor([0, 2, 1, 3]), torch.tensor([0, 1, 1])).tanh() * h.sum()


ACTIVATIONS = {
    name: of(getattr(nn, name), 3)
    for name in [
        "CELU",
        "ELU",
        "GELU",
        "Hardshrink",
        "Hardsigmoid",
        "Hardswish",
        "Hardtanh",
        "LeakyReLU",
        "LogSigmoid",
        "Mish",
        "PReLU",
        "ReLU",
        "ReLU6",
        "SELU",
        "SiLU",
        "Sigmoid",
        "Softplus",
        "Softshrink",
        "Softsign",
        "Tanh",
        "Tanhshrink",
    ]
} | {
    "GLU": of(nn.GLU, 4),
    "LogSoftmax": of(partial(nn.LogSoftmax, 1), 3),
    "RReLU": of(nn.RReLU, 3),
    "Softmax": of(partial(nn.Softmax, 1), 3),
    "Softmax2d": of(nn.Softmax2d, 2, 2, 1),
    "Softmin": of(partial(nn.Softmin, 1), 3),
    "Threshold": of(partial(nn.Threshold, 0.1, 0.2), 3),
    "MultiheadAttention": of(
        partial(nn.MultiheadAttention, 2, 1, batch_first=True), 2, 2, call=lambda m, h: m(h, h, h)
    ),
}


def _former_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(nn.Conv1d(2, 2, 2))


NORMALIZATIONS = {
    "BatchNorm1d": of(partial(nn.BatchNorm1d, 2), 2, 2),
    "BatchNorm2d": of(partial(nn.BatchNorm2d, 2), 2, 2, 1),
    "BatchNorm3d": of(partial(nn.BatchNorm3d, 2), 2, 2, 1, 1),
    "InstanceNorm1d": of(partial(nn.InstanceNorm1d, 2, affine=True), 2, 3),
    "InstanceNorm2d": of(partial(nn.InstanceNorm2d, 1, track_running_stats=True), 1, 2, 2),
    "InstanceNorm3d": of(partial(nn.InstanceNorm3d, 1), 1, 2, 2, 1),
    "LayerNorm": of(partial(nn.LayerNorm, 3), 2, 3),
    "GroupNorm": of(partial(nn.GroupNorm, 2, 4), 4, 2),
    "RMSNorm": of(partial(nn.RMSNorm, 3), 2, 3),
    "LocalResponseNorm": of(partial(nn.LocalResponseNorm, 2), 3, 2),
    "CrossMapLRN2d": of(partial(nn.CrossMapLRN2d, 2), 3, 2, 2),
    "torch.layer_norm": function(lambda h: torch.layer_norm(h, (4,)), 4),
    "torch.native_layer_norm": function(
        lambda h: torch.native_layer_norm(h, (4,), None, None, 1e-5)[0], 4
    ),
    "torch.batch_norm": function(
        lambda h: torch.batch_norm(h, None, None, None, None, True, 0.1, 1e-5, False),
        4,
    ),
    "torch.native_batch_norm": function(
        lambda h: torch.native_batch_norm(h, None, None, None, None, True, 0.1, 1e-5)[0],
        4,
    ),
    "torch.instance_norm": function(
        lambda h: torch.instance_norm(h, None, None, None, None, True, 0.1, 1e-5, False),
        *(2, 4),
    ),
    "torch.group_norm": function(lambda h: torch.group_norm(h, 2), 4, 2),
    "weight_norm": of(lambda: parametrizations.weight_norm(nn.Linear(3, 2)), 3),
    "weight_norm of all": of(lambda: parametrizations.weight_norm(nn.Linear(3, 2), dim=None), 3),
    "former weight_norm": of(_former_weight_norm, 2, 3),
    "spectral_norm": of(lambda: parametrizations.spectral_norm(nn.Linear(3, 2)).eval(), 3),
    "orthogonal": of(lambda: parametrizations.orthogonal(nn.Linear(3, 3)), 3),
}

POOLINGS = (
    {
        f"{name}{d}d": of(partial(getattr(nn, f"{name}{d}d"), *settings), 1, *(2,) * (d - 1), 4)
        for d in (1, 2, 3)
        for name, settings in (
            ("AvgPool", (2,)),
            ("LPPool", (2, 2)),
            ("MaxPool", (2,)),
            ("AdaptiveAvgPool", (2,)),
            ("AdaptiveMaxPool", (2,)),
        )
    }
    | {
        f"MaxUnpool{d}d": of(partial(getattr(nn, f"MaxUnpool{d}d"), 2), 1, *(2,) * d, call=unpooled)
        for d in (1, 2, 3)
    }
    | {
        f"FractionalMaxPool{d}d": of(
            partial(
                getattr(nn, f"FractionalMaxPool{d}d"),
                2,
                output_size=2,
                _random_samples=torch.full((3, 1, d), 0.4, dtype=torch.float64),
            ),
            *(1, *(4,) * d),
        )
        for d in (2, 3)
    }
)

RECURRENT = (
    {
        name: of(partial(getattr(nn, name), 2, 2, batch_first=True), 2, 2)
        for name in ("RNN", "LSTM", "GRU")
    }
    | {
        f"{name}, two ways": of(
            partial(getattr(nn, name), 1, 1, num_layers=2, bidirectional=True, batch_first=True),
            2,
            1,
        )
        for name in ("RNN", "LSTM", "GRU")
    }
    | {
        f"{name}, packed": of(partial(getattr(nn, name), 1, 2, batch_first=True), 3, 1, call=packed)
        for name in ("RNN", "LSTM", "GRU")
    }
    | {
        f"{name}Cell": of(partial(getattr(nn, f"{name}Cell"), 2, 2), 2)
        for name in ("RNN", "LSTM", "GRU")
    }
)

TRANSFORMERS = {
    "TransformerEncoderLayer": of(
        partial(nn.TransformerEncoderLayer, 2, 1, 2, 0.0, "gelu", batch_first=True), 2, 2
    ),
    "TransformerEncoder": of(
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(2, 1, 2, 0.0, "gelu", batch_first=True),
            1,
            enable_nested_tensor=False,
        ).eval(),
        *(2, 2),
    ),
    "TransformerDecoderLayer": of(
        partial(nn.TransformerDecoderLayer, 2, 1, 2, 0.0, batch_first=True), 2, 2, call=twice
    ),
    "Transformer": of(
        partial(nn.Transformer, 2, 2, 1, 1, 2, 0.0, batch_first=True), 2, 2, call=twice
    ),
    "attention": function(
        lambda h: functional.scaled_dot_product_attention(h, h.sin(), h.cos(), is_causal=True),
        *(1, 2, 2),
    ),
}

OTHERS = {
    "Linear": of(partial(nn.Linear, 3, 2), 3),
    "Bilinear": of(partial(nn.Bilinear, 2, 2, 2), 2, call=twice),
    **{
        f"Conv{d}d": of(partial(getattr(nn, f"Conv{d}d"), 1, 2, 2), 1, *(2,) * d) for d in (1, 2, 3)
    },
    **{
        f"ConvTranspose{d}d": of(partial(getattr(nn, f"ConvTranspose{d}d"), 1, 2, 2), 1, *(1,) * d)
        for d in (1, 2, 3)
    },
    "CosineSimilarity": of(nn.CosineSimilarity, 3, call=twice),
    "PairwiseDistance": of(nn.PairwiseDistance, 3, call=twice),
    "Embedding": of(partial(nn.Embedding, 4, 2), 3, call=rows),
    "Embedding, sparse": of(partial(nn.Embedding, 4, 2, sparse=True), 3, call=rows),
    **{
        f"EmbeddingBag, {mode}": of(partial(nn.EmbeddingBag, 5, 2, mode=mode), 3, call=bags)
        for mode in ("sum", "mean", "max")
    },
    "EmbeddingBag, weighed": of(partial(nn.EmbeddingBag, 5, 2, mode="sum"), 2, call=weighed_bags),
    "EmbeddingBag, offsets": of(partial(nn.EmbeddingBag, 5, 2, padding_idx=1), 2, call=offset_bags),
    "PixelShuffle": of(partial(nn.PixelShuffle, 2), 4, 1, 1),
    "Upsample": of(partial(nn.Upsample, scale_factor=2, mode="bicubic"), 1, 2, 2),
    "cdist": function(lambda h: torch.cdist(h, h.sin().flip(1)), 3, 2),
    "cdist, p=1": function(lambda h: torch.cdist(h, h.sin().flip(1), p=1.0), 2, 2),
    "cdist, p=3": function(lambda h: torch.cdist(h, h.sin().flip(1), p=3.0), 2, 2),
    "cdist to itself": function(lambda h: torch.cdist(h, h).square(), 2, 2),
    "pdist": function(functional.pdist, 2),
    "slogdet": function(lambda h: torch.linalg.slogdet(h + 2 * EYE)[1], 3, 3),
    "det": function(lambda h: torch.det(h + 2 * EYE), 3, 3),
    "solve": function(lambda h: torch.linalg.solve(h + 2 * EYE, h[:, 0]), 3, 3),
    "cholesky": function(lambda h: torch.linalg.cholesky(h @ h.mT + 2 * EYE), 3, 3),
    "eigvalsh": function(
        lambda h: torch.linalg.eigvalsh(h + h.mT + 9 * torch.diag(EYE.cumsum(1)[0])), 3, 3
    ),
}

LAYERS = ACTIVATIONS | NORMALIZATIONS | POOLINGS | RECURRENT | TRANSFORMERS | OTHERS

CLASSES = torch.tensor([0, 2, 1])
NUMBERS = torch.tensor([[0.3, -1.2, 0.8], [1.4, 0.1, -0.5], [-0.9, 0.6, 2.0]]).double()
SIGNS = NUMBERS.sign()
SHARES = NUMBERS.softmax(1)


def _ctc(output, y):
    lengths = torch.full((3,), 4), torch.full((3,), 2)
    chances = output.reshape(3, 4, 3).log_softmax(2).transpose(0, 1)
    return nn.CTCLoss()(chances, y, *lengths)


def _adaptive():
    torch.manual_seed(0)
    layer = nn.AdaptiveLogSoftmaxWithLoss(3, 3, [1], div_value=1.0).double()
    return lambda output, y: layer(output, y).loss


LOSSES = {
    "AdaptiveLogSoftmaxWithLoss": (_adaptive(), CLASSES, 3),
    "BCELoss": (lambda s, y: nn.BCELoss()(s.sigmoid(), y), SHARES, 3),
    "BCEWithLogitsLoss": (nn.BCEWithLogitsLoss(), SHARES, 3),
    "CTCLoss": (_ctc, torch.tensor([[1, 2], [2, 1], [1, 1]]), 12),
    "CosineEmbeddingLoss": (
        lambda s, y: nn.CosineEmbeddingLoss()(s, s.square(), y),
        SIGNS[:, 0].contiguous(),
        3,
    ),
    "CrossEntropyLoss": (nn.CrossEntropyLoss(label_smoothing=0.1), CLASSES, 3),
    "GaussianNLLLoss": (lambda s, y: nn.GaussianNLLLoss()(s, y, s.square() + 0.1), NUMBERS, 3),
    "HingeEmbeddingLoss": (nn.HingeEmbeddingLoss(), SIGNS, 3),
    "HuberLoss": (nn.HuberLoss(delta=0.5), NUMBERS, 3),
    "KLDivLoss": (lambda s, y: nn.KLDivLoss(reduction="batchmean")(s.log_softmax(1), y), SHARES, 3),
    "L1Loss": (lambda s, y: nn.L1Loss()(s.sin(), y), NUMBERS, 3),
    "MSELoss": (nn.MSELoss(), NUMBERS, 3),
    "MarginRankingLoss": (lambda s, y: nn.MarginRankingLoss()(s.square(), s.sin(), y), SIGNS, 3),
    "MultiLabelMarginLoss": (
        lambda s, y: nn.MultiLabelMarginLoss()(s.sin(), y),
        torch.tensor([[0, 1, -1], [2, -1, 0], [2, 1, 0]]),
        3,
    ),
    "MultiLabelSoftMarginLoss": (nn.MultiLabelSoftMarginLoss(), SHARES, 3),
    "MultiMarginLoss": (lambda s, y: nn.MultiMarginLoss()(s.sin(), y), CLASSES, 3),
    "MultiMarginLoss, p=2": (nn.MultiMarginLoss(p=2), CLASSES, 3),
    "NLLLoss": (lambda s, y: nn.NLLLoss()(s.log_softmax(1), y), CLASSES, 3),
    "PoissonNLLLoss": (nn.PoissonNLLLoss(full=True), SHARES, 3),
    "SmoothL1Loss": (nn.SmoothL1Loss(), NUMBERS, 3),
    "SoftMarginLoss": (nn.SoftMarginLoss(), SIGNS, 3),
    "TripletMarginLoss": (lambda s, y: nn.TripletMarginLoss()(s, s.square(), y), NUMBERS, 3),
    "TripletMarginWithDistanceLoss": (
        lambda s, y: nn.TripletMarginWithDistanceLoss()(s, s.square(), y),
        NUMBERS,
        3,
    ),
}

if hasattr(nn, "LinearCrossEntropyLoss"):  # newer than the oldest PyTorch that is supported
    torch.manual_seed(0)
    LOSSES["LinearCrossEntropyLoss"] = (nn.LinearCrossEntropyLoss(3, 3).double(), CLASSES, 3)

# What has nothing to differentiate, is one of the others for shapes seen first in a call, needs an
# accelerator, or only holds or moves numbers.
LEFT_OUT = [
    "Module",
    "ModuleDict",
    "ModuleList",
    "ParameterDict",
    "ParameterList",
    "Sequential",
    "Container",
    "Identity",
    "Flatten",
    "Unflatten",
    "Fold",
    "Unfold",
    "ChannelShuffle",
    "PixelUnshuffle",
    "UpsamplingBilinear2d",
    "UpsamplingNearest2d",
    "CircularPad",
    "ConstantPad",
    "ReflectionPad",
    "ReplicationPad",
    "ZeroPad",
    "Dropout",
    "AlphaDropout",
    "FeatureAlphaDropout",
    "Lazy",
    "SyncBatchNorm",
    "DataParallel",
    "RNNBase",
    "RNNCellBase",
    "NLLLoss2d",
    "TransformerDecoder",
    "Buffer",
    "Parameter",
    "Uninitialized",
    "LinearCrossEntropyOptions",
]


def build(name):
    """A network, a criterion, inputs and targets, in double precision."""
    torch.manual_seed(1)
    x = torch.randn(3, 2).double()
    if name in LAYERS:
        return LAYERS[name]().double(), smooth, x, torch.zeros(3).double()
    criterion, y, outputs = LOSSES[name]
    return Within(nn.Identity(), (outputs,)).double(), criterion, x, y

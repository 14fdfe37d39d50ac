"""One hidden layer and one output on the CPU by compiled code, where the build found a compiler.

``csrc/`` computes what :mod:`lowland.exact.by_parameters` computes for these networks, of which
ensembles are trained by the thousand, with the packed blocks

    WW (pairs of inputs x pairs of hidden units),   Wv,   vv

of each network's Hessian in one row of a tensor. Everything else, soft labels too, and every
other device takes the path through PyTorch, which gives the same numbers to rounding.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from lowland.activations import ACTIVATIONS, Activation
from lowland.exact.size import Size
from lowland.exact.terms import Architecture, Data, Quantity
from lowland.losses import LOSSES
from lowland.validation import is_binary

Packed = Float[Tensor, "networks entries"]

# Codes of kernel.c. The piecewise linear activations are one function of their slope below zero.
_ACTIVATIONS = {"sigmoid": 1, "tanh": 2, "softplus": 3, "gelu": 4, "silu": 5}
_PIECEWISE_LINEAR = 6
_LOSSES = {"bce": 0, "mse": 1}
_MODES: dict[Quantity, int] = {"moments": 0, "trace": 1, "loss": 2}

# A block's rows should stay in the second-level cache, and its run of samples be long enough to
# spread the cost of adding up vector lanes.
_BLOCK_BYTES = 1 << 20
_LONGEST_BLOCK, _SHORTEST_BLOCK, _LANES = 256, 64, 16

# Multiply-adds below which a second thread costs more to wake than it saves.
_WORTH_A_THREAD = 2_000_000


class _Problem(ctypes.Structure):
    """``Problem`` of kernel.c, field by field."""

    _fields_ = (
        ("networks", ctypes.c_int64),
        ("samples", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("hidden", ctypes.c_int64),
        ("x_start", ctypes.c_int64),
        ("x_stop", ctypes.c_int64),
        ("z_start", ctypes.c_int64),
        ("z_stop", ctypes.c_int64),
        ("x_stride", ctypes.c_int64),
        ("y_stride", ctypes.c_int64),
        ("scale_stride", ctypes.c_int64),
        ("block", ctypes.c_int64),
        ("activation", ctypes.c_int32),
        ("loss", ctypes.c_int32),
        ("mode", ctypes.c_int32),
        ("pad", ctypes.c_int32),
        ("negative_slope", ctypes.c_double),
        ("scale", ctypes.c_double),
    )


class _Share(ctypes.Structure):
    """``Share`` of kernel.c, field by field: one thread's part of the work."""

    _fields_ = (
        ("problem", _Problem),
        ("w", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("packed", ctypes.c_void_p),
        ("trace_weight", ctypes.c_void_p),
        ("square_weight", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("more", ctypes.c_void_p),
        ("start", ctypes.c_int64),
        ("stop", ctypes.c_int64),
        ("failed", ctypes.c_int64),
    )


@cache
def _library() -> ctypes.CDLL | None:
    spec = importlib.util.find_spec("lowland.exact._kernel")
    return None if spec is None or spec.origin is None else ctypes.CDLL(spec.origin)


def is_available() -> bool:
    """Whether the compiled code was built."""
    return _library() is not None


def covers(arch: Architecture, size: Size, data: Data) -> bool:
    """Whether the compiled code can take a problem; for some losses a look at all targets."""
    return (
        data.x.device.type == "cpu"
        and size.depth == 2
        and size.widths[2] == 1
        and arch.loss.name in _LOSSES
        and _activation_code(arch.activations[0]) is not None
        and LOSSES.get(arch.loss.name) is arch.loss
        and is_available()
        # It tells the two classes apart by a sign.
        and (arch.loss.name != "bce" or is_binary(data.y))
    )


def _activation_code(activation: Activation) -> int | None:
    if activation.negative_slope is not None:
        return _PIECEWISE_LINEAR
    known = ACTIVATIONS.get(activation.name) is activation
    return _ACTIVATIONS.get(activation.name) if known else None


def packed_entries(inputs: int, hidden: int, outputs: int) -> int:
    """Entries of one network's packed Hessian, of so many trained rows of ``W`` and ``v``."""
    pairs = (inputs * (inputs + 1) // 2) * (hidden * (hidden + 1) // 2)
    return pairs + inputs * hidden * outputs + outputs * outputs


def workspace_bytes(size: Size, block: int, *, linear: bool = False) -> int:
    """What one thread needs beside the packed Hessian, for blocks of so many samples."""
    return _row_count(size, linear) * block * size.itemsize + _coefficients(size) * size.itemsize


def choose_block(size: Size, limit: int, *, linear: bool = False) -> int:
    """Samples in a block so that one thread's workspace stays within a limit; 0 if none does."""
    row = _row_count(size, linear) * size.itemsize
    room = (limit - _coefficients(size) * size.itemsize) // row
    if room < _SHORTEST_BLOCK:
        return 0
    cached = max(_SHORTEST_BLOCK, _BLOCK_BYTES // row)
    return min(_LONGEST_BLOCK, cached, room) // _LANES * _LANES


def _row_count(size: Size, linear: bool) -> int:  # noqa: FBT001 - as `layout` of kernel.inc
    """Rows of a block, as ``layout`` of kernel.inc lays them out."""
    (inputs, outputs), (features, hidden, _) = size.rows, size.widths
    rows = features + 1 + 10 * hidden + outputs + 10
    if linear:
        return rows
    pairs = inputs * (inputs + 1) // 2 + hidden * (hidden + 1) // 2 + hidden * outputs
    return rows + pairs


def _coefficients(size: Size) -> int:
    """Of the backward pass, ``W`` transposed, and what lies between them to keep them aligned."""
    features, hidden, _ = size.widths
    entries = packed_entries(size.rows[0], hidden, size.rows[1])
    return entries + (features + 2) * hidden + 1 + 5 * _LANES


@dataclass(frozen=True)
class CBackend:
    """Some networks and their data, ready for the compiled code.

    Attributes:
        arch: An architecture that :func:`covers` accepts.
        weight: ``W``, ``(networks, inputs + 1, hidden)``.
        output: ``v``, ``(networks, hidden + 1)``.
        data: The samples.
        block: Samples in a block, a multiple of 16.
        quantity: What is wanted; for the trace alone the packed tensor holds the traces.
    """

    arch: Architecture
    weight: Tensor
    output: Tensor
    data: Data
    block: int
    quantity: Quantity

    @property
    def networks(self) -> int:
        """How many there are."""
        return len(self.weight)

    def moments(self) -> tuple[Tensor, Tensor, list[Packed]]:
        """``Tr H``, ``Tr H^2``, and the packed Hessians (or traces) behind them."""
        packed = self._accumulate()
        if self.quantity == "trace":
            return packed[:, 0], torch.zeros_like(packed[:, 0]), [packed]
        traces = packed.new_empty(packed.shape[0], 2)
        self._function("traces")(
            ctypes.byref(self._problem(packed.shape[0])), _pointer(packed), _pointer(traces)
        )
        return traces[:, 0], traces[:, 1], [packed]

    def _accumulate(self) -> Packed:
        networks = self.weight.shape[0]
        entries = 1 if self.quantity == "trace" else packed_entries(*self._shape())
        parts = self._parts()
        packed = self.weight.new_empty(_copies(parts), networks, entries)
        self._run(
            "accumulate_share",
            [self._share(part, out=packed[part.copy, part.networks]) for part in parts],
        )
        return self._add_up(packed)

    def gradient(
        self, trace_weight: Tensor, square_weight: Tensor, kept: Sequence[Packed]
    ) -> tuple[Tensor, Tensor]:
        """The gradient of ``trace_weight Tr H + square_weight Tr H^2`` in ``W`` and ``v``."""
        packed = (kept[0] if kept else self._accumulate()).contiguous()
        return self._pull_back(
            "gradient_share",
            packed=packed,
            trace_weight=trace_weight.contiguous(),
            square_weight=square_weight.contiguous(),
        )

    def loss_gradient(self) -> tuple[Tensor, Tensor]:
        """The gradient of the loss itself in ``W`` and ``v``."""
        return self._pull_back("loss_gradient_share")

    def _pull_back(self, name: str, **per_network: Tensor) -> tuple[Tensor, Tensor]:
        parts = self._parts()
        in_weight = self.weight.new_empty(_copies(parts), *self.weight.shape)
        in_output = self.output.new_empty(_copies(parts), *self.output.shape)
        self._run(
            name,
            [
                self._share(
                    part,
                    **{key: tensor[part.networks] for key, tensor in per_network.items()},
                    out=in_weight[part.copy, part.networks],
                    more=in_output[part.copy, part.networks],
                )
                for part in parts
            ],
        )
        return self._add_up(in_weight), self._add_up(in_output)

    def _add_up(self, copies: Tensor) -> Tensor:
        """The sum over a leading dimension, in place: PyTorch's own would need another copy."""
        for copy in copies[1:]:
            self._function("add")(ctypes.c_int64(copy.numel()), _pointer(copy), _pointer(copies[0]))
        return copies[0]

    def _shape(self) -> tuple[int, int, int]:
        rows, outputs = self.arch.rows
        return rows.stop - rows.start, self.weight.shape[2], outputs.stop - outputs.start

    def _function(self, name: str) -> Callable[..., int]:
        library = _library()
        if library is None:
            raise RuntimeError("lowland was installed without its compiled code")
        suffix = "f64" if self.weight.dtype == torch.float64 else "f32"
        function: Callable[..., int] = getattr(library, f"{name}_{suffix}")
        return function

    def _problem(self, networks: int) -> _Problem:
        arch, data = self.arch, self.data
        scale = data.scale
        return _Problem(
            networks=networks,
            samples=data.samples,
            inputs=data.x.shape[2],
            hidden=self.weight.shape[2],
            x_start=arch.rows[0].start,
            x_stop=arch.rows[0].stop,
            z_start=arch.rows[1].start,
            z_stop=arch.rows[1].stop,
            x_stride=_network_stride(data.x),
            y_stride=_network_stride(data.y),
            scale_stride=_network_stride(scale) if isinstance(scale, Tensor) else 0,
            block=min(self.block, -(-data.samples // _LANES) * _LANES),
            activation=_activation_code(arch.activations[0]),
            loss=_LOSSES[arch.loss.name],
            mode=_MODES[self.quantity],
            negative_slope=arch.activations[0].negative_slope or 0.0,
            scale=1.0 if isinstance(scale, Tensor) else scale,
        )

    def _parts(self) -> list[_Part]:
        """Cut the work for threads: by networks if there are enough, else by samples."""
        networks, samples = self.weight.shape[0], self.data.samples
        entries = packed_entries(*self._shape()) if self.quantity == "moments" else 0
        work = networks * samples * (entries + 100 * self.weight.shape[2])
        threads = min(torch.get_num_threads(), 1 + work // _WORTH_A_THREAD)
        if networks >= 2 * threads:
            return [_Part(slice(i, j), slice(0, samples), 0) for i, j in _cuts(networks, threads)]
        return [
            _Part(slice(0, networks), slice(i, j), copy)
            for copy, (i, j) in enumerate(_cuts(samples, threads))
        ]

    def _share(self, part: _Part, **tensors: Tensor) -> _Share:
        nets, samples = part.networks, part.samples
        data = self.data.of_networks(nets)
        if isinstance(data.scale, Tensor):
            tensors["scale"] = data.scale
        return _Share(
            problem=self._problem(nets.stop - nets.start),
            w=_pointer(self.weight[nets]),
            v=_pointer(self.output[nets]),
            x=_pointer(data.x),
            y=_pointer(data.y),
            start=samples.start,
            stop=samples.stop,
            **{name: _pointer(tensor) for name, tensor in tensors.items()},
        )

    def _run(self, name: str, shares: Sequence[_Share]) -> None:
        """Work on all shares side by side."""
        work, array = self._function(name), (_Share * len(shares))(*shares)
        together = len(shares) > 1 and _may_use_openmp and _start_team(work, array)
        if not together:
            # ctypes lets go of the interpreter's lock, so Python's threads will do.
            others = [_pool(len(shares)).submit(work, ctypes.byref(s)) for s in array[1:]]
            work(ctypes.byref(array[0]))
            for other in others:
                other.result()
        if any(share.failed for share in array):
            raise MemoryError("the compiled code could not allocate its workspace")


@dataclass(frozen=True)
class _Part:
    """Some samples of some networks; parts of the same networks write to copies of their own."""

    networks: slice
    samples: slice
    copy: int


def _copies(parts: Sequence[_Part]) -> int:
    return max(part.copy for part in parts) + 1


def _cuts(total: int, parts: int) -> list[tuple[int, int]]:
    parts = max(1, min(parts, total))
    edges = [total * part // parts for part in range(parts + 1)]
    return list(pairwise(edges))


def _network_stride(tensor: Tensor) -> int:
    return 0 if tensor.shape[0] == 1 else tensor[0].numel()


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def make_c_backend(  # noqa: PLR0917 - the parts of a problem, in its order
    arch: Architecture,
    weight: Tensor,
    output: Tensor,
    data: Data,
    block: int,
    quantity: Quantity,
) -> CBackend:
    """A kernel whose tensors lie in memory as the compiled code reads them."""
    scale = data.scale
    if isinstance(scale, Tensor):
        scale = scale.to(weight.dtype).contiguous()
    data = Data(data.x.contiguous(), data.y.to(weight.dtype).contiguous(), scale)
    return CBackend(arch, weight.contiguous(), output.contiguous(), data, block, quantity)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="lowland")


def _start_team(work: Callable[..., int], shares: ctypes.Array[_Share]) -> bool:
    library = _library()
    return library is not None and bool(
        library.run_together(work, shares, ctypes.c_int64(len(shares)))
    )


_may_use_openmp = True


def _forget_threads() -> None:
    """Threads do not survive a fork: a child must not wait for its parent's."""
    global _may_use_openmp  # noqa: PLW0603 - what has been forked stays so
    _may_use_openmp = False
    _pool.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)

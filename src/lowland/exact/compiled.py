"""The order "parameters" on the CPU by compiled code, where the build found a C compiler.

``csrc/`` computes what :mod:`lowland.exact.parameters` computes, with the packed blocks

    WW (pairs of inputs x pairs of hidden units),   Wv,   vv

of each network's Hessian in one row of a tensor. Everything else, and every other device, takes
the path through PyTorch, which gives the same numbers to rounding.
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
from lowland.exact.terms import Architecture, Data
from lowland.losses import LOSSES

Packed = Float[Tensor, "networks entries"]

# Codes of kernel.c. The piecewise linear activations are one function of their slope below zero.
_ACTIVATIONS = {"sigmoid": 1, "tanh": 2, "softplus": 3, "gelu": 4, "silu": 5}
_PIECEWISE_LINEAR = 6
_LOSSES = {"bce": 0, "mse": 1}
_BOTH, _TRACE_ALONE = 0, 1

# A block's rows should stay in the second-level cache, and its run of samples be long enough to
# spread the cost of adding up vector lanes.
_BLOCK_BYTES = 1 << 20
LONGEST_BLOCK, _SHORTEST_BLOCK, _LANES = 256, 64, 16

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


@cache
def _library() -> ctypes.CDLL | None:
    spec = importlib.util.find_spec("lowland.exact._kernel")
    return None if spec is None or spec.origin is None else ctypes.CDLL(spec.origin)


def is_available() -> bool:
    """Whether the compiled code was built."""
    return _library() is not None


def covers(arch: Architecture, device: torch.device) -> bool:
    """Whether the compiled code can take a problem."""
    return (
        device.type == "cpu"
        and _activation_code(arch.activation) is not None
        and LOSSES.get(arch.loss.name) is arch.loss
        and is_available()
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


def workspace_bytes(inputs: int, hidden: int, outputs: int, itemsize: int) -> int:
    """What one thread needs beside the packed Hessian: a shortest block, and coefficients."""
    rows = _rows(inputs, hidden, outputs)
    return (rows * _SHORTEST_BLOCK + packed_entries(inputs, hidden, outputs)) * itemsize


def _rows(inputs: int, hidden: int, outputs: int) -> int:
    pairs = inputs * (inputs + 1) // 2 + hidden * (hidden + 1) // 2 + hidden * outputs
    return pairs + inputs + 11 * hidden + 2 * outputs + 16


@dataclass(frozen=True)
class Kernel:
    """Some networks and their data, ready for the compiled code.

    Attributes:
        arch: An architecture that :func:`covers` accepts.
        weight: ``W``, ``(networks, inputs + 1, hidden)``.
        output: ``v``, ``(networks, hidden + 1)``.
        data: The samples.
        trace_alone: Leave ``Tr H^2`` out; the packed tensor then holds the traces.
    """

    arch: Architecture
    weight: Tensor
    output: Tensor
    data: Data
    trace_alone: bool

    def moments(self) -> tuple[Tensor, Tensor, Packed]:
        """``Tr H``, ``Tr H^2``, and the packed Hessians (or traces) behind them."""
        packed = self._accumulate()
        if self.trace_alone:
            return packed[:, 0], torch.zeros_like(packed[:, 0]), packed
        traces = packed.new_empty(packed.shape[0], 2)
        self._function("traces")(
            ctypes.byref(self._problem(packed.shape[0])), _pointer(packed), _pointer(traces)
        )
        return traces[:, 0], traces[:, 1], packed

    def _accumulate(self) -> Packed:
        networks = self.weight.shape[0]
        entries = 1 if self.trace_alone else packed_entries(*self._shape())
        shares = self._shares()
        # Networks are written apart; shares of one network's samples are added up.
        copies = len({share.samples.start for share in shares})
        packed = self.weight.new_zeros(copies, networks, entries)

        def run(share: _Share) -> int:
            return self._call(
                "accumulate", share, packed[share.copy, share.networks.start :], before=()
            )

        _run_all(run, shares)
        return packed[0] if copies == 1 else packed.sum(0)

    def gradient(
        self, trace_weight: Tensor, square_weight: Tensor, packed: Packed | None
    ) -> tuple[Tensor, Tensor]:
        """The gradient of ``trace_weight Tr H + square_weight Tr H^2`` in ``W`` and ``v``."""
        if packed is None:
            packed = self._accumulate()
        packed = packed.contiguous()
        shares = self._shares()
        copies = len({share.samples.start for share in shares})
        in_weight = self.weight.new_zeros(copies, *self.weight.shape)
        in_output = self.output.new_zeros(copies, *self.output.shape)
        trace_weight, square_weight = trace_weight.contiguous(), square_weight.contiguous()

        def run(share: _Share) -> int:
            start = share.networks.start
            return self._call(
                "gradient",
                share,
                in_weight[share.copy, start:],
                in_output[share.copy, start:],
                before=(packed[start:], trace_weight[start:], square_weight[start:]),
            )

        _run_all(run, shares)
        if copies == 1:
            return in_weight[0], in_output[0]
        return in_weight.sum(0), in_output.sum(0)

    def _shape(self) -> tuple[int, int, int]:
        rows, outputs = self.arch.input_rows, self.arch.output_rows
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
        rows = _rows(*self._shape()) * self.weight.element_size()
        block = min(LONGEST_BLOCK, max(_SHORTEST_BLOCK, _BLOCK_BYTES // rows), data.samples)
        scale = data.scale
        return _Problem(
            networks=networks,
            samples=data.samples,
            inputs=data.x.shape[2],
            hidden=self.weight.shape[2],
            x_start=arch.input_rows.start,
            x_stop=arch.input_rows.stop,
            z_start=arch.output_rows.start,
            z_stop=arch.output_rows.stop,
            x_stride=_network_stride(data.x),
            y_stride=_network_stride(data.y),
            scale_stride=_network_stride(scale) if isinstance(scale, Tensor) else 0,
            block=-(-block // _LANES) * _LANES,
            activation=_activation_code(arch.activation),
            loss=_LOSSES[arch.loss.name],
            mode=_TRACE_ALONE if self.trace_alone else _BOTH,
            negative_slope=arch.activation.negative_slope or 0.0,
            scale=1.0 if isinstance(scale, Tensor) else scale,
        )

    def _shares(self) -> list[_Share]:
        """Cut the work for threads: by networks if there are enough, else by samples."""
        networks, samples = self.weight.shape[0], self.data.samples
        work = networks * samples * (packed_entries(*self._shape()) + 100 * self.weight.shape[2])
        threads = min(torch.get_num_threads(), 1 + work // _WORTH_A_THREAD)
        if networks >= 2 * threads:
            return [_Share(slice(i, j), slice(0, samples), 0) for i, j in _cuts(networks, threads)]
        return [
            _Share(slice(0, networks), slice(i, j), copy)
            for copy, (i, j) in enumerate(_cuts(samples, threads))
        ]

    def _call(self, name: str, share: _Share, *results: Tensor, before: Sequence[Tensor]) -> int:
        nets, samples = share.networks, share.samples
        data = self.data.of_networks(nets)
        scale = data.scale
        return self._function(name)(
            ctypes.byref(self._problem(nets.stop - nets.start)),
            _pointer(self.weight[nets]),
            _pointer(self.output[nets]),
            _pointer(data.x),
            _pointer(data.y),
            _pointer(scale) if isinstance(scale, Tensor) else None,
            ctypes.c_int64(samples.start),
            ctypes.c_int64(samples.stop),
            *(_pointer(tensor) for tensor in (*before, *results)),
        )


@dataclass(frozen=True)
class _Share:
    networks: slice
    samples: slice
    copy: int


def _cuts(total: int, parts: int) -> list[tuple[int, int]]:
    parts = max(1, min(parts, total))
    edges = [total * part // parts for part in range(parts + 1)]
    return list(pairwise(edges))


def _network_stride(tensor: Tensor) -> int:
    return 0 if tensor.shape[0] == 1 else tensor[0].numel()


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def make_kernel(
    arch: Architecture, weight: Tensor, output: Tensor, data: Data, *, trace_alone: bool
) -> Kernel:
    """A kernel whose tensors lie in memory as the compiled code reads them."""
    scale = data.scale
    if isinstance(scale, Tensor):
        scale = scale.to(weight.dtype).contiguous()
    data = Data(data.x.contiguous(), data.y.to(weight.dtype).contiguous(), scale)
    return Kernel(arch, weight.contiguous(), output.contiguous(), data, trace_alone)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="lowland")


def _run_all(run: Callable[[_Share], int], shares: list[_Share]) -> None:
    """Run all shares, the first one in this thread; ctypes lets them run side by side."""
    others = [_pool(torch.get_num_threads()).submit(run, share) for share in shares[1:]]
    failed = [run(shares[0]), *(other.result() for other in others)]
    if any(failed):
        raise MemoryError("the compiled code could not allocate its workspace")


# Threads do not survive a fork: a child must not wait for its parent's.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)

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
from functools import cache, lru_cache
from itertools import pairwise

import torch
from jaxtyping import Float, Int
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

# A chunk's rows should stay in the second-level cache, and be long enough to spread the cost of
# adding up vector lanes.
_CHUNK_BYTES = 1 << 20
_LONGEST_CHUNK, _SHORTEST_CHUNK, _LANES = 256, 64, 16

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
        ("chunk", ctypes.c_int64),
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
    """The compiled code, loaded once; None where it was not built."""
    spec = importlib.util.find_spec("lowland.exact._kernel")
    return None if spec is None or spec.origin is None else ctypes.CDLL(spec.origin)


def is_available() -> bool:
    """Whether the compiled code was built."""
    return _library() is not None


def covers(arch: Architecture, size: Size, data: Data) -> bool:
    """Whether the compiled code can take a problem.

    For binary cross-entropy that takes a look at all targets.
    """
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
    """What kernel.c calls an activation; None for one that it does not know.

    An activation of the user's that merely has a known one's name is not known.
    """
    if activation.negative_slope is not None:
        return _PIECEWISE_LINEAR
    known = ACTIVATIONS.get(activation.name) is activation
    return _ACTIVATIONS.get(activation.name) if known else None


def packed_entries(inputs: int, hidden: int, outputs: int) -> int:
    """Entries of one network's packed Hessian, of so many trained rows of ``W`` and ``v``."""
    pairs = (inputs * (inputs + 1) // 2) * (hidden * (hidden + 1) // 2)
    return pairs + inputs * hidden * outputs + outputs * outputs


@lru_cache(64)
def _places(inputs: int, hidden: int, outputs: int) -> Int[Tensor, "dim dim"]:
    """Where each entry of ``H`` stands in its packed row: ``W`` row by row, and then ``v``."""
    ww = _symmetric(inputs)[:, None, :, None] * (hidden * (hidden + 1) // 2)
    ww = (ww + _symmetric(hidden)[:, None]).flatten(2).flatten(0, 1)
    start = packed_entries(inputs, hidden, 0)
    wv = start + torch.arange(len(ww) * outputs).view(len(ww), outputs)
    vv = start + wv.numel() + torch.arange(outputs * outputs).view(outputs, outputs)
    return torch.cat([torch.cat([ww, wv], 1), torch.cat([wv.T, vv], 1)])


def _symmetric(count: int) -> Int[Tensor, "count count"]:
    """The places of a symmetric matrix's entries, packed row by row from the diagonal on."""
    first, second = torch.triu_indices(count, count)
    result = torch.empty(count, count, dtype=torch.int64)
    result[first, second] = result[second, first] = torch.arange(len(first))
    return result


def workspace_bytes(size: Size, chunk: int, *, trace_alone: bool = False) -> int:
    """What one thread needs beside the packed Hessian, for chunks of so many samples."""
    floats = _floats_per_sample(size, trace_alone=trace_alone) * chunk + _floats_beside(size)
    return floats * size.itemsize


def choose_chunk(size: Size, limit: int, *, trace_alone: bool = False) -> int:
    """Samples in a chunk so that one thread's workspace stays within a limit; 0 if none does."""
    per_sample = _floats_per_sample(size, trace_alone=trace_alone) * size.itemsize
    room = (limit - _floats_beside(size) * size.itemsize) // per_sample
    if room < _SHORTEST_CHUNK:
        return 0
    cached = max(_SHORTEST_CHUNK, _CHUNK_BYTES // per_sample)
    return min(_LONGEST_CHUNK, cached, room) // _LANES * _LANES


def _floats_per_sample(size: Size, *, trace_alone: bool) -> int:
    """Rows of a chunk, each of one number a sample, as ``layout`` of kernel.inc has them."""
    (inputs, outputs), (features, hidden, _) = size.rows, size.widths
    # [1; x]; [1; z] and its adjoint; a, three derivatives of phi, u, c, the adjoints of a and u; q
    # times the trained rows of z; eight of the loss.
    rows = features + 1 + 10 * hidden + outputs + 10
    if trace_alone:
        return rows
    # Pairs of x, the packed S, and R.
    pairs = inputs * (inputs + 1) // 2 + hidden * (hidden + 1) // 2 + hidden * outputs
    return rows + pairs


def _floats_beside(size: Size) -> int:
    """A workspace's numbers that are the same for all samples: ``C``, ``W`` transposed, sums of v.

    They are five arrays, and each is padded so that the next begins at a full vector.
    """
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
        chunk: Samples in a chunk, a multiple of 16.
        quantity: What is wanted; for the trace alone the packed tensor holds the traces.
    """

    arch: Architecture
    weight: Tensor
    output: Tensor
    data: Data
    chunk: int
    quantity: Quantity

    @property
    def networks(self) -> int:
        """The number of networks."""
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
        """The packed Hessians summed over samples, or the traces where nothing else is wanted."""
        networks = self.weight.shape[0]
        entries = 1 if self.quantity == "trace" else packed_entries(*self._shape())
        ranges = self._ranges()
        packed = self.weight.new_empty(_copies(ranges), networks, entries)
        self._run(
            "accumulate_share",
            [self._share(each, out=packed[each.copy, each.networks]) for each in ranges],
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

    def hessian(self) -> Float[Tensor, "networks dim dim"]:
        """``H`` itself, the parameters as in :func:`lowland.exact.blocks.dense`."""
        return self._accumulate()[:, _places(*self._shape())]

    def contraction(self, matrix: Float[Tensor, "networks dim dim"]) -> tuple[Tensor, Tensor]:
        r"""The gradient of :math:`\langle C, H\rangle` in ``W`` and ``v`` for a constant ``C``.

        Args:
            matrix: ``C``, symmetric, the parameters as in :meth:`hessian`.
        """
        places = _places(*self._shape()).flatten()
        # The compiled code contracts with C = 2 b H, given H as packed. Entries of C need not be
        # equal where those of H are: there only their mean counts.
        packed = matrix.new_zeros(len(matrix), packed_entries(*self._shape()))
        packed.index_add_(1, places, matrix.flatten(1)).div_(places.bincount())
        nothing = matrix.new_zeros(len(matrix))
        return self.gradient(nothing, torch.full_like(nothing, 0.5), [packed])

    def loss_gradient(self) -> tuple[Tensor, Tensor]:
        """The gradient of the loss itself in ``W`` and ``v``."""
        return self._pull_back("loss_gradient_share")

    def _pull_back(self, name: str, **per_network: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient in ``W`` and ``v`` that a function of the compiled code finds."""
        ranges = self._ranges()
        in_weight = self.weight.new_empty(_copies(ranges), *self.weight.shape)
        in_output = self.output.new_empty(_copies(ranges), *self.output.shape)
        self._run(
            name,
            [
                self._share(
                    each,
                    **{key: tensor[each.networks] for key, tensor in per_network.items()},
                    out=in_weight[each.copy, each.networks],
                    more=in_output[each.copy, each.networks],
                )
                for each in ranges
            ],
        )
        return self._add_up(in_weight), self._add_up(in_output)

    def _add_up(self, copies: Tensor) -> Tensor:
        """The sum over a leading dimension, in place: PyTorch's own would need another copy."""
        for copy in copies[1:]:
            self._function("add")(ctypes.c_int64(copy.numel()), _pointer(copy), _pointer(copies[0]))
        return copies[0]

    def _shape(self) -> tuple[int, int, int]:
        """Trained rows of ``W``, hidden units, trained rows of ``v``."""
        rows, outputs = self.arch.rows
        return rows.stop - rows.start, self.weight.shape[2], outputs.stop - outputs.start

    def _function(self, name: str) -> Callable[..., int]:
        """A function of the compiled code, for numbers of the weights' type."""
        library = _library()
        if library is None:
            raise RuntimeError("lowland was installed without its compiled code")
        suffix = "f64" if self.weight.dtype == torch.float64 else "f32"
        function: Callable[..., int] = getattr(library, f"{name}_{suffix}")
        return function

    def _problem(self, networks: int) -> _Problem:
        """The description, as kernel.c reads it, of so many of the networks."""
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
            chunk=min(self.chunk, -(-data.samples // _LANES) * _LANES),
            activation=_activation_code(arch.activations[0]),
            loss=_LOSSES[arch.loss.name],
            mode=_MODES[self.quantity],
            negative_slope=arch.activations[0].negative_slope or 0.0,
            scale=1.0 if isinstance(scale, Tensor) else scale,
        )

    def _ranges(self) -> list[_Range]:
        """Cut the work for threads: by networks if there are enough, else by samples."""
        networks, samples = self.weight.shape[0], self.data.samples
        entries = packed_entries(*self._shape()) if self.quantity == "moments" else 0
        # In multiply-adds, of which a hidden unit costs hundreds (see PRICES of plan.py).
        work = networks * samples * (entries + 100 * self.weight.shape[2])
        threads = min(torch.get_num_threads(), 1 + work // _WORTH_A_THREAD)
        if networks >= 2 * threads:
            return [_Range(slice(i, j), slice(0, samples), 0) for i, j in _cuts(networks, threads)]
        return [
            _Range(slice(0, networks), slice(i, j), copy)
            for copy, (i, j) in enumerate(_cuts(samples, threads))
        ]

    def _share(self, taken: _Range, **tensors: Tensor) -> _Share:
        """One thread's part of the work, as the compiled code reads it."""
        nets, samples = taken.networks, taken.samples
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
        together = len(shares) > 1 and _may_use_openmp and _work_as_team(work, array)
        if not together:
            # ctypes lets go of the interpreter's lock, so Python's threads will do.
            others = [_pool(len(shares)).submit(work, ctypes.byref(s)) for s in array[1:]]
            work(ctypes.byref(array[0]))
            for other in others:
                other.result()
        if any(share.failed for share in array):
            raise MemoryError("the compiled code could not allocate its workspace")


@dataclass(frozen=True)
class _Range:
    """Some samples of some networks, for one thread.

    Threads that share networks write to copies of the result, which are added up.
    """

    networks: slice
    samples: slice
    copy: int


def _copies(ranges: Sequence[_Range]) -> int:
    """How many copies of the result the threads write to."""
    return max(each.copy for each in ranges) + 1


def _cuts(total: int, threads: int) -> list[tuple[int, int]]:
    """``range(total)`` in intervals of about equal length, at most one a thread."""
    count = max(1, min(threads, total))
    edges = [total * index // count for index in range(count + 1)]
    return list(pairwise(edges))


def _network_stride(tensor: Tensor) -> int:
    """Numbers from one network's data to the next's: none where all share them."""
    return 0 if tensor.shape[0] == 1 else tensor[0].numel()


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def make_c_backend(  # noqa: PLR0917 - the parts of a problem, in its order
    arch: Architecture,
    weight: Tensor,
    output: Tensor,
    data: Data,
    chunk: int,
    quantity: Quantity,
) -> CBackend:
    """A backend whose tensors lie in memory as the compiled code reads them."""
    scale = data.scale
    if isinstance(scale, Tensor):
        scale = scale.to(weight.dtype).contiguous()
    data = Data(data.x.contiguous(), data.y.to(weight.dtype).contiguous(), scale)
    return CBackend(arch, weight.contiguous(), output.contiguous(), data, chunk, quantity)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads of Python's, kept from call to call."""
    return ThreadPoolExecutor(threads, thread_name_prefix="lowland")


def _work_as_team(work: Callable[..., int], shares: ctypes.Array[_Share]) -> bool:
    """Work on all shares by PyTorch's OpenMP threads; False, with nothing done, without them."""
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

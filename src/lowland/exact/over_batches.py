r"""The closed form over batches of samples, and over the samples of several processes.

``H`` is a sum over samples, so that its blocks add up over batches of any kind; ``Tr H^2`` does
not, and is taken of the whole blocks at the end. One pass in the memory of the blocks; the gradient
:math:`\nabla \langle C, H \rangle` with :math:`C = a I + 2 b H` takes another pass, each batch by
itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import chain
from typing import Any, ClassVar, Literal

import torch
import torch.distributed
from torch import Tensor, nn
from torch.autograd import Function, grad

from lowland._batches import Batch, as_batches, checked, digest, tensors, to_device
from lowland._layers import is_plain_sequence
from lowland._limits import MEBIBYTE
from lowland._weights import Count, Weights
from lowland.errors import UnsupportedModelError
from lowland.estimation import Estimation
from lowland.exact import blocks
from lowland.exact.by_parameters import Tiles, traces
from lowland.exact.engine import ExactEngine
from lowland.exact.kept import Kept
from lowland.exact.plan import cost, gradient_cost
from lowland.exact.setup import Setup
from lowland.exact.tail import holds_all
from lowland.exact.torch_backend import TorchBackend
from lowland.moments import HessianMoments
from lowland.objective import Objective
from lowland.passes import unsteady


@dataclass(eq=False)
class Pass:
    """What one pass over the batches has seen.

    Attributes:
        weigh: What the batches count.
        tiles: Of the weighted sum of the batches' Hessians.
        batches: How many there were.
        marks: Sums of all numbers of the data and of their squares, whatever the batches' order.
        seen: A digest of the batches, in their order.
    """

    weigh: Weights
    tiles: Tiles = field(default_factory=list)
    batches: int = 0
    marks: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))
    seen: bytes = b""


@dataclass(eq=False)
class OverBatches:
    """The closed form of a loss on all batches of some data.

    Attributes:
        target: The loss, whose own batch is not looked at.
        data: What gives the batches.
        first: The batches of the first pass, which may have begun already.
        settings: The memory budget.
        count: What a batch counts, as for :func:`lowland.hessian_moments`.
        kept: Where a pass is kept, to go on after an interruption; None for nowhere.
        is_differentiable: Whether gradients were enabled when moments were asked for.
    """

    target: Objective
    data: object
    first: Iterable[Batch]
    settings: Estimation
    setup: Setup
    count: Count | None = None
    kept: Kept | None = None
    is_differentiable: bool = False
    name: ClassVar[Literal["exact"]] = "exact"

    @classmethod
    def begin(
        cls,
        target: Objective,
        data: object,
        settings: Estimation,
        count: Count | None = None,
        path: str | os.PathLike[str] | None = None,
    ) -> OverBatches:
        """The first batch is drawn and read, in each process that takes part.

        Raises:
            UnsupportedModelError, TypeError, ValueError: As :func:`read_batch`, or if the data are
                none.
            ValueError, RuntimeError: If other processes' models are others, or refused.
        """
        with together(target) as say:
            stream = checked(as_batches(data, again=False))
            x, y = next(stream)
            setup = read_batch(_on(target, x, y), settings)
            say(_kind(setup))
        kept = None if path is None else Kept(_own_path(target, path))
        return cls(target, data, chain([(x, y)], stream), settings, setup, count, kept)

    @classmethod
    def attempt(
        cls, target: Objective, data: object, settings: Estimation, count: Count | None, most: float
    ) -> tuple[OverBatches | None, object]:
        """:meth:`begin` where the closed form covers the loss and costs so many gradients at most.

        Returns:
            That, or None; and data whose first pass gives all batches, whatever has been drawn.
        """
        model = target.model
        may_be = type(model) is nn.Linear or is_plain_sequence(model) or holds_all(target)
        if not may_be:
            return None, data
        setup: Setup | None = None
        with together(target):
            stream = checked(as_batches(data, again=False))
            x, y = next(stream)
            with suppress(UnsupportedModelError):
                setup = read_batch(_on(target, x, y), settings)
        batches = chain([(x, y)], stream)
        pays = setup is not None and (
            cost(setup.size, "parameters") <= most * gradient_cost(setup.size)
        )
        everywhere = all(_gathered(target, int(pays)))
        if setup is None or not everywhere:
            return None, batches
        with together(target) as say:
            say(_kind(setup))
        return cls(target, data, batches, settings, setup, count), batches

    def moments(self, count: int = 2) -> HessianMoments:
        """``Tr H`` and ``Tr H^2``, with gradients in the parameters where these are enabled.

        A gradient goes over the data once more, so that these must be there again. Of several
        processes each has the gradient of its own samples' share, times the number of processes:
        the whole is the mean, as ``DistributedDataParallel`` takes it of the loss's gradients.

        Raises:
            UnsupportedModelError: If more than two moments are asked for.
        """
        if count > 2:
            raise UnsupportedModelError(
                "over batches and processes the closed form gives two moments; use moments=2, or "
                "pass all samples as tensors x and y"
            )
        self.is_differentiable = torch.is_grad_enabled()
        reachable = [*self.target.parameters, *self.target.others]
        first, second = _Moments.apply(self, *reachable)  # type: ignore[no-untyped-call]
        target = self.target
        return HessianMoments(target.dim, first, second, method="exact", matrix=target.matrix)

    def loss_and_moments(self, count: int = 2) -> tuple[Tensor, HessianMoments]:
        """The loss of a step beside them."""
        return self.target.step_loss(), self.moments(count)

    def accumulate(self) -> Pass:
        """The first pass, over this process's batches; from where it was interrupted."""
        done = Pass(Weights(self.target, self.count))
        resumed = self.kept.resume(self._key()) if self.kept else None
        for x, y in self.first:
            weight = self._count_in(done, x, y)
            if resumed is not None and done.batches <= resumed.batches:
                if done.batches == resumed.batches:
                    resumed.check(done.seen)
                    done.tiles = [(t, each.to(self.target.device)) for t, each in resumed.tiles]
                continue
            if not weight:  # all of its targets are ignored
                continue
            setup = read_batch(_on(self.target, x, y), self.settings)
            found = self._whole(setup, _tiles)
            if not done.tiles:
                done.tiles = [(tile, weight * values) for tile, values in found]
            else:
                for (_, total), (_, values) in zip(done.tiles, found, strict=True):
                    total.add_(values, alpha=weight)
            del found
            if self.kept:
                self.kept.keep(self._key(), done.batches, done.seen, done.tiles)
        if resumed is not None and done.batches < resumed.batches:
            raise ValueError(
                f"the data ended after {done.batches} batches, and the pass that is kept in "
                f"{self.kept and self.kept.path!r} had seen {resumed.batches}: it is of other "
                "data; delete the file to start anew"
            )
        return done

    def gradient(
        self, first: Pass, total: float, tiles: Tiles, slopes: tuple[Tensor, Tensor]
    ) -> list[Tensor]:
        """The second pass: the gradient of a combination of both moments in all parameters."""
        if isinstance(self.data, Iterator) and not hasattr(self.data, "__len__"):
            raise RuntimeError(
                "a gradient of moments over batches goes over the data once more, which "
                f"{type(self.data).__name__} gives but once: use the DataLoader itself, or "
                "list(data); or torch.no_grad() for the moments alone"
            )
        again = Pass(Weights(self.target, self.count))
        parameters = [*self.target.parameters, *self.target.others]
        result = [torch.zeros_like(p) for p in parameters]
        values = [each for _, each in tiles]
        by_trace, by_square = (slope.reshape(1) for slope in slopes)
        for x, y in checked(as_batches(self.data)):
            weight = self._count_in(again, x, y)
            if not weight:
                continue
            with torch.enable_grad():
                setup = read_batch(_on(self.target, x, y), self.settings)
            found = self._whole(
                setup, lambda backend: backend.gradient(by_trace, by_square, values)
            )
            outputs = [*setup.weights, *([setup.data.x] if setup.data.inputs_vary else [])]
            pairs = [(o, g) for o, g in zip(outputs, found, strict=True) if o.requires_grad]
            parts = grad(
                [output for output, _ in pairs],
                parameters,
                [slope.view_as(output) for output, slope in pairs],
                materialize_grads=True,
            )
            share = weight / total * processes(self.target)
            torch._foreach_add_(result, list(parts), alpha=share)
        same = torch.allclose(again.marks, first.marks, rtol=1e-9, atol=0)
        if (again.batches, same) != (first.batches, True):
            raise RuntimeError(
                f"the data gave {first.batches} batches in the pass for the moments and "
                f"{again.batches} in that for their gradient, or other samples: give the same "
                "ones in each pass, without random augmentation or drop_last with shuffle"
            )
        return result

    def _whole(self, setup: Setup, compute: Callable[[TorchBackend], Any]) -> Any:
        """What is computed of a batch with all blocks of ``H`` held at a time."""
        needed = (blocks.entries(setup.size) + 6 * setup.size.dim) * setup.size.itemsize
        room = max(16 * needed, self.settings.memory_budget)
        problem = setup.problem("parameters", room, compiled=False)
        usual = setup.problem("parameters", self.settings.memory_budget, compiled=False)
        chunk = min(problem.plan.chunk, usual.plan.chunk)
        problem = replace(problem, plan=replace(problem.plan, chunk=chunk))
        with torch.no_grad():
            (found,) = problem.on_torch(setup.weights, compute)
        return found

    def _count_in(self, done: Pass, x: Any, y: Any) -> float:
        """Note that a batch has come; what it counts."""
        done.batches += 1
        for value in tensors((x, y)):
            if value.requires_grad and self.is_differentiable:
                raise UnsupportedModelError(
                    "moments over batches have no gradients in the data: use x.detach(), or pass "
                    "all samples as tensors x and y"
                )
            wide = value.detach().double()
            sums = torch.stack([wide.sum(), wide.abs().sum(), wide.square().sum()])
            done.marks += sums.cpu()
        if self.kept:
            done.seen = blake2b(done.seen + repr(digest((x, y))).encode()).digest()
        return done.weigh(x, y)

    def _key(self) -> bytes:
        """What a kept pass belongs to."""
        target = self.target
        criterion = repr(target.criterion), digest(getattr(target.criterion, "__dict__", {}))
        # A function says where it lies in memory, which another process does not share.
        count = getattr(self.count, "__qualname__", self.count)
        whole = (target.names, target.matrix, count, criterion)
        numbers = {**dict(target.model.named_parameters()), **dict(target.model.named_buffers())}
        return blake2b(repr((whole, repr(target.model), digest(numbers))).encode()).digest()


def read_batch(part: Objective, settings: Estimation) -> Setup:
    """What computes with one batch.

    Raises:
        UnsupportedModelError: If the closed form does not cover it, the model is another function
            in each call, or the blocks of ``H`` exceed the memory budget.
    """
    for name, layer in part.model.named_modules():
        if what := unsteady(layer):
            raise UnsupportedModelError(
                f"the closed form over batches takes one and the same function, and {name!r} of "
                f"the model {what}: call model.eval() first"
            )
    setup = ExactEngine.read(part, settings).setup
    # The blocks, those of one batch, and what is made of them.
    needed = 3 * blocks.entries(setup.size) * setup.size.itemsize
    if needed > settings.memory_budget:
        raise UnsupportedModelError(
            f"a memory budget of {settings.memory_budget / MEBIBYTE:.3g} MiB is too small: over "
            f"batches all blocks of the Hessian of {setup.size.dim} parameters are held, which "
            f"takes {needed / MEBIBYTE:.3g} MiB; raise memory_budget"
        )
    return setup


def _on(target: Objective, x: Any, y: Any) -> Objective:
    return target.on((to_device(x, target.device), to_device(y, target.device)))


def _tiles(backend: TorchBackend) -> Tiles:
    (tiles,) = backend.tiles()
    return tiles


class _Moments(Function):
    """Both moments, whose backward pass goes over the data once more."""

    @staticmethod
    def forward(ctx: Any, over: OverBatches, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        with together(over.target):
            done = over.accumulate()
        total = _add_over_processes(over, done)
        for _, values in done.tiles:
            values.div_(total)
        first, second = traces(over.setup.size, done.tiles)
        ctx.save_for_backward(*(values for _, values in done.tiles), *parameters)
        ctx.over, ctx.done, ctx.total = over, done, total
        ctx.tiles, done.tiles = [tile for tile, _ in done.tiles], []
        if over.kept:
            over.kept.remove()
        return first.squeeze(0), second.squeeze(0)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        values = ctx.saved_tensors[: len(ctx.tiles)]
        tiles = list(zip(ctx.tiles, values, strict=True))
        found = ctx.over.gradient(ctx.done, ctx.total, tiles, (slopes[0], slopes[1]))
        return None, *found


# Several processes


@contextmanager
def together(target: Objective) -> Iterator[Callable[[str], None]]:
    """What each of the model's processes does before they meet; if one fails none waits for it.

    Yields:
        What says in words that all processes must share.

    Raises:
        RuntimeError: If it has failed in another process.
        ValueError: If the processes do not say the same.
    """
    said: list[str] = []
    try:
        yield said.append
    except Exception:
        _gathered(target, 0)
        raise
    # A number of 62 bits for the words, never that of a failure.
    number = int.from_bytes(blake2b("".join(said).encode(), digest_size=8).digest()) >> 2 or 1
    numbers = _gathered(target, number)
    if 0 in numbers:
        raise RuntimeError(
            f"process {numbers.index(0)} refused its model or data, with an error of its own"
        )
    if len(set(numbers)) > 1:
        raise ValueError(
            "the processes have models of different architectures, or other losses; got "
            f"{''.join(said)} in process {torch.distributed.get_rank()}: give all the same one"
        )


def _gathered(target: Objective, number: int) -> list[int]:
    """A number of each process; of a single process its own."""
    if target.parallel is None:
        return [number]
    group = target.parallel.process_group
    own = torch.tensor([number], device=target.device)
    found = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(found, own, group=group)
    return [int(each) for each in found]


def _add_over_processes(over: OverBatches, done: Pass) -> float:
    """Add up the blocks of all processes, in place; what their sum is to be divided by.

    A sum over samples is divided by the number of processes, as its gradients are.
    """
    parallel = over.target.parallel
    if parallel is None:
        return done.weigh.total
    size, like = over.setup.size, over.setup.weights[0]
    if not done.tiles:  # all of this process's targets are ignored
        zero = [(t, like.new_zeros(1, *blocks.shape(size, t))) for t in blocks.blocks(size)]
        done.tiles = [(tile, values.detach()) for tile, values in zero]
    group = parallel.process_group
    counted = torch.tensor([done.weigh.sum], dtype=torch.float64, device=over.target.device)
    for values in (counted, *(values for _, values in done.tiles)):
        torch.distributed.all_reduce(values, group=group)
    done.weigh.sum = float(counted)
    total = done.weigh.total
    return total * processes(over.target) if done.weigh.is_sum else total


def processes(target: Objective) -> int:
    """In how many the model is trained side by side."""
    parallel = target.parallel
    return torch.distributed.get_world_size(parallel.process_group) if parallel else 1


def _own_path(target: Objective, path: str | os.PathLike[str]) -> str:
    """Each process keeps its own pass."""
    if target.parallel is None:
        return os.fspath(path)
    return f"{os.fspath(path)}.{torch.distributed.get_rank(target.parallel.process_group)}"


def _kind(setup: Setup) -> str:
    """What the networks of all processes must share."""
    arch, size = setup.arch, setup.size
    names = ", ".join(activation.name for activation in arch.activations)
    rows = [(part.start, part.stop) for part in arch.rows]
    return (
        f"widths {size.widths}, activations ({names}), loss {arch.loss.name!r} of the "
        f"{arch.matrix}, trained rows {rows}, {size.itemsize} bytes a number"
    )

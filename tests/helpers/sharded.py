"""Where two processes share parameters; no test module, so spawning finds it."""

import parallel_training
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import lowland

CRITERION = nn.BCEWithLogitsLoss()


def _copies(model):
    names = ("copies", "shards")
    return fully_shard(model, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=names))


def _nested(model):
    fully_shard(model[0])
    fully_shard(model[2])
    return fully_shard(model)


def _tensor_parallel(model):
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    return parallelize_module(model, init_device_mesh("cpu", (2,)), plan)


def _flat(model, *, originals=False):
    return FullyShardedDataParallel(model, use_orig_params=originals, device_id=torch.device("cpu"))


SHARDINGS = {
    "shards": fully_shard,
    "nested": _nested,
    "copies": _copies,
    "tensor parallel": _tensor_parallel,
}
FLAT = {"flat": _flat, "flat originals": lambda model: _flat(model, originals=True)}


def sam_of(model, **settings):
    return lowland.SAM(model.parameters(), torch.optim.SGD, 0.3, lr=0.5, momentum=0.9, **settings)


def train(rank, sharding, adaptive, way, **settings):
    """Three steps, and the whole weights that result; or what was said instead."""
    model, x, y = parallel_training.problem()
    model = SHARDINGS[sharding](model)
    if sharding != "tensor parallel":
        x, y = x[rank::2], y[rank::2]
    sam = sam_of(model, adaptive=adaptive, **settings)

    def closure(part=None):
        if way in ("zero", "zero in place"):
            sam.zero_grad(set_to_none=way == "zero")
        some_x, some_y = (x, y) if part is None else (x.chunk(2)[part], y.chunk(2)[part])
        loss = CRITERION(model(some_x), some_y)
        loss.backward()
        return loss

    try:
        for _ in range(3):
            if way == "zero before":
                sam.zero_grad(set_to_none=False)
            if way == "scaler":
                sam.step(closure, scaler=torch.amp.GradScaler("cpu"))
            else:
                sam.step(closure, micro_batches=2 if way == "micro-batches" else None)
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    weights = {name: p.full_tensor().detach() for name, p in model.named_parameters()}
    if sam.curvature is not None:
        weights["curvature"] = sam.curvature
    if settings.get("every"):
        take_up(sam, sam_of(model, adaptive=adaptive, **settings))
    return weights


def take_up(sam, fresh):
    """A state of shards goes to another optimizer of theirs."""
    fresh.load_state_dict(sam.state_dict())
    for p, unit in sam._orthogonal.unit.items():
        assert type(unit) is type(p.data)
        assert fresh._orthogonal.unit[p].full_tensor().equal(unit.full_tensor())


def trainings(rank, cases):
    return [train(rank, *case, **settings) for *case, settings in cases]


def calls_of(model, x, y):
    def audited():
        unseen = torch.randn_like(x)
        return lowland.audit(model, CRITERION, x, y, x_unseen=unseen, pairs=False)

    calls = {
        f"moments {method}": lambda method=method: lowland.hessian_moments(
            model, CRITERION, x, y, method
        )
        for method in ("auto", "exact", "probes", "dense")
    }
    calls["loader"] = lambda: lowland.hessian_moments(model, CRITERION, [(x, y)])
    for penalty in (lowland.HSR, lowland.HessianTrace, lowland.FlatnessAware):
        calls[penalty.__name__] = lambda penalty=penalty: penalty(CRITERION, 0.1)(model, x, y)
        calls[f"{penalty.__name__}.loss"] = lambda penalty=penalty: penalty(CRITERION, 0.1).loss(
            model, x, y
        )
    calls["spectrum"] = lambda: lowland.spectrum(model, CRITERION, (x, y), k=2)
    calls["layer_spectra"] = lambda: lowland.layer_spectra(model, CRITERION, (x, y))
    calls["surface"] = lambda: lowland.surface(model, CRITERION, (x, y), points=3)
    calls["eigenvalues_over"] = lambda: lowland.eigenvalues_over(
        model, CRITERION, (x, y), [parallel_training.problem()[0].state_dict()]
    )
    calls["audit"] = audited
    calls["rescale"] = lambda: lowland.rescale(model, 0, 2.0)
    calls["permute"] = lambda: lowland.permute(model, 0, torch.arange(6).flip(0))
    return calls


def measurements(rank):
    """What each call says of each sharding, and what comes out once the weights are gathered."""
    said, gathered = {}, {}
    kinds = FLAT | {name: SHARDINGS[name] for name in ("shards", "tensor parallel")}
    for name, shard in kinds.items():
        model, x, y = parallel_training.problem()
        model = shard(model)
        for call, ask in calls_of(model, x, y).items():
            try:
                ask()
            except Exception as error:  # noqa: BLE001 - to be looked at by the test
                said[name, call] = f"{type(error).__name__}: {error}"
            else:
                said[name, call] = "nothing"
        options = StateDictOptions(full_state_dict=True)
        whole, *_ = parallel_training.problem()
        nn.init.zeros_(whole[0].weight)
        whole.load_state_dict(get_model_state_dict(model, options=options))
        gathered[name] = lowland.hessian_moments(whole, CRITERION, x, y).trace.detach()
    flat = {}
    for name, shard in FLAT.items():
        late, *_ = parallel_training.problem()
        sam = sam_of(late)
        for when in ("before", "after"):
            model = shard(late if when == "before" else parallel_training.problem()[0])
            try:
                if when == "after":
                    sam = sam_of(model)
                sam.step(lambda model=model: CRITERION(model(x), y).backward())
            except Exception as error:  # noqa: BLE001
                flat[name, when] = f"{type(error).__name__}: {error}"
    return said, gathered, flat

"""Parameters that processes share: SAM's step is that of whole ones, all else refuses them."""

import parallel_training
import pytest
import sharded
import torch
import two_processes

import lowland

CHEAP = [{"perturb": "momentum"}, {"every": 2, "measure": True}]
CASES = [
    *[(name, adaptive, "zero", {}) for name in sharded.SHARDINGS for adaptive in (False, True)],
    *[("shards", False, way, {}) for way in ("zero in place", "zero before", "never", "scaler")],
    *[(name, True, "micro-batches", {}) for name in ("nested", "copies")],
    *[(name, True, "zero", settings) for name in sharded.SHARDINGS for settings in CHEAP],
    *[("shards", False, "scaler", settings) for settings in CHEAP],
    *[("nested", False, "micro-batches", settings) for settings in CHEAP],
]


def whole(adaptive, micro_batches, settings):
    """The same steps in one process."""
    model, x, y = parallel_training.problem()
    sam = sharded.sam_of(model, adaptive=adaptive, **settings)
    parts = [torch.arange(len(x))]
    if micro_batches:  # of both processes, which hold every second sample
        halves = [torch.arange(rank, len(x), 2).chunk(2) for rank in range(2)]
        parts = [torch.cat(both) for both in zip(*halves, strict=True)]

    def closure(part):
        sharded.CRITERION(model(x[part]), y[part]).backward()

    for _ in range(3):
        sam.step(closure, micro_batches=parts)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return weights if sam.curvature is None else {**weights, "curvature": sam.curvature}


@pytest.mark.slow
def test_sam_on_shards_is_sam_on_the_whole(tmp_path):
    results = two_processes.run(sharded.trainings, tmp_path, CASES)
    for rank in range(2):
        for case, found in zip(CASES, results[rank], strict=True):
            name, adaptive, way, settings = case
            if way == "never":
                assert "RuntimeError: the closure added to gradients" in found
            elif way == "scaler":
                assert "UnsupportedModelError: a gradient scaler" in found
            else:
                expected = whole(adaptive, way == "micro-batches", settings)
                if name != "tensor parallel":  # how shards get their gradients cannot be seen
                    expected.pop("curvature", None)
                torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12, msg=str(case))


@pytest.mark.slow
def test_curvature_in_shards_is_refused_and_to_be_had_once_gathered(tmp_path):
    model, x, y = parallel_training.problem()
    trace = lowland.hessian_moments(model, sharded.CRITERION, x, y).trace.detach()
    for said, gathered, flat in two_processes.run(sharded.measurements, tmp_path):
        for case, message in said.items():
            if case[0] in sharded.FLAT and case[1] in ("audit", "rescale", "permute"):
                assert message.startswith("UnsupportedModelError: expected an nn.Sequential"), case
            else:
                assert message.startswith("UnsupportedModelError: "), case
                assert "is sharded" in message
                assert "full_state_dict=True" in message
        for found in gathered.values():
            torch.testing.assert_close(found, trace, rtol=1e-12, atol=0)
        assert len(flat) == 4
        for case, message in flat.items():
            if case == ("flat", "before"):  # it trains another parameter than the one it was given
                assert message.startswith("RuntimeError: no parameter has a gradient")
            else:
                assert message.startswith("UnsupportedModelError: SAM needs the norm"), case

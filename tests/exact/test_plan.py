"""What is chosen, and into which tiles it is cut."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowland.exact import blocks, plan
from lowland.exact.plan import (
    LONGEST_CHUNK,
    cost,
    make_plan,
    make_trace_plan,
    trace_floats,
    work,
)
from lowland.exact.size import Size

GENEROUS = 1 << 38


def size_of(*widths, samples=100, networks=1):
    return Size(networks, samples, widths, tuple(width + 1 for width in widths[:-1]), 8)


drawn = {
    "widths": st.lists(st.sampled_from([1, 2, 5, 12, 40, 150]), min_size=2, max_size=4),
    "samples": st.sampled_from([1, 2, 7, 50, 400, 3000]),
    "networks": st.sampled_from([1, 1, 6]),
}


def is_accepted(size, order, budget, *, compiled=False):
    try:
        return make_plan(size, order, budget, on_cpu=True, compiled=compiled)
    except ValueError:
        return None


@given(**drawn, compiled=st.booleans())
def test_with_room_for_both_orders_the_cheaper_one_is_taken(widths, samples, networks, compiled):
    size = size_of(*widths, samples=samples, networks=networks)
    compiled &= len(size.widths) == 3 and size.widths[-1] == 1
    found = make_plan(size, "auto", GENEROUS, on_cpu=True, compiled=compiled)
    other = cost(size, "compiled" if compiled else "parameters")
    assert found.order == ("samples" if cost(size, "samples") < other else "parameters")
    assert found.compiled == (compiled and found.order == "parameters")


@given(**drawn, bits=st.integers(10, 22))
def test_an_order_that_does_not_fit_is_not_taken_where_the_other_does(
    widths, samples, networks, bits
):
    size = size_of(*widths, samples=samples, networks=networks)
    plans = {order: is_accepted(size, order, 1 << bits) for order in ("samples", "parameters")}
    found = is_accepted(size, "auto", 1 << bits)
    if not any(plans.values()):
        assert found is None
        return
    assert found == plans[found.order]
    if all(plans.values()):
        cheaper = min(plans, key=lambda order: cost(size, order))
        assert cost(size, found.order) == cost(size, cheaper)


def test_the_dearer_order_is_taken_where_it_alone_fits():
    size = size_of(1, 150, samples=50)
    assert cost(size, "samples") < cost(size, "parameters")
    found = make_plan(size, "auto", 3 << 20, on_cpu=True, compiled=False)
    assert found.order == "parameters"
    with pytest.raises(ValueError, match="too small for order='samples'"):
        make_plan(size, "samples", 3 << 20, on_cpu=True, compiled=False)


def test_the_cheaper_order_is_not_taken_where_it_does_not_fit():
    size = size_of(12, 5, samples=50)
    assert cost(size, "parameters") < cost(size, "samples")
    assert make_plan(size, "auto", 14_000, on_cpu=True, compiled=False).order == "samples"
    with pytest.raises(ValueError, match="too small for order='parameters'"):
        make_plan(size, "parameters", 14_000, on_cpu=True, compiled=False)


def test_a_matrix_in_tiles_is_not_kept_small_as_it_may_be():
    found = make_plan(size_of(5, 5), "parameters", 12_288, on_cpu=True, compiled=False)
    assert len(found.tiles) > 1
    assert 8 * blocks.entries(size_of(5, 5)) <= 12_288 // 4
    assert not found.keep


@given(**drawn, bits=st.integers(14, 28))
def test_what_is_kept_for_the_way_back_takes_a_quarter_of_the_budget(
    widths, samples, networks, bits
):
    size = size_of(*widths, samples=samples, networks=networks)
    budget = 1 << bits
    for order in ("samples", "parameters"):
        found = is_accepted(size, order, budget)
        if found is None:
            continue
        if order == "samples":
            kept = (
                found.networks
                * size.samples
                * plan.term_floats(size, in_factors=size.last_in_factors)
            )
        else:
            kept = size.networks * blocks.entries(size)
            assert not found.keep or len(found.tiles) == 1
        assert not found.keep or 8 * kept <= budget // 4
    small = replace(size, networks=1, samples=min(size.samples, 5))
    for order in ("samples", "parameters"):
        assert make_plan(small, order, GENEROUS, on_cpu=True, compiled=False).keep


@pytest.mark.parametrize(("networks", "keep"), [(8, True), (9, False)])
def test_of_an_ensemble_all_matrices_are_kept_or_none(networks, keep):
    size = size_of(12, 20, 2, networks=networks)
    budget = 4 * 8 * 8 * blocks.entries(size)  # a quarter of it holds eight
    found = make_plan(size, "parameters", budget, on_cpu=True, compiled=False)
    assert len(found.tiles) == 1
    assert found.keep == keep


@given(st.integers(1, 40), st.integers(1, 40), st.integers(14, 28))
def test_the_compiled_codes_matrices_take_half_of_the_budget(inputs, hidden, bits):
    budget, size = 1 << bits, size_of(inputs, hidden, 1, networks=1000)
    found = is_accepted(size, "parameters", budget, compiled=True)
    if found is None or not found.compiled:
        return
    entries = plan._packed_entries(size)
    copies = torch.get_num_threads() + 1
    assert found.networks * copies * entries * 8 <= budget // 2
    assert found.keep == (size.networks * entries * 8 <= budget // 4)


@pytest.mark.parametrize("order", ["samples", "parameters"])
def test_chunks_are_about_equal_and_fit_the_cache_of_a_processor(order):
    size = size_of(3, 4, 2, samples=LONGEST_CHUNK + 2)
    assert (
        make_plan(size, order, GENEROUS, on_cpu=True, compiled=False).chunk
        == LONGEST_CHUNK // 2 + 1
    )
    on_device = make_plan(size, order, GENEROUS, on_cpu=False, compiled=False)
    assert on_device.chunk == LONGEST_CHUNK + 2


def test_the_trace_alone_takes_chunks_four_times_as_long():
    size = size_of(3, 4, 2, samples=4 * LONGEST_CHUNK + 2)
    assert (
        make_trace_plan(size, GENEROUS, 200, on_cpu=True, compiled=False).chunk
        == 2 * LONGEST_CHUNK + 1
    )
    on_device = make_trace_plan(size, GENEROUS, 200, on_cpu=False, compiled=False)
    assert on_device.chunk == 4 * LONGEST_CHUNK + 2


@pytest.mark.parametrize("samples", [1, 50])
def test_a_budget_for_the_trace_holds_the_weights_and_a_sample(samples):
    size = size_of(200, 100, 3, samples=samples)
    weights = 6 * 8 * (201 * 100 + 101 * 3)
    floats = trace_floats(size, in_full=False)
    with pytest.raises(ValueError, match="one sample's terms take"):
        make_trace_plan(size, weights, floats, on_cpu=True, compiled=False)
    found = make_trace_plan(size, weights + 8 * floats, floats, on_cpu=True, compiled=False)
    assert (found.chunk, found.networks) == (1, 1)


def test_chunks_that_memory_makes_short_make_the_order_over_samples_dearer():
    # Wide layers: the kernels and terms of a full chunk do not fit.
    size = size_of(20, 300, 300, 300, 10, samples=800)
    launched = work(size, "samples")[2]
    assert launched > 4 * work(size_of(20, 3, 3, 3, 10, samples=800), "samples")[2]

"""Activation patterns, regions and free parameters against plain sets."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowland.weakness import activation_patterns, count_patterns, free_parameters, free_regions


def layer(seed, points, units):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(points, units, generator=generator).round().clamp_min(0)


def patterns(activations):
    return [tuple((row > 0).tolist()) for row in activations]


shapes = {"seed": st.integers(0, 999), "points": st.integers(0, 30)}


@given(**shapes, units=st.one_of(st.integers(0, 5), st.integers(60, 200)))
def test_patterns_are_those_of_plain_sets(seed, points, units):
    activations = layer(seed, points, units)
    packed, index = activation_patterns(activations)
    plain = patterns(activations)
    assert len(packed) == len(set(plain)) == count_patterns(activations)
    bits = (packed[:, :, None] >> torch.arange(7, -1, -1)) & 1
    assert patterns(bits.flatten(1)[:, :units][index]) == plain


@given(**shapes, units=st.integers(1, 4), unseen=st.integers(0, 30))
def test_regions_and_parameters_are_those_of_plain_counts(seed, points, units, unseen):
    train, other = layer(seed, points, units), layer(seed + 1, unseen, units)
    counts = Counter(patterns(train))
    free = set(patterns(other)) - set(counts)
    assert free_regions(train, other) == len(free)
    each = 3 * (units + 1)
    seen = sum(max(0, each - count) for count in counts.values())
    assert free_parameters(train, 3) == seen
    assert free_parameters(train, 3, other) == seen + each * len(free)


def test_before_and_after_relu_patterns_agree():
    before = torch.randn(50, 20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(activation_patterns(before)[1], activation_patterns(before.relu())[1])


def test_wrong_shapes_are_refused(as_installed):
    with pytest.raises(ValueError, match="flatten"):
        activation_patterns(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="as many units"):
        free_regions(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="positive"):
        free_parameters(torch.zeros(2, 3), 0)


def test_activations_that_are_no_numbers_are_refused(as_installed):
    with pytest.raises(ValueError, match="activations"):
        activation_patterns(torch.tensor([[1.0, float("nan")]]))

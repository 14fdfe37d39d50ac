"""Norms of all weights."""

import pytest
import torch

from lowland.weakness import weight_norm


def test_it_joins_all_parameters():
    parts = [torch.tensor([[3.0, 0.0]]), torch.tensor([-4.0])]
    assert weight_norm(parts) == 5
    assert weight_norm(iter(parts), order=1) == 7
    with pytest.raises(ValueError, match="at least one"):
        weight_norm([])

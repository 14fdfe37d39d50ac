"""Agreement of an ensemble against its definition, point by point."""

import pytest
import torch

from lowland.weakness import ensemble_agreement


def test_it_is_the_mean_over_a_networks_own_errors():
    generator = torch.Generator().manual_seed(0)
    predictions = torch.randint(3, (5, 40), generator=generator)
    labels = torch.randint(3, (40,), generator=generator)
    right = predictions == labels
    for network, found in enumerate(ensemble_agreement(predictions, labels).tolist()):
        others = [n for n in range(5) if n != network]
        shares = [right[others, x].double().mean() for x in range(40) if not right[network, x]]
        assert found == pytest.approx(sum(shares) / len(shares))


def test_a_network_without_errors_has_none():
    agreement = ensemble_agreement(torch.tensor([[0, 1], [1, 1]]), torch.tensor([0, 1]))
    assert agreement[0].isnan()
    assert agreement[1] == 1


def test_wrong_shapes_are_refused(as_installed):
    with pytest.raises(ValueError, match="at least two"):
        ensemble_agreement(torch.zeros(1, 3).long(), torch.zeros(3).long())
    with pytest.raises(ValueError, match="each of 3"):
        ensemble_agreement(torch.zeros(2, 3).long(), torch.zeros(4).long())


def test_logits_are_refused(as_installed):
    with pytest.raises(ValueError, match=r"expected classes, whole numbers; got torch\.float32"):
        ensemble_agreement(torch.zeros(3, 5), torch.zeros(5, dtype=torch.long))

import numpy as np
import pytest
import torch

from lowland.studies.data.carried import breast_cancer, digits
from lowland.studies.data.dataset import DataError
from lowland.studies.data.splits import stratified_splits
from lowland.studies.data.tables import read_csv


def write(tmp_path, text, name="table.csv"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_splits_are_stratified_and_standardized_on_the_training_part_alone():
    dataset = breast_cancer()
    splits = stratified_splits(dataset, range(3, 6), test_size=0.25)
    assert splits.x_train.shape == (3, 426, 30)
    assert splits.x_test.shape == (3, 143, 30)
    whole = dataset.y.mean()
    assert (splits.y_train.mean(1) - whole).abs().max() < 2e-3
    assert (splits.y_test.mean(1) - whole).abs().max() < 5e-3
    torch.testing.assert_close(
        splits.x_train.mean(1), torch.zeros(3, 30).double(), atol=1e-9, rtol=0
    )
    torch.testing.assert_close(splits.x_train.std(1, correction=0), torch.ones(3, 30).double())
    # Undone with the training part's own scale, the test part is the data's other rows.
    assert splits.x_test.mean(1).abs().max() > 0.01


def test_a_split_is_the_data_in_another_order_on_one_scale():
    dataset = breast_cancer()
    splits = stratified_splits(dataset, range(1), test_size=0.4)
    both = torch.cat([splits.x_train[0], splits.x_test[0]])
    labels = torch.cat([splits.y_train[0], splits.y_test[0]])
    for column in (0, 17):
        ranks = [
            torch.cat([v[:, column, None], t[:, None]], 1)
            for v, t in ((both, labels), (dataset.x, dataset.y))
        ]
        first, second = (v[np.lexsort((v[:, 1], v[:, 0]))] for v in ranks)
        assert torch.equal(first[:, 1], second[:, 1])
        slope = (second[:, 0] - second[0, 0]) / (second[-1, 0] - second[0, 0])
        torch.testing.assert_close(
            (first[:, 0] - first[0, 0]) / (first[-1, 0] - first[0, 0]), slope
        )


def test_a_seeds_split_does_not_depend_on_the_others():
    dataset = breast_cancer()
    many = stratified_splits(dataset, range(4, 8), test_size=0.25)
    one = stratified_splits(dataset, range(6, 7), test_size=0.25)
    assert torch.equal(many.x_train[2], one.x_train[0])
    assert torch.equal(many.y_test[2], one.y_test[0])
    assert not torch.equal(many.x_train[1], many.x_train[2])


@pytest.mark.parametrize(
    ("counts", "test_size"), [((1, 30), 0.25), ((2, 100), 0.1), ((20, 20), 0.01), ((5, 5), 0.95)]
)
def test_too_few_samples_of_a_class_are_refused(tmp_path, counts, test_size):
    rows = [f"{i},{'y' if i < counts[0] else 'z'}" for i in range(sum(counts))]
    dataset = read_csv(write(tmp_path, "a,t\n" + "\n".join(rows)), "t")
    message = rf"{sum(counts)} rows \({counts[0]} of class 'y', {counts[1]} of class 'z'\) are too"
    with pytest.raises(DataError, match=message):
        stratified_splits(dataset, range(20), test_size=test_size)


@pytest.mark.parametrize(
    ("repeats", "message"),
    [
        (
            (30, 30, 1),
            r"61 rows \(1 of class 'c2', 30 of class 'c0', 30 of class 'c1'\) are",
        ),
        ((1,) * 12, r"12 rows \(1 of class 'c0', .* and 4 more\) are .* on every class"),
    ],
)
def test_every_class_must_be_trained_and_tested_on(tmp_path, repeats, message):
    labels = [label for label, count in enumerate(repeats) for _ in range(count)]
    rows = [f"{i},c{label}" for i, label in enumerate(labels)]
    dataset = read_csv(write(tmp_path, "a,t\n" + "\n".join(rows)), "t")
    with pytest.raises(DataError, match=message):
        stratified_splits(dataset, range(20), test_size=0.25)


def test_features_of_one_unit_are_scaled_together():
    dataset = digits()
    splits = stratified_splits(dataset, range(2), test_size=0.25)
    assert splits.x_train.shape == (2, 1347, 64)
    torch.testing.assert_close(
        splits.x_train.mean(1), torch.zeros(2, 64).double(), atol=1e-12, rtol=0
    )
    torch.testing.assert_close(splits.x_train.square().mean((1, 2)), torch.ones(2).double())
    spread = splits.x_train.std(1)
    # A pixel's spread beside the others' is the same as in the data.
    torch.testing.assert_close(
        spread / spread.amax(1, keepdim=True),
        (dataset.x.std(0) / dataset.x.std(0).max()).expand(2, 64),
        atol=0.05,
        rtol=0,
    )
    for part in (splits.y_train, splits.y_test):
        counts = torch.stack([row.bincount() for row in part]).double()
        assert (counts / counts.sum(1, keepdim=True) - 0.1).abs().max() < 0.01


@pytest.mark.parametrize("odd", ["1", "1e300"])
def test_a_column_constant_or_huge_in_one_training_part_is_refused(tmp_path, odd):
    # All but one value are equal, so the column is constant wherever that row is tested on.
    rows = [f"{i},{odd if i == 7 else 0},{i % 2}" for i in range(40)]
    dataset = read_csv(write(tmp_path, "a,rare,t\n" + "\n".join(rows)), "t")
    with pytest.raises(DataError, match=r"'rare' cannot be standardized: in the training part of"):
        stratified_splits(dataset, range(30), test_size=0.25)

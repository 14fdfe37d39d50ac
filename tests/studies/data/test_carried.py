import torch

from lowland.studies.data.carried import breast_cancer, digits


def test_breast_cancer_is_the_table_of_569_patients():
    dataset = breast_cancer()
    assert dataset.x.shape == (569, 30)
    assert dataset.classes == ("malignant", "benign")
    assert int(dataset.y.sum()) == 357  # benign
    assert dataset.features[0] == "mean radius"
    assert dataset.counts == [212, 357]


def test_digits_are_the_images_of_ten_classes():
    dataset = digits()
    assert dataset.x.shape == (1797, 64)
    assert (dataset.x.min(), dataset.x.max()) == (0, 16)
    assert dataset.classes == tuple("0123456789")
    assert dataset.features[9] == "pixel_1_1"
    assert dataset.y.dtype == torch.int64
    assert dataset.counts == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]

import gzip
import hashlib
import io
import struct
import tarfile

import numpy as np
import pytest
import torch

from lowland.studies.data import images
from lowland.studies.data.dataset import DataError
from lowland.studies.data.images import (
    CIFAR_ARCHIVE,
    MissingDataError,
    cifar100,
    data_folder,
    fashion_mnist,
    mnist,
    mnist_test,
)

RECORD = 3074


def records(count, seed=0):
    """CIFAR-100 in small: coarse label, fine label, 3,072 pixels a record."""
    random = np.random.default_rng(seed)
    table = random.integers(0, 256, (count, RECORD), dtype=np.uint8)
    table[:, 0] = random.integers(0, 20, count)
    table[:, 1] = random.integers(0, 100, count)
    return table


def write_cifar(folder, train, test):
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in (("train.bin", train), ("test.bin", test)):
        (folder / name).write_bytes(table if isinstance(table, bytes) else table.tobytes())


def archive(folder, parts):
    with tarfile.open(folder / CIFAR_ARCHIVE, "w:gz") as tar:
        for name, content in parts.items():
            info = tarfile.TarInfo(f"cifar-100-binary/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_cifar_records_become_fine_labels_and_pixels_from_0_to_1(tmp_path):
    tables = records(7), records(3, seed=1)
    write_cifar(tmp_path / "deep" / "er", *tables)
    for part, table in zip(cifar100(tmp_path, verify=False), tables, strict=True):
        assert part.y.tolist() == table[:, 1].tolist()
        assert part.y.dtype == torch.int64
        expected = torch.from_numpy(table[:, 2:] / np.float32(255))
        torch.testing.assert_close(part.x, expected, rtol=0, atol=0)
        assert len(part.classes) == 100
        assert part.one_unit
        assert part.features[0] == "pixel_0_0_0"
        assert part.features[-1] == "pixel_2_31_31"  # channel, row, column


def test_cifar_is_read_out_of_its_archive_too(tmp_path, monkeypatch):
    tables = records(4), records(2, seed=1)
    archive(tmp_path, {"train.bin": tables[0].tobytes(), "test.bin": tables[1].tobytes()})
    digest = hashlib.md5((tmp_path / CIFAR_ARCHIVE).read_bytes()).hexdigest()  # noqa: S324
    monkeypatch.setitem(images.CIFAR_MD5, CIFAR_ARCHIVE, digest)
    train, test = cifar100(tmp_path)
    assert train.y.tolist() == tables[0][:, 1].tolist()
    assert test.y.tolist() == tables[1][:, 1].tolist()
    assert [path.name for path in tmp_path.iterdir()] == [CIFAR_ARCHIVE]


def test_files_are_verified_unless_one_says_otherwise(tmp_path, monkeypatch):
    write_cifar(tmp_path, records(2), records(2))
    message = r"train.bin' is not the published file: its MD5 is [0-9a-f]{32}, .*verify=False"
    with pytest.raises(DataError, match=message):
        cifar100(tmp_path)
    digest = hashlib.md5(records(2).tobytes()).hexdigest()  # noqa: S324
    for name in ("train.bin", "test.bin"):
        monkeypatch.setitem(images.CIFAR_MD5, name, digest)
    assert len(cifar100(tmp_path)[0].y) == 2


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (b"", "must hold records of 3,074 bytes .* got 0 bytes"),
        (bytes(RECORD + 5), "got 3,079 bytes, 1 records and 5 bytes more; it is damaged"),
        (bytes(3073 * 2), "got 6,146 bytes, 1 records and 3,072 bytes more"),  # CIFAR-10's
        (bytes(RECORD) + bytes([20, 0]) + bytes(3072), "coarse labels below 20; record 2 has 20"),
        (bytes([0, 100]) + bytes(3072), "fine labels below 100; record 1 has 100"),
    ],
)
def test_files_in_another_format_are_refused(tmp_path, train, message):
    write_cifar(tmp_path, train, records(2))
    with pytest.raises(DataError, match=message):
        cifar100(tmp_path, verify=False)


def test_a_broken_archive_is_refused(tmp_path):
    path = tmp_path / CIFAR_ARCHIVE
    path.write_bytes(b"no archive")
    with pytest.raises(DataError, match="MD5"):
        cifar100(tmp_path)
    with pytest.raises(DataError, match=r"cannot read .* \(not a gzip file\); .*get it again"):
        cifar100(tmp_path, verify=False)
    archive(tmp_path, {"train.bin": records(2).tobytes()})
    with pytest.raises(DataError, match=r"must be the archive with train\.bin and test\.bin"):
        cifar100(tmp_path, verify=False)
    archive(tmp_path, {"train.bin": records(200).tobytes(), "test.bin": records(2).tobytes()})
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(DataError, match="cannot read"):
        cifar100(tmp_path, verify=False)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(MissingDataError, match=r"expected cifar-100-binary.tar.gz, or train.bin"):
        cifar100(tmp_path)
    (tmp_path / "train.bin").write_bytes(b"alone")
    with pytest.raises(MissingDataError):
        cifar100(tmp_path)
    with pytest.raises(MissingDataError, match="expected t10k-images-idx3-ubyte or"):
        mnist_test(tmp_path)


def idx(array, dims=None, kind=8):
    shape = array.shape if dims is None else dims
    return (
        bytes([0, 0, kind, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + array.tobytes()
    )


def write_mnist(folder, pictures, labels, *, part="t10k", zipped=False, dot=False):
    mark = "." if dot else "-"
    folder.mkdir(exist_ok=True)
    for kind, content in ((f"images{mark}idx3", pictures), (f"labels{mark}idx1", labels)):
        path = folder / f"{part}-{kind}-ubyte{'.gz' if zipped else ''}"
        path.write_bytes(gzip.compress(content) if zipped else content)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("dot", [False, True])
def test_mnist_is_read_whatever_its_names(tmp_path, zipped, dot):
    pictures = np.arange(5 * 28 * 28, dtype=np.uint64).astype(np.uint8).reshape(5, 28, 28)
    labels = np.array([3, 0, 9, 9, 1], dtype=np.uint8)
    write_mnist(tmp_path, idx(pictures), idx(labels), zipped=zipped, dot=dot)
    dataset = mnist_test(tmp_path)
    assert dataset.y.tolist() == [3, 0, 9, 9, 1]
    assert dataset.x.shape == (5, 784)
    assert dataset.x[0, 255] == 1
    assert dataset.x[0, 51] == pytest.approx(0.2)
    assert dataset.features[29] == "pixel_1_1"


PICTURES, LABELS = np.zeros((2, 28, 28), np.uint8), np.zeros(2, np.uint8)


@pytest.mark.parametrize(
    ("pictures", "labels", "message"),
    [
        (b"", idx(LABELS), "IDX file of bytes with 3 dimensions; it starts with nothing"),
        (idx(LABELS), idx(LABELS), "with 3 dimensions; it starts with 00 00 08 01"),
        (idx(PICTURES, kind=13), idx(LABELS), "it starts with 00 00 0d 03"),
        (idx(PICTURES)[:-1], idx(LABELS), "hold 1,568 bytes of data, .* got 1,567; it is damaged"),
        (idx(PICTURES), idx(LABELS[:1]), "as many images as labels, .* got 2 and 1"),
        (idx(PICTURES), idx(LABELS + np.uint8(10)), "digits from 0 to 9; got 10"),
    ],
)
def test_damaged_files_are_refused(tmp_path, pictures, labels, message):
    write_mnist(tmp_path, pictures, labels)
    with pytest.raises(DataError, match=message):
        mnist_test(tmp_path)


def test_mnist_and_its_namesake_are_told_apart_by_the_folder(tmp_path):
    for place, first in (("fashion-mnist", 0), ("mnist", 2)):
        for offset, part in enumerate(("train", "t10k")):
            labels = np.full(2, first + offset, np.uint8)
            write_mnist(tmp_path / place, idx(PICTURES), idx(labels), part=part)
    assert [part.y[0].item() for part in fashion_mnist(tmp_path)] == [0, 1]
    assert [part.y[0].item() for part in mnist(tmp_path)] == [2, 3]
    assert fashion_mnist(tmp_path / "fashion-mnist")[0].name == "Fashion-MNIST (training images)"
    with pytest.raises(MissingDataError, match=r"MNIST is not in .*fashion"):
        mnist(tmp_path / "fashion-mnist")
    with pytest.raises(MissingDataError, match=r"expected train.*\.gz, in a folder with 'fashion'"):
        fashion_mnist(tmp_path / "mnist")


def test_a_cut_off_gzip_is_refused(tmp_path):
    write_mnist(tmp_path, idx(PICTURES), idx(LABELS), zipped=True)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"cannot read .*get it again"):
        mnist_test(tmp_path)


def test_the_folder_is_the_one_that_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("LOWLAND_DATA", raising=False)
    assert data_folder() is None
    monkeypatch.setenv("LOWLAND_DATA", str(tmp_path))
    assert data_folder() == tmp_path
    monkeypatch.setenv("LOWLAND_DATA", str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"LOWLAND_DATA must name a folder; .*none' is none"):
        data_folder()

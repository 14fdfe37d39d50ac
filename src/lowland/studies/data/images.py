"""Images from local files in their publishers' formats: MNIST, Fashion-MNIST and CIFAR-100.

Nothing is downloaded, and nothing is unpickled.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from lowland.studies.data.dataset import DataError, Dataset

FOLDER_VARIABLE = "LOWLAND_DATA"
"""The environment variable that names the folder where files are looked for."""

Bytes = NDArray[np.uint8]

CIFAR_ARCHIVE = "cifar-100-binary.tar.gz"
CIFAR_PARTS = ("train.bin", "test.bin")
CIFAR_MD5 = {
    CIFAR_ARCHIVE: "03b5dce01913d631647c71ecec9e9cb8",
    "train.bin": "6172c7755cfe09b2fe270c85cebc1b15",
    "test.bin": "4499cfba6c016c1be1438163640a0898",
}
"""Of the publisher's files: the archive, and what it holds."""

_CIFAR_SHAPE = (3, 32, 32)
_CIFAR_LABELS = (20, 100)  # coarse, fine
_CIFAR_RECORD = len(_CIFAR_LABELS) + 3 * 32 * 32


class MissingDataError(DataError):
    """Files that are not in the folder."""


def data_folder() -> Path | None:
    """What ``LOWLAND_DATA`` names, if it names anything.

    Raises:
        DataError: If that is no folder.
    """
    name = os.environ.get(FOLDER_VARIABLE)
    if not name:
        return None
    if not Path(name).is_dir():
        raise DataError(f"{FOLDER_VARIABLE} must name a folder; {name!r} is none")
    return Path(name)


def mnist_test(folder: Path) -> Dataset:
    """The 10,000 test images of MNIST: 28 x 28 pixels from 0 to 1, ten classes.

    Args:
        folder: Where ``t10k-images-idx3-ubyte`` and ``t10k-labels-idx1-ubyte`` are, or in a folder
            below; also with a dash replaced by a dot, and compressed by gzip (``.gz``).

    Raises:
        MissingDataError: If they are not there.
        DataError: If they are not IDX files, or do not fit each other.

    References:
        Y. LeCun, C. Cortes and C. J. C. Burges, The MNIST database of handwritten digits.
    """
    return _mnist_part(folder, "MNIST", "test", fashion=False)


def mnist(folder: Path) -> tuple[Dataset, Dataset]:
    """MNIST: 60,000 training and 10,000 test images, as :func:`mnist_test` reads them.

    The training part's files are ``train-images-idx3-ubyte`` and ``train-labels-idx1-ubyte``.
    """
    return _mnist_part(folder, "MNIST", "training", fashion=False), mnist_test(folder)


def fashion_mnist(folder: Path) -> tuple[Dataset, Dataset]:
    """Fashion-MNIST: as many images of clothes, in files of the same names as MNIST's.

    They are looked for where a folder's name tells them apart, such as ``fashion-mnist``.

    Raises:
        MissingDataError: If they are not there.
        DataError: If they are not IDX files, or do not fit each other.

    References:
        H. Xiao, K. Rasul and R. Vollgraf, Fashion-MNIST (arXiv:1708.07747).
    """
    train, test = (
        _mnist_part(folder, "Fashion-MNIST", part, fashion=True) for part in ("training", "test")
    )
    return train, test


def _mnist_part(folder: Path, name: str, part: str, *, fashion: bool) -> Dataset:
    prefix = "t10k" if part == "test" else "train"
    images = _idx(_find(folder, f"{prefix}-images-idx3-ubyte", name, fashion=fashion), 3)
    labels = _idx(_find(folder, f"{prefix}-labels-idx1-ubyte", name, fashion=fashion), 1)
    if len(images) != len(labels) or len(labels) == 0:
        raise DataError(
            f"{name}'s files in {str(folder)!r} must hold as many images as labels, and some; got "
            f"{len(images)} and {len(labels)}; get them again"
        )
    if labels.max() > 9:
        raise DataError(
            f"the labels in {str(folder)!r} must be digits from 0 to 9; got {labels.max()}"
        )
    return _dataset(f"{name} ({part} images)", images, labels, tuple(images.shape[1:]), 10)


def cifar100(folder: Path, *, verify: bool = True) -> tuple[Dataset, Dataset]:
    """CIFAR-100: 50,000 training and 10,000 test images of 32 x 32 colored pixels, from 0 to 1.

    Args:
        folder: Where the binary version is, or in a folder below: the archive
            ``cifar-100-binary.tar.gz``, or the files ``train.bin`` and ``test.bin`` from it. A
            record is a byte for the coarse label, one for the fine label, and 3,072 for the pixels.
        verify: Refuse files whose MD5 is not that of the publisher's. Without it any files of the
            same format will do.

    Returns:
        The training and the test part, with the fine labels.

    Raises:
        MissingDataError: If the files are not there.
        DataError: If they are damaged, or not in this format.

    References:
        A. Krizhevsky, Learning multiple layers of features from tiny images (2009).
    """
    train, test = (
        _cifar_part(name, content) for name, content in _cifar_files(folder, verify=verify)
    )
    return train, test


def _cifar_files(folder: Path, *, verify: bool) -> list[tuple[str, bytes]]:
    """Names and contents of the two parts."""
    archives = sorted(folder.rglob(CIFAR_ARCHIVE))
    if archives:
        if verify:
            _verify(archives[0], archives[0].read_bytes())
        return list(zip(CIFAR_PARTS, _unpack(archives[0]), strict=True))
    for first in sorted(folder.rglob(CIFAR_PARTS[0])):
        paths = [first.with_name(name) for name in CIFAR_PARTS]
        if all(path.is_file() for path in paths):
            contents = [path.read_bytes() for path in paths]
            if verify:
                for path, content in zip(paths, contents, strict=True):
                    _verify(path, content)
            return list(zip(map(str, paths), contents, strict=True))
    raise MissingDataError(
        f"CIFAR-100 is not in {str(folder)!r}: expected {CIFAR_ARCHIVE}, or train.bin and test.bin "
        "beside each other"
    )


def _unpack(archive: Path) -> list[bytes]:
    """The two parts out of the archive; nothing is written."""
    try:
        with tarfile.open(archive, "r:gz") as tar:
            members = [tar.extractfile(f"cifar-100-binary/{name}") for name in CIFAR_PARTS]
            contents = [member.read() for member in members]  # type: ignore[union-attr]
    except (AttributeError, KeyError, EOFError, OSError, tarfile.TarError, zlib.error) as error:
        raise DataError(
            f"cannot read {str(archive)!r} ({error}); it must be the archive with train.bin and "
            "test.bin; get it again"
        ) from None
    return contents


def _verify(path: Path, content: bytes) -> None:
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != CIFAR_MD5[path.name]:
        raise DataError(
            f"{str(path)!r} is not the published file: its MD5 is {found}, expected "
            f"{CIFAR_MD5[path.name]}; get it again, or read it unverified with verify=False "
            "(verify = false in a preset)"
        )


def _cifar_part(name: str, content: bytes) -> Dataset:
    records, rest = divmod(len(content), _CIFAR_RECORD)
    if rest or not records:
        raise DataError(
            f"{name!r} must hold records of {_CIFAR_RECORD:,} bytes (two labels and 3,072 pixels); "
            f"got {len(content):,} bytes, {records} records and {rest:,} bytes more; it is damaged "
            "or another version: the binary one is needed"
        )
    table = np.frombuffer(content, np.uint8).reshape(records, _CIFAR_RECORD)
    for column, (kind, count) in enumerate(zip(("coarse", "fine"), _CIFAR_LABELS, strict=True)):
        bad = np.flatnonzero(table[:, column] >= count)
        if len(bad):
            raise DataError(
                f"{name!r} must have {kind} labels below {count}; record {bad[0] + 1} has "
                f"{table[bad[0], column]}; it is damaged or another version: the binary one of "
                "CIFAR-100 is needed"
            )
    return _dataset("CIFAR-100", table[:, 2:], table[:, 1], _CIFAR_SHAPE, _CIFAR_LABELS[1])


def _find(folder: Path, file: str, name: str, *, fashion: bool) -> Path:
    """A file of MNIST's, or of its namesake's, under one of the names that go round."""
    for known in (file, file.replace("-idx", ".idx")):
        for pattern in (known, f"{known}.gz"):
            found = sorted(
                path
                for path in folder.rglob(pattern)
                if fashion == _says_fashion(folder.name, path.relative_to(folder))
            )
            if found:
                return found[0]
    within = ", in a folder with 'fashion' in its name" if fashion else ""
    raise MissingDataError(
        f"{name} is not in {str(folder)!r}: expected {file} or {file}.gz{within}"
    )


def _says_fashion(folder: str, path: Path) -> bool:
    return any("fashion" in part.lower() for part in (folder, *path.parts))


def _idx(path: Path, dims: int) -> Bytes:
    """An IDX file of bytes: two zeros, the type, the number of dimensions, sizes, and the data."""
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {str(path)!r}: {error}; get it again") from None
    if content[:4] != bytes([0, 0, 8, dims]) or len(content) < 4 + 4 * dims:
        raise DataError(
            f"{str(path)!r} must be an IDX file of bytes with {dims} dimensions; it starts with "
            f"{content[:4].hex(' ') or 'nothing'}"
        )
    shape = [int(size) for size in np.frombuffer(content, ">u4", dims, 4)]
    expected, got = int(np.prod(shape, dtype=np.int64)), len(content) - 4 - 4 * dims
    if expected != got:
        raise DataError(
            f"{str(path)!r} must hold {expected:,} bytes of data, as its header says; got {got:,}; "
            "it is damaged: get it again"
        )
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dims).reshape(shape)


def _dataset(
    name: str, images: Bytes, labels: Bytes, shape: Sequence[int], classes: int
) -> Dataset:
    pixels = images.reshape(len(images), -1).astype(np.float32) / np.float32(255)
    return Dataset(
        name,
        torch.from_numpy(pixels),
        torch.from_numpy(labels.astype(np.int64)),
        tuple("pixel_" + "_".join(map(str, place)) for place in np.ndindex(*shape)),
        tuple(map(str, range(classes))),
        one_unit=True,
    )

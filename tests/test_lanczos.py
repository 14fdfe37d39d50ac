"""One way to SciPy's iteration."""

import builtins

import numpy as np
import pytest

from lowland._lanczos import eigsh, need_scipy, start_vector


@pytest.mark.parametrize("shift", [0.0, 3.0, -2.5])
def test_a_shift_is_added_to_each_eigenvalue(shift):
    matrix = np.diag(np.linspace(-1, 2, 30))
    values = eigsh(lambda v: matrix @ v, 30, seed=0, shift=shift, k=2, which="LA")[0]
    np.testing.assert_allclose(np.sort(values), np.linspace(-1, 2, 30)[-2:] + shift, rtol=1e-10)


def test_the_same_seed_starts_at_the_same_place():
    assert (start_vector(9, 1) == start_vector(9, 1)).all()
    assert (start_vector(9, 1) != start_vector(9, 2)).any()


def test_without_scipy_it_says_what_to_install(monkeypatch):
    plain = builtins.__import__

    def without(name, *arguments, **named):
        if name.partition(".")[0] == "scipy":
            raise ModuleNotFoundError(f"No module named {name!r}")
        return plain(name, *arguments, **named)

    need_scipy()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'lowland\[spectrum\]'"):
        need_scipy()

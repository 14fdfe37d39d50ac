"""SciPy's implicitly restarted Lanczos iteration, asked in one way by all who need it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def need_scipy() -> None:
    """Require SciPy.

    Raises:
        ImportError: With what to install.
    """
    try:
        import scipy.sparse.linalg  # noqa: F401, PLC0415 - optional
    except ImportError as error:
        raise ImportError(
            "eigenvalues by Lanczos need SciPy, which is not installed "
            f"({error}): pip install 'lowland[spectrum]'"
        ) from error


def eigsh(
    product: Callable[[Array], Array], dim: int, *, seed: int, shift: float = 0.0, **settings: Any
) -> Any:
    """``scipy.sparse.linalg.eigsh`` of ``H + shift I``, from a start vector that a seed gives.

    Args:
        product: ``v -> H v``.
        dim: The length of ``v``.
        seed: Of the start vector, and of what SciPy draws.
        shift: Added to each eigenvalue. ARPACK stops when a residual is small beside its own
            eigenvalue, which those near zero hardly ever are.
        **settings: SciPy's.

    Returns:
        What SciPy does.

    References:
        R. B. Lehoucq, D. C. Sorensen and C. Yang, ARPACK Users' Guide, SIAM (1998).
    """
    from scipy.sparse.linalg import LinearOperator  # noqa: PLC0415 - optional, and slow
    from scipy.sparse.linalg import eigsh as iterate  # noqa: PLC0415

    def shifted(vector: Array) -> Array:
        flat = vector.ravel()
        return product(flat) + shift * flat

    if "rng" in inspect.signature(iterate).parameters:  # SciPy 1.17 or newer, else it draws nothing
        settings["rng"] = np.random.default_rng(seed)
    operator = LinearOperator((dim, dim), matvec=shifted, dtype=np.dtype(np.float64))
    return iterate(operator, v0=start_vector(dim, seed), **settings)


def start_vector(dim: int, seed: int) -> Array:
    """Random numbers to begin with, the same for the same seed."""
    return np.random.default_rng(seed).standard_normal(dim)

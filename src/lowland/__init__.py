"""Measure and control the curvature of neural-network losses."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from lowland import _moved

if TYPE_CHECKING:
    from lowland import exact, weakness
    from lowland.auditing import Audit, audit
    from lowland.diagonal import HessianDiagonal, hessian_diagonal
    from lowland.engines import hessian_moments
    from lowland.errors import UnsupportedModelError
    from lowland.hessian_functions import hessian_function
    from lowland.lambda_max import LambdaMax
    from lowland.landscape import LossSurface, surface
    from lowland.moments import HessianMoments
    from lowland.optimizers import SAM
    from lowland.penalties import HSR, FlatnessAware, HessianTrace
    from lowland.spectra import (
        EigenvalueHistory,
        Spectrum,
        eigenvalues_over,
        layer_spectra,
        spectrum,
    )
    from lowland.spectral_penalty import Spectral
    from lowland.symmetry import permute, rescale
    from lowland.verification import unchecked

__version__ = "0.1.0"

_HOMES = {
    "Audit": "auditing",
    "EigenvalueHistory": "spectra",
    "HSR": "penalties",
    "SAM": "optimizers",
    "FlatnessAware": "penalties",
    "HessianDiagonal": "diagonal",
    "HessianMoments": "moments",
    "HessianTrace": "penalties",
    "LambdaMax": "lambda_max",
    "LossSurface": "landscape",
    "Spectral": "spectral_penalty",
    "Spectrum": "spectra",
    "UnsupportedModelError": "errors",
    "audit": "auditing",
    "eigenvalues_over": "spectra",
    "hessian_diagonal": "diagonal",
    "hessian_function": "hessian_functions",
    "hessian_moments": "engines",
    "layer_spectra": "spectra",
    "permute": "symmetry",
    "rescale": "symmetry",
    "spectrum": "spectra",
    "surface": "landscape",
    "unchecked": "verification",
}

__all__ = [
    "HSR",
    "SAM",
    "Audit",
    "EigenvalueHistory",
    "FlatnessAware",
    "HessianDiagonal",
    "HessianMoments",
    "HessianTrace",
    "LambdaMax",
    "LossSurface",
    "Spectral",
    "Spectrum",
    "UnsupportedModelError",
    "audit",
    "eigenvalues_over",
    "exact",
    "hessian_diagonal",
    "hessian_function",
    "hessian_moments",
    "layer_spectra",
    "permute",
    "rescale",
    "spectrum",
    "surface",
    "unchecked",
    "weakness",
]

_moved.install()


def __getattr__(name: str) -> object:
    """Load a public name when it is first used.

    PyTorch takes a second to load. The command line, whose package this is too, must be able to
    answer a mistyped option or Ctrl-C before that.
    """
    if name in _HOMES:
        value: object = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    elif not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
        value = import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value  # the next look finds it without asking here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

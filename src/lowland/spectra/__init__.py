"""Eigenvalues, eigenvectors, trace and density of the Hessian of a trained model of any kind."""

from lowland.spectra.api import layer_spectra, spectrum
from lowland.spectra.history import EigenvalueHistory
from lowland.spectra.over import eigenvalues_over
from lowland.spectra.result import Spectrum
from lowland.spectra.solve import Density

__all__ = [
    "Density",
    "EigenvalueHistory",
    "Spectrum",
    "eigenvalues_over",
    "layer_spectra",
    "spectrum",
]

"""Eigenvalues, eigenvectors, trace and density of the Hessian of a trained model of any kind."""

from lowland.spectra.api import layer_spectra, spectrum
from lowland.spectra.result import Spectrum
from lowland.spectra.solve import Density

__all__ = ["Density", "Spectrum", "layer_spectra", "spectrum"]

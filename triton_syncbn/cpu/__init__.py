"""The four steps on a CPU, in torch's own loops; those of a layer alone are here by name."""

from .layer import grad_input, grad_moments, moments, normalize

__all__ = ["grad_input", "grad_moments", "moments", "normalize"]

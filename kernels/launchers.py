"""The four steps on Triton, under the names that they have in `triton_syncbn/reference.py`.

Of this folder `triton_syncbn/ops.py` imports this file and no other.
"""

from .grad_input import grad_input, grad_input_kernel
from .grad_moments import grad_moments, grad_moments_kernel
from .moments import moments, moments_kernel
from .normalize import normalize, normalize_kernel

# Under which key Triton keeps a kernel on disk hangs on which kernels it was asked for before: they
# share functions. Asked in one order, every process finds what another one has compiled.
for _kernel in (moments_kernel, normalize_kernel, grad_moments_kernel, grad_input_kernel):
    getattr(_kernel, "cache_key", None)  # the interpreter's have none

__all__ = ["grad_input", "grad_moments", "moments", "normalize"]

"""The four steps on Triton, under the names that they have in `triton_syncbn/reference.py`.

Of this folder `triton_syncbn/ops.py` imports this file and no other.
"""

from .grad_input import grad_input
from .grad_moments import grad_moments
from .moments import moments
from .normalize import normalize

__all__ = ["grad_input", "grad_moments", "moments", "normalize"]

"""The CPU backend: numba kernels that run a lowered module from packed weights."""

from mxmoe.backends.numba.backend import NumbaBackend
from mxmoe.backends.numba.executable import NumbaExecutable

__all__ = ["NumbaBackend", "NumbaExecutable"]

"""The CPU engine: Numba kernels on threads of our own."""

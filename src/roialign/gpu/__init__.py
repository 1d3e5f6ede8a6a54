"""The GPU engine: Triton kernels, and what launches them."""

import triton

if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
    raise ImportError(f"kernels that take tuples need Triton 3.3 or newer, got {triton.__version__}")

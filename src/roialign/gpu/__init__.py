"""The GPU engine: Triton kernels, and what launches them."""

import triton

if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 4):
    raise ImportError(f"kernels that take tuples need Triton 3.4 or newer, got {triton.__version__}")

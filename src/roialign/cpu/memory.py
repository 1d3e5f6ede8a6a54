"""First touch of a large fresh result costs more than the arithmetic; huge pages make it cheap."""

import ctypes
import sys
from collections.abc import Callable

from torch import Tensor

_MADV_HUGEPAGE = 14
_PAGE = 4096
_WORTH_IT = 4 * 2**20  # bytes; a huge page has 2 MB


def _find_madvise() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return madvise


_madvise = _find_madvise()


def prefer_huge_pages(t: Tensor) -> None:
    """Ask the kernel for huge pages under a tensor that is about to be filled. Only ever advice."""
    size = t.numel() * t.element_size()
    if _madvise is not None and size >= _WORTH_IT:
        start = -(-t.data_ptr() // _PAGE) * _PAGE
        _madvise(start, (t.data_ptr() + size - start) // _PAGE * _PAGE, _MADV_HUGEPAGE)

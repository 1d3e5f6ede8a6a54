"""Memory for results and for scratch: first touch of what is fresh costs more than the arithmetic.

PyTorch returns large CPU blocks to the system when a tensor dies and asks for fresh ones, page by
page, for the next. Results of more than 4 MB are therefore laid in blocks of our own, which come
back here when their tensor dies, and serve again: a training step or a serving loop then touches
memory that is there. At most 512 MB lie idle, and no more than 1/32 of the machine's memory.

Scratch is an arena that a call checks out and gives back, so a call inside a call - from a signal handler,
from what the collector runs - has another.
"""

import contextlib
import ctypes
import math
import mmap
import os
import sys
import weakref
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..layout import memory_format

_SMALL = 4 * 2**20
_TABLES = 32 * 2**20
_SHARE = 16 * 2**20  # of a thread
_MOST_ARENAS = 8  # that lie idle: as many calls at a time find memory that is there
_HUGE_PAGE = 2 * 2**20
_MADV_HUGEPAGE = 14

_ARRAY_TYPE = {
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.float16: np.float16,
    torch.bfloat16: np.int16,  # of the same size; NumPy has none
}

Block = NDArray[np.uint8]
_idle: deque[Block] = deque()
_arenas: deque[Block] = deque()


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device, channels_last: bool) -> Tensor:
    """A tensor to be filled; see `reference.empty`."""
    size = math.prod(shape) * dtype.itemsize
    if size < _SMALL:
        how = memory_format(len(shape) - 2, channels_last)
        return torch.empty(shape, dtype=dtype, device=device, memory_format=how)
    block = _take(size)
    array: NDArray[np.generic]
    if channels_last:
        images, channels, *axes = shape
        array = np.moveaxis(np.ndarray((images, *axes, channels), _ARRAY_TYPE[dtype], block), -1, 1)
    else:
        array = np.ndarray(tuple(shape), _ARRAY_TYPE[dtype], block)
    weakref.finalize(array, _give_back, block).atexit = False
    tensor = torch.from_numpy(array)  # keeps the array until the last tensor on this memory dies
    return tensor.view(dtype) if tensor.dtype != dtype else tensor


class Arena:
    """The scratch of one call: things laid one after the other in a block that no other call has.

    Its pages are the system's until they are written to. A call that is torn off does not give its arena
    back; it dies with it.
    """

    def __init__(self) -> None:
        size = _TABLES + torch.get_num_threads() * _SHARE
        try:
            block = _arenas.pop()  # the one used last is in caches
        except IndexError:
            block = np.empty(0, np.uint8)
        self._blocks: list[Block] = []
        self._use(block if len(block) >= size else np.empty(size, np.uint8))

    def _use(self, block: Block) -> None:
        start: int = block.__array_interface__["data"][0]
        self._blocks.append(block)
        self._next, self._end = start + -start % 64, start + len(block)

    def take(self, size: int) -> int:
        """The address of bytes of any content, aligned to 64."""
        at = self._next
        self._next = at + size // 64 * 64 + 64
        if self._next > self._end:
            self._use(np.empty(size + 192, np.uint8))
            at = self._next
            self._next = at + size // 64 * 64 + 64
        return at

    def mark(self) -> tuple[int, int, int]:
        """A place to rewind to."""
        return len(self._blocks), self._next, self._end

    def rewind(self, mark: tuple[int, int, int]) -> None:
        """Take back all that was taken since the mark."""
        blocks, self._next, self._end = mark
        del self._blocks[blocks:]

    def give_back(self) -> None:
        """Let the next call have it. Nobody may use it any more."""
        if len(_arenas) < _MOST_ARENAS:
            _arenas.append(self._blocks[0])


def integers(at: int, n: int) -> NDArray[np.int64]:
    """The integers at an address, as an array that does not keep them."""
    return np.ctypeslib.as_array((ctypes.c_int64 * n).from_address(at))


def _take(size: int) -> Block:
    """An idle block that fits without much waste, else a new one."""
    with contextlib.suppress(IndexError):  # another thread was faster
        for _ in range(len(_idle)):
            block = _idle.popleft()
            if size <= len(block) <= size + size // 4 + _HUGE_PAGE:
                return block
            _idle.append(block)
    block = np.empty(-(-size // _HUGE_PAGE) * _HUGE_PAGE, np.uint8)
    _prefer_huge_pages(block)
    return block


def _give_back(block: Block) -> None:
    """Keep a block whose tensor died, and let go of the oldest if too much lies idle.

    Runs wherever a tensor happens to die, so it takes no lock: the deque's own operations are atomic.
    """
    _idle.append(block)
    with contextlib.suppress(IndexError):  # another thread may be emptying it too
        while sum(map(len, tuple(_idle))) > _MOST_IDLE:
            _idle.popleft()


def _most_idle() -> int:
    """Bytes that may lie idle."""
    try:
        return min(512 * 2**20, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 32)
    except (AttributeError, OSError, ValueError):  # not on this platform
        return 128 * 2**20


_MOST_IDLE = _most_idle()


def _find_madvise() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    try:
        madvise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):  # a C library without it, or one that cannot be asked
        return None
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return madvise


_madvise = _find_madvise()


def _prefer_huge_pages(block: Block) -> None:
    """Ask the kernel for huge pages under a new block. Only ever advice."""
    if _madvise is not None:
        page = mmap.PAGESIZE
        start = -(-block.ctypes.data // page) * page
        _madvise(start, (block.ctypes.data + len(block) - start) // page * page, _MADV_HUGEPAGE)

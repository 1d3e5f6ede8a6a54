"""Problems whose tensors lie directly before, or directly after, a page that cannot be read or written.

Run as a program, it judges a table of them, and dies at the first address that is off by one:
`python tests/guarded.py before float32`, or `after`; with a number, from that case on.
"""

import contextlib
import ctypes
import itertools
import mmap
import sys
from collections.abc import Iterator
from random import Random
from typing import Any
from unittest import mock

import torch
from generated import DTYPES, Call, Map, Problem, Storage, extent, judge
from torch import Tensor

from roialign import ops
from roialign.testing import hostile_boxes

PAGE = mmap.PAGESIZE
PROT_NONE = 0
SIDES = ("before", "after")  # where the tensor lies, seen from the page

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def guarded_bytes(size: int, side: str) -> Tensor:
    """Memory between two pages of which none can be read, at one end or the other."""
    room = -(-size // PAGE) * PAGE
    memory = mmap.mmap(-1, room + 2 * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (address, address + PAGE + room):
        if _libc.mprotect(page, PAGE, PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
    start = PAGE + (room - size if side == "before" else 0)
    return torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=start)


def guarded(t: Tensor, side: str) -> Tensor:
    """The same values with the same strides, so laid."""
    if t.numel() == 0:
        return t
    values = t.detach().as_strided((extent(t),), (1,))
    memory = guarded_bytes(len(values) * t.element_size(), side).view(t.dtype)
    return memory.copy_(values).as_strided(t.shape, t.stride())


@contextlib.contextmanager
def guarded_results(side: str) -> Iterator[None]:
    """Lay what the engine fills likewise."""
    engine = ops.engine("cpu")
    empty = engine.empty

    def guarded_empty(*args: Any) -> Tensor:
        return guarded(empty(*args).zero_(), side)

    with mock.patch.object(engine, "empty", guarded_empty):
        yield


SIZES = ((1, 1), (1, 13), (12, 1), (5, 6), (21, 34), (2, 3))  # of maps, in cells
LAYOUTS = ("contiguous", "channels_last", "sliced", "transposed", "expanded_images", "order CHNW", "sliding")
CHANNELS = (1, 15, 16, 17, 64, 65)
BINS = ((1, 1), (7, 7), (7, 1), (14, 14), (1, 5))
LONE = ((), (1000, 1, 0, 7), (), (0, 0, 0, 0))
BOXES = [
    [0.0, 0, 40, 30],  # the map, its borders, beyond each of them
    [-8.0, -8, 0, 0],
    [39.0, 29, 60, 50],
    [-4.0, 3, 100, 9],
    [3.0, -4, 9, 100],
    [7.5, 7.5, 8.5, 8.5],
    [-1.0, -1, 21, 34],
    [20.0, 11, 36, 27],
]


def problem(seed: int, dtype: str, layout: str, channels: int, bins: tuple[int, int], ratio: int) -> Problem:
    """One of the table; what is not in its columns is drawn."""
    random = Random(seed)
    maps, images = random.randint(1, 4), random.randint(1, 2)
    storage = Storage(0, random.choice(LONE))
    hostile = hostile_boxes().tolist()
    boxes = [random.choice((BOXES + hostile[:6], BOXES[:3] + hostile)), BOXES[3:]][:images]
    count = sum(map(len, boxes))
    way = random.choice(("rows", "lists") if maps == 1 else ("functional", "module"))
    given = [random.randrange(maps) for _ in range(count)] if maps > 1 and random.random() < 0.7 else None
    sizes, strides = random.sample(SIZES, maps), random.sample((1, 2, 4, 8), maps)
    return Problem(
        maps=[
            Map(*size, stride, dtype, layout, storage) for size, stride in zip(sizes, strides, strict=True)
        ],
        images=images,
        channels=channels,
        boxes=boxes,
        box_dtype="float64" if dtype == "float64" else "float32",  # so that rows are read where they lie
        box_layout="contiguous",
        box_storage=storage,
        output_size=bins,
        sampling_ratio=ratio,
        aligned=random.random() < 0.3,
        canonical=(28.0, 4.0),
        given_levels=given,
        way=way,
        grad_layout=random.choice(LAYOUTS),
        grad_storage=storage,
        view="itself",
        spoilt=[],
        spoilt_grad=None,
        twice=random.random() < 0.3,
        seed=seed,
    )


def table(dtype: str) -> Iterator[Problem]:
    """A fifth of the product of all columns, with every pair of theirs."""
    columns = map(enumerate, (LAYOUTS, CHANNELS, BINS, (2, 0)))
    for seed, row in enumerate(itertools.product(*columns)):
        places, values = zip(*row, strict=True)
        if sum(places) % 5 == 0:
            yield problem(seed, dtype, *values)


def guard(call: Call, side: str) -> None:
    """Lay all tensors of a call beside pages that cannot be read."""
    call.features = [guarded(f, side) for f in call.features]
    call.boxes = [guarded(b, side) for b in call.boxes]
    call.rois, call.grad = guarded(call.rois, side), guarded(call.grad, side)
    if call.levels is not None:
        call.levels = guarded(call.levels, side)


def main(side: str, dtype: str, first: str = "0") -> None:
    torch.set_num_threads(1)
    for number, case in enumerate(table(dtype)):
        if number >= int(first):
            print(f"case {number}: {case}", flush=True)
            call = Call(case)
            guard(call, side)
            with guarded_results(side):
                judge(call)
    print("all agree")


if __name__ == "__main__":
    assert sys.argv[1] in SIDES
    assert sys.argv[2] in DTYPES
    main(*sys.argv[1:])

"""What kernels are told of tensors: where they lie in memory, as rows of numbers.

Most calls are like one before in everything but addresses, so the rest is worked out once.
"""

import functools
import itertools
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layout import normal_strides
from ..levels import per_axis
from . import geometry


class Maps(NamedTuple):
    """The maps of a call, and where the rows of each begin if all are counted through, image by image."""

    rows: "array[int]"  # of numbers; see `geometry.AT` and on
    first: "array[int]"  # N * L + 1
    images: int
    heights: tuple[int, ...]
    widths: tuple[int, ...]
    longest: int  # axis
    inner: int  # the most channels that lie side by side
    mine: tuple[bool, ...]  # which are to be done


Layout = tuple[torch.Size, tuple[int, ...], int]  # shape, strides, bytes of a number


def layout(t: Tensor) -> Layout:
    """How a tensor lies in memory, wherever that is."""
    return t.shape, t.stride(), t.itemsize


def describe(t: Tensor) -> "array[int]":
    """A row of numbers."""
    return array("q", (t.data_ptr(), *_row(layout(t))))


def slices_of(features: Sequence[Tensor]) -> tuple[int, ...] | None:
    """How many slices each volume has; None for maps of two axes."""
    return tuple([f.shape[2] for f in features]) if features[0].dim() == 5 else None


def describe_maps(
    features: Sequence[Tensor],
    layouts: tuple[Layout, ...],
    slices: tuple[int, ...] | None,
    mine: tuple[bool, ...],
) -> Maps:
    """The maps of such layouts, of which those count that are `mine`; of volumes with so many slices."""
    maps = _maps(layouts, slices, mine)
    rows = maps.rows[:]
    for i, feature in enumerate(features):
        rows[i * int(geometry.MAP_COLUMNS)] = feature.data_ptr()
    return maps._replace(rows=rows)


@functools.lru_cache(256)
def _maps(layouts: tuple[Layout, ...], slices: tuple[int, ...] | None, mine: tuple[bool, ...]) -> Maps:
    rows = array("q")
    for each, m, n in zip(layouts, mine, slices or (1,) * len(mine), strict=True):
        rows.extend((0, *_row(each), m, n, each[0][2] // n))
    images, channels = layouts[0][0][:2]
    heights, widths = (tuple(shape[axis] for shape, *_ in layouts) for axis in (2, 3))
    first = array("q", itertools.accumulate(heights * images, initial=0))
    inner = channels if any(stride[1] == 1 for _, stride, _ in layouts) else 1
    return Maps(rows, first, images, heights, widths, max(heights + widths), inner, mine)


@functools.lru_cache(256)
def _row(t: Layout) -> tuple[int, ...]:
    shape, stride, size = t
    image, channel, row, column = normal_strides(shape, stride)
    return image * size, channel * size, row * size, column * size, shape[2], shape[3]


def in_one_run(grad: Tensor) -> Tensor:
    """The gradient, with bins that lie one after the other and channels or bins without gaps."""
    _, channel, row, column = normal_strides(grad.shape, grad.stride())
    width = grad.shape[3]
    step = row if width == 1 else column
    if row == width * column and (step == 1 or channel == 1):
        return grad
    return grad.contiguous()  # an expanded gradient, as that of a sum


def at(numbers: "array[Any]") -> int:
    """The address of an array."""
    return numbers.buffer_info()[0]


def pose(rois: Tensor, levels: Tensor | None, maps: Maps, pooling: Any) -> tuple[geometry.Problem, object]:
    """What the kernels are told of the RoIs, and what owns the constants in it."""
    size, scales, ratio, aligned, thresholds, order, _, derivative = pooling
    rest, constants = _constants(
        tuple(size), len(maps.mine), tuple(scales), tuple(thresholds), tuple(order), rois.dtype
    )
    # All of them integers, as in a job: else parts are compiled for both.
    given = rois.data_ptr(), 0 if levels is None else levels.data_ptr()
    of_maps = len(maps.mine), maps.images, at(maps.rows)
    problem = geometry.Problem._make(
        (len(size), *given, *of_maps, *rest, ratio, int(aligned), derivative),
    )
    return problem, constants


@functools.lru_cache(256)
def _constants(
    size: tuple[int, ...], maps: int, scales: tuple[float, ...], thresholds: tuple[float, ...],
    order: tuple[int, ...], dtype: torch.dtype,
) -> tuple[Any, object]:  # fmt: skip
    """The fields of a problem from `scales` on to the bins, and the arrays that they name."""
    code, slices = "f" if dtype == torch.float32 else "d", size[0] if len(size) == 3 else 1
    of_axes = itertools.chain(*per_axis(scales, maps, len(size)))
    arrays = array(code, of_axes), array(code, thresholds), array("q", order)
    bins = slices * size[-2], slices, size[-2], size[-1]
    return (*[at(a) for a in arrays], len(thresholds), *bins), arrays

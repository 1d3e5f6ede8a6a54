"""Which map of the pyramid serves which box: scales from shapes, and FPN's equation 1."""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .apart import do_apart

EPS = 1e-6  # torchvision's, added outside the logarithm


def infer_scales(map_sizes: Sequence[Sequence[int]], image_shapes: Sequence[Sequence[int]]) -> list[float]:
    """The scale of each map, `1 / stride`, the stride being a power of two.

    Args:
        map_sizes: `(height, width)` of each map, in cells; or of other axes.
        image_shapes: `(height, width)` of each image of the batch, in pixels, before padding.

    The maps come from the padded batch, so an unpadded size can only make a stride look too
    small: the largest image counts, and of its axes the one with the largest stride.
    """
    if len(image_shapes) == 0:  # no images, no boxes: any scale is right
        return [1.0] * len(map_sizes)
    image = largest(image_shapes)
    return [0.5 ** max(map(_log2_ratio, image, size)) for size in map_sizes]


def log2_strides(map_size: Sequence[int], image: Sequence[int]) -> list[int]:
    """The logarithm of the stride of a map along each of its axes, by the largest image."""
    return list(map(_log2_ratio, image, map_size))


def largest(image_shapes: Sequence[Sequence[int]]) -> Sequence[int]:
    """The most pixels that images have along each axis."""
    if len(image_shapes) == 1:
        return image_shapes[0]
    return [max([shape[axis] for shape in image_shapes]) for axis in range(len(image_shapes[0]))]


def _log2_ratio(image: int, cells: int) -> int:
    """round(log2(image / cells)) by comparing integers, so that tracing a SymInt leaves a guard."""
    image, cells = image * image, cells * cells
    k = 0
    while image >= 2 * cells:
        cells, k = 4 * cells, k + 1
    while 2 * image < cells:  # a map finer than the image
        image, k = 4 * image, k - 1
    return k


def per_axis(scales: Sequence[float], maps: int, axes: int) -> list[tuple[float, ...]]:
    """The scales of each map along each of its axes, given for each map or, map by map, for each axis."""
    if len(scales) == maps:
        return [(scale,) * axes for scale in scales]
    return [tuple(scales[axes * i : axes * (i + 1)]) for i in range(maps)]


class Staircase(NamedTuple):
    """Which map serves a box, by its area alone: what equation 1 comes to for one pyramid.

    A box is served by map `order[n]`, n being the number of `thresholds` that its area reaches; in three axes
    its volume. A NaN reaches none.
    """

    thresholds: tuple[float, ...] = ()  # areas in square pixels of the image, ascending
    order: tuple[int, ...] = (0,)  # indices of maps, from the finest to the coarsest; one more

    def levels(self, boxes: Tensor) -> Tensor:
        """`(K, 4)` or `(K, 6)` boxes -> `(K,)` int64: the index of the map of each."""
        ends = boxes.unbind(1)
        axes = len(ends) // 2
        area, *sides = (ends[i + axes] - ends[i] for i in range(axes))
        for side in sides:
            area = area * side
        index = torch.full_like(area, self.order[0], dtype=torch.int64)
        for threshold, finer, coarser in self.steps():
            index = index + (area >= threshold) * (coarser - finer)
        return index

    def steps(self) -> Iterator[tuple[float, int, int]]:
        """Each threshold with the maps below and above it."""
        return zip(self.thresholds, self.order[:-1], self.order[1:], strict=True)


def staircase(
    scales: Sequence[float],
    canonical_scale: float,
    canonical_level: float,
    dtype: torch.dtype,
    maps: int | None = None,
    axes: int = 2,
) -> Staircase:
    """Equation 1 for the maps of these scales.

    A missing level is served by the next coarser map, anything beyond the coarsest by the coarsest, and of
    two maps of one level the first serves. The thresholds are the least areas, of all floats of `dtype`,
    for which PyTorch's operators step up: so there is no logarithm, and every engine agrees to the last bit.

    Args:
        scales: cells of each map per pixel of the image; or, map by map, those of each axis, whose geometric
            mean then counts.
        canonical_scale: the side, in pixels, of the square box that belongs to `canonical_level`.
        canonical_level: k0 in the equation.
        dtype: in which boxes are carried.
        maps: how many there are; if None, as many as scales.
        axes: of the maps. The size of a box is the geometric mean of so many sides.
    """
    maps = len(scales) if maps is None else maps
    if maps == 1:
        return Staircase()
    numbers = (*scales, canonical_scale, canonical_level)
    if torch.compiler.is_dynamo_compiling():
        # A float that varied between calls is a symbol there; as text it is a constant.
        numbers = tuple(float(f"{number}") for number in numbers)
    return _constant_staircase(numbers, dtype, maps, axes)


def _constant_staircase(numbers: tuple[float, ...], dtype: torch.dtype, maps: int, axes: int) -> Staircase:
    return _staircase(numbers, dtype, maps, axes)


# What `torch.compiler.assume_constant_result` does, without its import of the compiler.
_constant_staircase._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(256)
def _staircase(numbers: tuple[float, ...], dtype: torch.dtype, maps: int, axes: int) -> Staircase:
    *scales, canonical_scale, canonical_level = numbers
    if len(scales) != maps:
        scales = [math.prod(of_map) ** (1 / axes) for of_map in per_axis(scales, maps, axes)]
    map_levels = map_levels_of(scales)
    first = {level: map_levels.index(level) for level in sorted(set(map_levels))}
    steps = list(first)[:-1]

    def thresholds() -> tuple[float, ...]:
        rule = canonical_scale, canonical_level, dtype, axes
        return tuple(_least_area_above(level, *rule) for level in steps)

    # In a thread of its own, for there no mode is active that would make these few numbers symbols, nodes
    # of a graph, or tensors of another device.
    return Staircase(do_apart(thresholds), tuple(first.values()))


def _least_area_above(
    level: int, canonical_scale: float, canonical_level: float, dtype: torch.dtype, axes: int
) -> float:
    """The least area of a box that wants more than `level`, by bisection over the bits."""
    integers = torch.int32 if dtype == torch.float32 else torch.int64
    at_most, above = 0, int(torch.tensor(math.inf, dtype=dtype).view(integers))
    while at_most < above:
        middle = (at_most + above) // 2
        area = torch.tensor([middle], dtype=integers).view(dtype)
        if wanted_level(_side(area, axes), canonical_scale, canonical_level) > level:
            above = middle
        else:
            at_most = middle + 1
    return torch.tensor([above], dtype=integers).view(dtype).item()


def _side(area: Tensor, axes: int) -> Tensor:
    """The geometric mean of the sides of a box: of two axes in torchvision's way, of others in float64."""
    return torch.sqrt(area) if axes == 2 else (area.double() ** (1 / axes)).to(area.dtype)


def wanted_level(side: Tensor, canonical_scale: float, canonical_level: float, eps: float = EPS) -> Tensor:
    """Equation 1 of FPN (arXiv:1612.03144): a whole number, minus infinity, or NaN.

    The order of the operations is torchvision's, `side` being the root of an area, so that sizes of exactly
    `canonical_scale * 2^k` fall on the same side of the boundary.
    """
    return torch.floor(canonical_level + torch.log2(side / canonical_scale) + eps)


def map_levels_of(scales: Sequence[float]) -> list[int]:
    """The pyramid level of each map, `round(log2(stride))`."""
    return [round(-math.log2(scale)) for scale in scales]

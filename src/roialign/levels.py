"""Which map of the pyramid serves which box: scales from shapes, and FPN's equation 1."""

import functools
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

EPS = 1e-6  # torchvision's, added outside the logarithm


def infer_scales(
    map_sizes: Sequence[tuple[int, int]], image_shapes: Sequence[tuple[int, int]]
) -> list[float]:
    """The scale of each map, `1 / stride`, the stride being a power of two.

    Args:
        map_sizes: `(height, width)` of each map, in cells.
        image_shapes: `(height, width)` of each image of the batch, in pixels, before padding.

    The maps come from the padded batch, so an unpadded size can only make a stride look too
    small: the largest image counts, and of its two axes the one with the larger stride.
    """
    if len(image_shapes) == 0:  # no images, no boxes: any scale is right
        return [1.0] * len(map_sizes)
    height, width = (max(shape[axis] for shape in image_shapes) for axis in (0, 1))
    return [0.5 ** max(_log2_ratio(height, h), _log2_ratio(width, w)) for h, w in map_sizes]


def _log2_ratio(image: int, cells: int) -> int:
    """round(log2(image / cells)) by comparing integers, so that tracing a SymInt leaves a guard."""
    image, cells = image * image, cells * cells
    k = 0
    while image >= 2 * 4**k * cells:
        k += 1
    while 2 * 4**-k * image < cells:  # a map finer than the image
        k -= 1
    return k


def serving_steps(map_levels: Sequence[int]) -> tuple[int, list[tuple[int, int]]]:
    """The pyramid as a staircase from the wanted level to the index of the map that serves it.

    Returns the index of the finest map and, from fine to coarse, steps `(level, delta)`: a box
    that wants more than `level` moves on by `delta`. So a missing level is served by the next
    coarser map, anything beyond the coarsest by the coarsest, and of two maps of one level the
    first serves. A NaN (a box with `w*h < 0`) is more than nothing and stays at the finest.
    """
    first = {level: map_levels.index(level) for level in sorted(set(map_levels))}
    order = list(first)
    steps = [(a, first[b] - first[a]) for a, b in itertools.pairwise(order)]
    return first[order[0]], steps


def assign_levels(
    boxes: Tensor,  # (K, 4)
    map_levels: Sequence[int],
    canonical_scale: float,
    canonical_level: float,
    eps: float = EPS,
) -> Tensor:  # (K,) int64
    """Equation 1 of FPN (arXiv:1612.03144): the index, among the maps, of each box's map.

    The order of the operations is torchvision's, so that sizes of exactly `canonical_scale * 2^k`
    fall on the same side of the boundary.

    Args:
        boxes: `(x1, y1, x2, y2)` in pixels of the image.
        map_levels: the pyramid level of each map, `round(log2(stride))`, in the maps' order.
        canonical_scale: the side, in pixels, of the square box that belongs to `canonical_level`.
        canonical_level: k0 in the equation.
        eps: added to the level before it is rounded down.
    """
    x1, y1, x2, y2 = boxes.unbind(1)
    size = torch.sqrt((x2 - x1) * (y2 - y1))
    wanted = wanted_level(size / canonical_scale, canonical_level, eps)
    finest, steps = serving_steps(map_levels)
    index = torch.full_like(wanted, finest, dtype=torch.int64)
    for level, delta in steps:
        index = index + (wanted > level) * delta
    return index


def wanted_level(ratio: Tensor, canonical_level: float, eps: float = EPS) -> Tensor:
    """Equation 1 itself, of `size / canonical_scale`: a whole number, minus infinity, or NaN."""
    return torch.floor(canonical_level + torch.log2(ratio) + eps)


def map_levels_of(scales: Sequence[float]) -> list[int]:
    """The pyramid level of each map, `round(log2(stride))`."""
    return [round(-math.log2(scale)) for scale in scales]


@functools.lru_cache(256)
def staircase(
    scales: tuple[float, ...], canonical_level: float, dtype: torch.dtype
) -> tuple[int, tuple[tuple[float, int], ...]]:
    """Equation 1 without a logarithm, for engines: the finest map and steps `(ratio, delta)`.

    From fine to coarse, a box whose `size / canonical_scale` reaches `ratio` moves on by `delta`. The
    thresholds are where PyTorch's own operators step up, so engines agree with `assign_levels` to the
    last bit.
    """
    finest, steps = serving_steps(map_levels_of(scales))
    return finest, tuple((_first_above(level, canonical_level, dtype), delta) for level, delta in steps)


def _first_above(level: int, canonical_level: float, dtype: torch.dtype) -> float:
    """The smallest ratio whose wanted level exceeds `level`, by bisection over the bits."""
    integers = torch.int32 if dtype == torch.float32 else torch.int64
    at_most, above = 0, int(torch.tensor(math.inf, dtype=dtype).view(integers))
    while at_most < above:
        middle = (at_most + above) // 2
        ratio = torch.tensor([middle], dtype=integers).view(dtype)
        if wanted_level(ratio, canonical_level) > level:
            above = middle
        else:
            at_most = middle + 1
    return torch.tensor([above], dtype=integers).view(dtype).item()


class LevelMapper:
    """Equation 1 of FPN: which of the maps `k_min .. k_max` serves each box.

    `floor(canonical_level + log2(sqrt(w * h) / canonical_scale) + eps)`, clamped to the levels
    present. A box without area, or turned inside out, goes to the finest map.

    Args:
        k_min: level of the finest map; level `k` has stride `2^k`.
        k_max: level of the coarsest map.
        canonical_scale: side of the square box, in pixels of the image, that `canonical_level` serves.
        canonical_level: k0 in the equation.
        eps: added outside the logarithm, as in torchvision.

    Examples:
        >>> mapper = LevelMapper(2, 5)
        >>> mapper([torch.tensor([[0.0, 0.0, 224.0, 224.0], [0.0, 0.0, 30.0, 30.0]])])
        tensor([2, 0])
    """

    def __init__(
        self,
        k_min: int,
        k_max: int,
        canonical_scale: int = 224,
        canonical_level: int = 4,
        eps: float = EPS,
    ) -> None:
        if k_min > k_max:
            raise ValueError(f"k_min must not exceed k_max, got k_min={k_min}, k_max={k_max}")
        self.k_min = k_min
        self.k_max = k_max
        self.s0 = canonical_scale
        self.lvl0 = canonical_level
        self.eps = eps

    def __call__(self, boxlists: list[Tensor]) -> Tensor:
        """Map boxes to levels.

        Args:
            boxlists: one `(L, 4)` tensor per image, `(x1, y1, x2, y2)` in pixels of the image.

        Returns:
            `(K,)` int64: the level of each box of all lists, counted from `k_min`.
        """
        boxes = torch.cat([_at_least_float32(b) for b in boxlists])
        levels = range(self.k_min, self.k_max + 1)
        return assign_levels(boxes, levels, self.s0, self.lvl0, self.eps)


def _at_least_float32(boxes: Tensor) -> Tensor:
    return boxes if boxes.dtype == torch.float64 else boxes.float()

"""Equation 1 for users: the mapper of boxes to levels, as torchvision has one."""

import torch
from torch import Tensor

from . import arguments, tensors
from .levels import EPS, wanted_level


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

    Raises:
        TypeError: an argument is no number.
        ValueError: `k_min` exceeds `k_max`, or a number is not finite or, of `canonical_scale`, not positive.

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
        self.k_min = arguments.check_integer("k_min", k_min)
        self.k_max = arguments.check_integer("k_max", k_max)
        if self.k_min > self.k_max:
            raise ValueError(f"k_min must not exceed k_max, got k_min={k_min}, k_max={k_max}")
        self.s0 = arguments.check_positive("canonical_scale", canonical_scale)
        self.lvl0 = arguments.check_number("canonical_level", canonical_level)
        self.eps = arguments.check_number("eps", eps)

    def __call__(self, boxlists: list[Tensor]) -> Tensor:
        """Map boxes to levels.

        Args:
            boxlists: one `(L, 4)` tensor per image, `(x1, y1, x2, y2)` in pixels of the image.

        Returns:
            `(K,)` int64: the level of each box of all lists, counted from `k_min`.

        Raises:
            TypeError: no list of tensors of real numbers.
            ValueError: a tensor that is not `(L, 4)`, or on another device than the first.
        """
        boxlists = list(tensors.check_boxlists(boxlists))
        if not boxlists:
            return torch.empty(0, dtype=torch.int64)
        x1, y1, x2, y2 = torch.cat([_at_least_float32(b) for b in boxlists]).unbind(1)
        wanted = wanted_level(torch.sqrt((x2 - x1) * (y2 - y1)), self.s0, self.lvl0, self.eps)
        # A NaN, of a box that is turned inside out along one axis, stays at the finest.
        return wanted.nan_to_num(self.k_min).clamp(self.k_min, self.k_max).long() - self.k_min


def _at_least_float32(boxes: Tensor) -> Tensor:
    return boxes if boxes.dtype == torch.float64 else boxes.float()

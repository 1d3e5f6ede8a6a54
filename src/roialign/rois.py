"""Boxes per image -> rois `(K, 5)`: image index, x1, y1, x2, y2."""

from collections.abc import Sequence

import torch
from torch import Tensor


def working_dtype(features: Sequence[Tensor]) -> torch.dtype:
    """The precision in which boxes are carried and samples are accumulated.

    Never half: float16 has a spacing of one pixel from 1024 pixels on.
    """
    return torch.float64 if any(f.dtype == torch.float64 for f in features) else torch.float32


def boxes_to_rois(boxes: Sequence[Tensor], like: Tensor, dtype: torch.dtype) -> Tensor:
    """Join one boxes tensor `(L, 4)` per image into rois `(K, 5)` of `dtype`, on the device of `like`.

    The image index is written in `dtype`, not in the boxes' own: bfloat16 counts to 256 only.
    """
    if len(boxes) == 0:
        return like.new_empty((0, 5), dtype=dtype)
    parts = [torch.constant_pad_nd(b.to(dtype), (1, 0), float(i)) for i, b in enumerate(boxes)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)

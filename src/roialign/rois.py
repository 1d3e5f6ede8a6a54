"""Boxes per image -> rois `(K, 5)`: image index, x1, y1, x2, y2; with as many axes as the maps have."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .plain import is_plain


def working_dtype(features: Sequence[Tensor]) -> torch.dtype:
    """The precision in which boxes are carried and samples are accumulated.

    Never half: float16 has a spacing of one pixel from 1024 pixels on.
    """
    return torch.float64 if torch.float64 in [f.dtype for f in features] else torch.float32


def in_dtype(t: Tensor, dtype: torch.dtype) -> Tensor:
    """`t.to(dtype)`, which even where it does nothing lets go of the interpreter's lock."""
    return t if t.dtype == dtype else t.to(dtype)


def boxes_to_rois(boxes: Sequence[Tensor], like: Tensor, dtype: torch.dtype) -> Tensor:
    """Join one boxes tensor `(L, 4)` per image into rois `(K, 5)` of `dtype`, on the device of `like`, a map.

    The image index is written in `dtype`, not in the boxes' own: bfloat16 counts to 256 only.
    """
    if len(boxes) == 0:
        return like.new_empty((0, 2 * like.dim() - 3), dtype=dtype)
    boxes = [in_dtype(b, dtype) for b in boxes]
    if is_plain(boxes) and True not in [b.requires_grad for b in boxes]:
        return _joined([b.numpy() for b in boxes])
    parts = [torch.constant_pad_nd(b, (1, 0), float(i)) for i, b in enumerate(boxes)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _joined(boxes: Sequence[Any]) -> Tensor:
    """By NumPy, which keeps the interpreter's lock: a busy thread takes milliseconds to give it back."""
    import numpy as np  # which PyTorch, too, imports when it is needed

    rois = np.empty((sum([len(b) for b in boxes]), 1 + boxes[0].shape[1]), boxes[0].dtype)
    start = 0
    for i, b in enumerate(boxes):
        stop = start + len(b)
        rois[start:stop, 0] = i
        rois[start:stop, 1:] = b
        start = stop
    return torch.from_numpy(rois)


def on_one_row(rois: Tensor) -> Tensor:
    """Rois `(K, 3)` of sequences as rois `(K, 5)` of maps of one row: each from y = 0 to 1."""
    image, x1, x2 = rois.unbind(1)
    return torch.stack((image, x1, torch.zeros_like(x1), x2, torch.ones_like(x2)), 1)

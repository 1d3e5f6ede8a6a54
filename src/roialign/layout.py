"""How a tensor `(N, C, H, W)` lies in memory: the one description that engines and contracts go by."""

from collections.abc import Sequence

import torch
from torch import Tensor


def normal_strides(shape: Sequence[int], stride: Sequence[int]) -> tuple[int, int, int, int]:
    """The four strides, with those replaced that name nothing because their axis has size 1.

    PyTorch lets such a stride be any number, and `is_contiguous()` does not look at it. Here images and
    channels then have stride 0, and a single row or column the stride with which it would continue.
    """
    images, channels, height, width = shape
    image, channel, row, column = stride
    if width == 1:
        column = row if height > 1 else 0
    if height == 1:
        row = width * column
    return image if images > 1 else 0, channel if channels > 1 else 0, row, column


def strides(t: Tensor) -> tuple[int, int, int, int]:
    """Likewise, of a tensor."""
    return normal_strides(t.shape, t.stride())


def is_channels_last(t: Tensor) -> bool:
    """Whether channels lie innermost. A tensor that is also contiguous counts as contiguous."""
    _, channels, height, width = t.shape
    return bool(channels > 1 and t.stride(1) == 1 and (height > 1 or width > 1))


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device, channels_last: bool) -> Tensor:
    """A tensor `(N, C, H, W)` to be filled. Every engine may have its own way to get memory."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=device, memory_format=memory_format)

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
    _, channels, *size = t.shape
    return bool(channels > 1 and t.stride(1) == 1 and max(size) > 1)


def memory_format(axes: int, channels_last: bool) -> torch.memory_format:
    """PyTorch's name for how maps of two or three axes lie."""
    if not channels_last:
        return torch.contiguous_format
    return torch.channels_last if axes == 2 else torch.channels_last_3d


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device, channels_last: bool) -> Tensor:
    """A map or a volume to be filled. Every engine may have its own way to get memory."""
    how = memory_format(len(shape) - 2, channels_last)
    return torch.empty(shape, dtype=dtype, device=device, memory_format=how)


def rows_of(t: Tensor) -> Tensor:
    """A volume as a map `(N, C, D * H, W)`, a copy where strides ask for it; a map as it is."""
    return t.flatten(2, 3) if t.dim() == 5 else t


def view_of_rows(t: Tensor) -> Tensor:
    """Likewise, for writing: an error where it would be a copy."""
    images, channels, depth, height, width = t.shape
    return t.view(images, channels, depth * height, width)

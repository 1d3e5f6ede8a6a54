"""Pyramids, boxes, layouts and error budgets, for tests here and in projects that use roialign.

A test is a few lines: make a pyramid, make boxes, pool, and hold the result against a truth.

    features = pyramid([4, 8, 16, 32], image_size=(160, 192), layout="channels_last")
    boxes = random_boxes([5, 0, 3], image_size=(160, 192))
    result = multiscale_roi_align(features, boxes, 7, scales=[1 / 4, 1 / 8, 1 / 16, 1 / 32])
    assert_within_budget(result, truth=truth_in_float64, reference=another_implementation)
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Layout = Callable[[Tensor], Tensor]


def _sliced(t: Tensor) -> Tensor:
    """A window of every second column of a larger tensor: no stride is the usual one."""
    larger = t.new_zeros(t.shape[0], t.shape[1] + 1, t.shape[2] + 3, 2 * t.shape[3] + 1)
    window = larger[:, 1:, 2:-1, 1::2]
    window.copy_(t)
    return window


LAYOUTS: dict[str, Layout] = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "sliced": _sliced,
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "batch_innermost": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "expanded_channels": lambda t: t[:, :1].contiguous().expand(t.shape),
    "expanded_images": lambda t: t[:1].contiguous().expand(t.shape),
}
"""Ways to lay `(N, C, H, W)` out in memory. All keep the shape, and all but the expanded ones (which
repeat the first channel or image with stride 0) keep the values."""


def pyramid(
    strides: Sequence[int],
    *,
    image_size: tuple[int, int] = (160, 192),
    images: int = 1,
    channels: int = 4,
    dtype: torch.dtype = torch.float32,
    layout: str | Sequence[str] = "contiguous",
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> list[Tensor]:
    """Random feature maps of a pyramid, normally distributed.

    Args:
        strides: pixels per cell of each map, in any order.
        image_size: `(height, width)` in pixels of the padded batch; a map has
            `ceil(image_size / stride)` cells.
        images: N.
        channels: C.
        dtype: of all maps.
        layout: a name from `LAYOUTS` for all maps, or one per map.
        device: of all maps.
        seed: the same seed gives the same values for every dtype, layout and device.

    Returns:
        One `(N, C, H_l, W_l)` tensor per stride.

    Examples:
        >>> [tuple(f.shape) for f in pyramid([8, 16], image_size=(64, 100), channels=3)]
        [(1, 3, 8, 13), (1, 3, 4, 7)]
    """
    names = [layout] * len(strides) if isinstance(layout, str) else layout
    generator = torch.Generator().manual_seed(seed)
    maps = []
    for stride, name in zip(strides, names, strict=True):
        cells = [math.ceil(side / stride) for side in image_size]
        values = torch.randn(images, channels, *cells, generator=generator, dtype=torch.float64)
        maps.append(LAYOUTS[name](values.to(device, dtype)))
    return maps


def random_boxes(
    counts: Sequence[int],
    *,
    image_size: tuple[int, int] = (160, 192),
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> list[Tensor]:
    """Boxes of all sizes for each image of a batch: small, large, narrow, partly and wholly outside.

    Centres are uniform over the image and a margin of a quarter of its size around; sides are
    uniform in their logarithm, from one pixel to one and a half times the image, so every level of
    a pyramid gets some.

    Args:
        counts: boxes per image; 0 is fine.
        image_size: `(height, width)` in pixels.
        dtype: of the boxes; the values are drawn in float32 and then rounded to it.
        device: of the boxes.
        seed: the same seed gives the same boxes.

    Returns:
        One `(L, 4)` tensor of `(x1, y1, x2, y2)` in pixels per image.

    Examples:
        >>> [tuple(b.shape) for b in random_boxes([3, 0])]
        [(3, 4), (0, 4)]
    """
    generator = torch.Generator().manual_seed(seed)
    extent = torch.tensor([image_size[1], image_size[0]], dtype=torch.float32)
    result = []
    for count in counts:
        centre = (torch.rand(count, 2, generator=generator) * 1.5 - 0.25) * extent
        half = 0.5 * (1.5 * extent) ** torch.rand(count, 2, generator=generator)
        result.append(torch.cat((centre - half, centre + half), 1).to(device, dtype))
    return result


def hostile_boxes(*, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Tensor:
    """Boxes that no detector should produce and some do.

    Args:
        dtype: of the boxes.
        device: of the boxes.

    Returns:
        `(L, 4)`: boxes without area, inside out, outside any map, of huge size, and with NaN or
        infinity in each place.
    """
    big = math.sqrt(torch.finfo(dtype).max) / 4
    rows = [
        [8.0, 8.0, 8.0, 8.0],
        [8.0, 8.0, 40.0, 8.0],
        [40.0, 8.0, 8.0, 30.0],
        [40.0, 40.0, 8.0, 8.0],
        [-90.0, -90.0, -80.0, -80.0],
        [1e4, 1e4, 2e4, 2e4],
        [-1e4, -1e4, 2e4, 2e4],
        [-big, -big, big, big],
        [big, big, -big, -big],
        [torch.finfo(dtype).tiny] * 4,
    ]
    spoils = (math.nan, math.inf, -math.inf)
    sound = [2.0, 2.0, 30.0, 30.0]
    rows += [[*sound[:place], spoil, *sound[place + 1 :]] for spoil in spoils for place in range(4)]
    return torch.tensor(rows, dtype=torch.float64).to(device, dtype)


def error_budget(reference: Tensor, truth: Tensor) -> float:
    """How far from the truth a result may lie: twice as far as another in its dtype, and one rounding.

    Twice, because the worst of one set of roundings does not bound the worst of another of their kind.

    Args:
        reference: a result of the same computation in the dtype to be judged.
        truth: the same in float64, from the same inputs.

    Returns:
        The largest absolute error allowed. The rounding is that of the largest value, not of each: a
        small sum of large terms is rounded as they are.
    """
    finite = truth.isfinite()
    if not finite.any():
        return 0.0
    worst = (reference.double() - truth)[finite].abs().max()
    return float(2 * worst + truth[finite].abs().max() * torch.finfo(reference.dtype).eps)


def assert_within_budget(actual: Tensor, *, truth: Tensor, reference: Tensor) -> None:
    """Assert that a result is as near to the truth as another implementation in its dtype is.

    So no tolerance needs tuning: the error must not exceed twice the largest one of `reference`, plus
    one rounding to the dtype. NaNs must be where the truth has them.

    Args:
        actual: the result to judge.
        truth: the same in float64, from the same inputs.
        reference: the same in the dtype of `actual`, from another implementation.

    Raises:
        AssertionError: another shape or dtype, a NaN that the truth has not, or too large an error.

    Examples:
        >>> truth = torch.tensor([1 / 3], dtype=torch.float64)
        >>> assert_within_budget(truth.float(), truth=truth, reference=truth.float())
        >>> assert_within_budget(truth.half().float(), truth=truth, reference=truth.float())
        Traceback (most recent call last):
        ...
        AssertionError: error 8.14e-05 exceeds the budget 5.96e-08 at (0,): got 0.333252, truth 0.333333
    """
    if actual.dtype != reference.dtype or actual.shape != truth.shape:
        raise AssertionError(
            f"expected {reference.dtype} of shape {tuple(truth.shape)}, "
            f"got {actual.dtype} of shape {tuple(actual.shape)}"
        )
    error = (actual.double() - truth).abs()
    budget = error_budget(reference, truth)
    within = (error <= budget) | (actual.isnan() & truth.isnan())
    if not within.all():
        wrong = error.nan_to_num(math.inf).masked_fill(within, -math.inf)
        place = tuple(int(i) for i in torch.unravel_index(wrong.argmax(), wrong.shape))
        raise AssertionError(
            f"error {error[place]:.3g} exceeds the budget {budget:.3g} at {place}: "
            f"got {actual[place]:.6g}, truth {truth[place]:.6g}"
        )

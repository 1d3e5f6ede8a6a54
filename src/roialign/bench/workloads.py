"""What is timed: pyramids, boxes, and the part of the work on them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

STRIDES = {"p2": 4, "p3": 8, "p4": 16, "p5": 32}

Call = Callable[[], Sequence[Tensor]]


class Size(NamedTuple):
    """How large a run is."""

    image: tuple[int, int]
    channels: int
    share: float  # of the boxes

    def boxes_of(self, count: int) -> int:
        """The share of a number of boxes, at least one."""
        return max(1, round(self.share * count))


FULL = Size((800, 1344), 256, 1.0)
QUICK = Size((800, 1344), 16, 0.02)
TINY = Size((64, 64), 16, 1.0)


class Workload(NamedTuple):
    """What is pooled, and which part of it is timed."""

    name: str
    boxes: int
    bins: int = 7
    ratio: int = 2  # sampling points per bin and axis; 0: as many as the bin has cells
    timed: str = "forward"  # or "backward", or "both"
    channels_last: bool = False
    dtype: torch.dtype = torch.float32  # of ours; torchvision has no bfloat16 and gets float32
    grad: bool = False  # whether the maps require a gradient
    size: Size | None = None  # if not that of the run

    @property
    def is_plain(self) -> bool:
        """Whether engines for inference can do it: forward, NCHW, float32."""
        return not (self.grad or self.channels_last) and self.dtype == torch.float32

    @property
    def tolerance(self) -> float:
        """How far results may lie apart, relative to the largest value."""
        return 1e-4 if self.dtype == torch.float32 else 2e-2


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("box-head", 1000),
        Workload("box-head-channels-last", 1000, channels_last=True),
        Workload("box-head-bfloat16", 1000, dtype=torch.bfloat16),
        Workload("mask-head", 100, bins=14),
        Workload("mask-head-channels-last", 100, bins=14, channels_last=True),
        Workload("adaptive", 200, ratio=0),
        Workload("backward", 512, timed="backward", grad=True),
        Workload("forward-backward", 512, timed="both", grad=True),
        Workload("one-box", 1, size=TINY),
        Workload("one-box-grad", 1, grad=True, size=TINY),
    )
}


def make_maps(workload: Workload, size: Size) -> dict[str, Tensor]:
    """Random maps `(1, C, H_l, W_l)` by name, of float32."""
    memory_format = torch.channels_last if workload.channels_last else torch.contiguous_format
    generator = torch.Generator().manual_seed(0)
    maps = {}
    for name, stride in STRIDES.items():
        height, width = (-(-side // stride) for side in size.image)
        empty = torch.empty(1, size.channels, height, width, memory_format=memory_format)
        maps[name] = empty.normal_(generator=generator)  # in place: no peak of memory before the measured one
    return maps


def make_boxes(count: int, image: tuple[int, int]) -> Tensor:
    """Boxes of all sizes within an image, as a proposal network gives them.

    Args:
        count: K.
        image: `(height, width)` in pixels.

    Returns:
        `(K, 4)` of `(x1, y1, x2, y2)` in pixels: centres uniform over the image; sides uniform in
        their logarithm from 1/32 of the image's shorter side to all of it, so that every level gets
        some; aspect ratios likewise from 1/2 to 2; cut off at the rim.
    """
    generator = torch.Generator().manual_seed(0)
    extent = torch.tensor([image[1], image[0]], dtype=torch.float32)
    centre = torch.rand(count, 2, generator=generator) * extent
    side = min(image) * 2 ** (5 * (torch.rand(count, 1, generator=generator) - 1))
    stretch = 2 ** (torch.rand(count, 1, generator=generator) - 0.5)
    half = torch.cat((side * stretch, side / stretch), 1) / 2
    return torch.cat(((centre - half).clamp(min=0), torch.minimum(centre + half, extent)), 1)


def make_call(workload: Workload, size: Size, maps: Mapping[str, Tensor], pooler_class: Any) -> Call:
    """What is timed of a pooler, as a function without arguments.

    Args:
        workload: which part of the work.
        size: of the run.
        maps: as `make_maps` gives them, in the dtype wanted.
        pooler_class: `MultiScaleRoIAlign`, ours or torchvision's.

    Returns:
        A function that returns the pooled values, or the gradients of the maps, or both.
    """
    x = {name: f.detach().requires_grad_(workload.grad) for name, f in maps.items()}
    boxes = [make_boxes(size.boxes_of(workload.boxes), size.image)]
    pooler = pooler_class(list(x), workload.bins, workload.ratio)

    def forward() -> Tensor:
        pooled: Tensor = pooler(x, boxes, [size.image])
        return pooled

    if workload.timed == "forward":
        return lambda: [forward()]
    once = forward()
    grad = torch.empty_like(once).normal_(generator=torch.Generator().manual_seed(1))

    def backward(pooled: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(pooled, list(x.values()), grad, retain_graph=pooled is once)

    if workload.timed == "backward":
        return lambda: backward(once)
    return lambda: [pooled := forward(), *backward(pooled)]

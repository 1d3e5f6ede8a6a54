"""What is timed: pyramids, boxes, and the part of the work on them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import MultiScaleRoIAlign, roi_align

STRIDES = {"p2": 4, "p3": 8, "p4": 16, "p5": 32}

Call = Callable[[], Sequence[Tensor]]


class Library(NamedTuple):
    """What is compared of a package: its call for several maps and its call for one."""

    pooler: Any  # the class MultiScaleRoIAlign
    roi_align: Any


ROIALIGN = Library(MultiScaleRoIAlign, roi_align)


class Size(NamedTuple):
    """How large a run is."""

    image: tuple[int, int]
    channels: int
    share: float  # of the boxes

    def boxes_of(self, count: int) -> int:
        """The share of a number of boxes, at least one."""
        return max(1, round(self.share * count))

    def shrunk(self) -> "Size":
        """For a quick run."""
        height, width = (max(64, side // 8) for side in self.image)
        return Size((height, width), min(self.channels, QUICK.channels), QUICK.share)


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
    dtype: torch.dtype = torch.float32  # of ours; see `their_dtype`
    grad: bool = False  # whether the maps require a gradient
    size: Size | None = None  # if not that of the run
    strides: tuple[int, ...] = tuple(STRIDES.values())  # of the maps; of one, it is `roi_align` that is timed
    images: int = 1
    whole: bool = False  # whether every box is the whole image

    @property
    def is_plain(self) -> bool:
        """Whether engines for inference can do it: the pyramid of one image, forward, NCHW, float32."""
        is_pyramid = self.strides == tuple(STRIDES.values()) and self.images == 1
        return is_pyramid and not (self.grad or self.channels_last) and self.dtype == torch.float32

    @property
    def their_dtype(self) -> torch.dtype:
        """Of torchvision's maps: on the CPU it has no bfloat16, and its float16 takes 20 times as long."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def tolerance(self) -> float:
        """How far results may lie apart, relative to the largest value."""
        return {torch.float64: 1e-9, torch.float32: 1e-4}.get(self.dtype, 2e-2)

    def size_of(self, quick: bool) -> Size:
        """The size of its own, else that of the run."""
        if self.size is None:
            return QUICK if quick else FULL
        return self.size.shrunk() if quick else self.size


PHOTO, MASK = Size((1080, 1920), 3, 1.0), Size((800, 1333), 1, 1.0)

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
        Workload("crops", 32, bins=64, size=PHOTO, strides=(1,)),
        Workload("crops-adaptive", 32, bins=224, ratio=0, size=PHOTO, strides=(1,)),
        Workload("mask-targets", 128, bins=28, ratio=0, size=MASK, strides=(1,), images=20),
        Workload("one-box", 1, size=TINY),
        Workload("one-box-grad", 1, grad=True, size=TINY),
    )
}


def make_maps(workload: Workload, size: Size) -> dict[str, Tensor]:
    """Random maps `(N, C, H_l, W_l)` by name, of float32."""
    memory_format = torch.channels_last if workload.channels_last else torch.contiguous_format
    generator = torch.Generator().manual_seed(0)
    maps = {}
    for stride in workload.strides:
        height, width = (-(-side // stride) for side in size.image)
        empty = torch.empty(workload.images, size.channels, height, width, memory_format=memory_format)
        # In place: no peak of memory before the measured one.
        maps[f"p{stride.bit_length() - 1}"] = empty.normal_(generator=generator)
    return maps


def boxes_of(workload: Workload, size: Size) -> Tensor:
    """Its boxes `(K, 4)`, in pixels of the image."""
    count = size.boxes_of(workload.boxes)
    if workload.whole:
        return torch.tensor([[0.0, 0.0, size.image[1], size.image[0]]]).repeat(count, 1)
    return make_boxes(count, size.image)


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


def make_call(workload: Workload, size: Size, maps: Mapping[str, Tensor], library: Library) -> Call:
    """What is timed of a library, as a function without arguments.

    Args:
        workload: which part of the work.
        size: of the run.
        maps: as `make_maps` gives them, in the dtype wanted.
        library: ours or torchvision's.

    Returns:
        A function that returns the pooled values, or the gradients of the maps, or both.
    """
    x = {name: f.detach().requires_grad_(workload.grad) for name, f in maps.items()}
    forward = _make_forward(workload, size, x, library)
    if workload.timed == "forward":
        return lambda: [forward()]
    once = forward()
    random = torch.empty(once.shape).normal_(generator=torch.Generator().manual_seed(1))
    grad = torch.empty_like(once).copy_(random)  # the same numbers in any dtype and layout

    def backward(pooled: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(pooled, list(x.values()), grad, retain_graph=pooled is once)

    if workload.timed == "backward":
        return lambda: backward(once)
    return lambda: [pooled := forward(), *backward(pooled)]


def _make_forward(
    workload: Workload, size: Size, x: dict[str, Tensor], library: Library
) -> Callable[[], Tensor]:
    first = next(iter(x.values()))
    boxes = boxes_of(workload, size).to(torch.float64 if first.dtype == torch.float64 else torch.float32)
    of_images = boxes.tensor_split(workload.images)
    if len(x) > 1:
        pooler = library.pooler(list(x), workload.bins, workload.ratio)
        image_shapes = [size.image] * workload.images
        return lambda: pooler(x, list(of_images), image_shapes)
    indices = torch.cat([boxes.new_full((len(b), 1), i) for i, b in enumerate(of_images)])
    rois = torch.cat((indices, boxes), 1)
    scale = 1 / workload.strides[0]
    return lambda: library.roi_align(first, rois, workload.bins, scale, workload.ratio)

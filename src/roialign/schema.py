"""What the two operators take: their schemas, and the named tuple that travels through all signatures."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .levels import Staircase, per_axis

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Pooling(NamedTuple):
    """How regions are pooled: what follows the levels in every signature, in the order of the schemas."""

    output_size: Sequence[int]  # bins per axis, in the order of the axes of a map
    scales: Sequence[float]  # cells of each map per pixel of the image; or, map by map, those of each axis
    sampling_ratio: (
        int  # points per bin and axis; 0: as many as the bin has cells, rounded up; or `taps.EXACT`
    )
    aligned: bool  # whether cell centres lie at whole numbers, and small boxes are not widened
    thresholds: Sequence[float]  # the staircase of the pyramid; see `levels.Staircase`
    order: Sequence[int]
    box_gradients: bool = False  # whether boxes, too, have a gradient
    derivative: int = 0  # if not 0, pooled is how the result changes with this column of the rois

    @property
    def staircase(self) -> Staircase:
        """Which map serves which box, where no levels are given."""
        return Staircase(tuple(self.thresholds), tuple(self.order))

    @property
    def lost(self) -> float:
        """What a RoI that cannot be pooled becomes: it has no value, and a derivative of zero."""
        return 0.0 if self.derivative else math.nan

    def scales_of(self, maps: int) -> list[tuple[float, ...]]:
        """The scales of each map along each of its axes."""
        return per_axis(self.scales, maps, len(self.output_size))

    def moved(self, axis: int) -> tuple[bool, bool] | None:
        """Whether it is the start or the end of RoIs along an axis by which the result is differentiated."""
        column, axes = self.derivative - 1, len(self.output_size)
        start = axes - 1 - axis  # x comes first in a box, and last in a map
        return (column == start, column != start) if column % axes == start and column >= 0 else None


class Maps(NamedTuple):
    """What backward must know of the maps, in the order of its schema."""

    shape: Sequence[int]  # N, C, then H, W or D, H, W of each map
    dtypes: Sequence[int]  # indices into DTYPES
    channels_last: Sequence[bool]

    @property
    def sizes(self) -> list[tuple[int, ...]]:
        """`(H, W)` or `(D, H, W)` of each map."""
        axes = (len(self.shape) - 2) // len(self.dtypes)
        return [tuple(self.shape[i : i + axes]) for i in range(2, len(self.shape), axes)]


# Lists, so that other ranks, scales per axis and other rules need no other schema.
_POOLING = (
    "SymInt[] output_size, float[] scales, int sampling_ratio, bool aligned, float[] thresholds, "
    "int[] order, bool box_gradients=False, int derivative=0"
)
_FORWARD = f"multiscale_roi_align(Tensor[] features, Tensor rois, Tensor? levels, {_POOLING}) -> Tensor"
_BACKWARD = (
    "multiscale_roi_align_backward(Tensor grad, Tensor rois, Tensor? levels, "
    f"SymInt[] shape, int[] dtypes, bool[] channels_last, {_POOLING}) -> Tensor[]"
)

# A copy of the package inside another one has operators of its own, named after where it lies.
NAMESPACE = (__package__ or "roialign").replace(".", "_")


def _define() -> torch.library.Library:
    """Define the operators; those of an earlier import of the same package, since forgotten, are withdrawn.

    So a purge of `sys.modules`, as notebooks and plug-in reloaders make it, does no harm.
    """
    operators = getattr(torch.ops, NAMESPACE)
    earlier = operators.__dict__.get("_library")
    if earlier is not None:
        earlier._destroy()
    try:
        library = torch.library.Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise ImportError(
            f"the operators of {__package__} are defined already, by another file: {error}"
        ) from error
    library.define(_FORWARD)  # type: ignore[no-untyped-call]
    library.define(_BACKWARD)  # type: ignore[no-untyped-call]
    operators._library = library
    return library


LIBRARY: Any = _define()


def forward_operator() -> Any:
    """The operator as it is now: a later import of the package may have defined it anew."""
    return getattr(torch.ops, NAMESPACE).multiscale_roi_align.default


def backward_operator() -> Any:
    """Likewise."""
    return getattr(torch.ops, NAMESPACE).multiscale_roi_align_backward.default


def pool(features: Sequence[Tensor], rois: Tensor, levels: Tensor | None, pooling: Pooling) -> Tensor:
    """Call the operator; see `reference.forward`."""
    out: Tensor = forward_operator()(features, rois, levels, *pooling)
    return out


def scatter(grad: Tensor, rois: Tensor, levels: Tensor | None, maps: Maps, pooling: Pooling) -> list[Tensor]:
    """Call the backward operator; see `reference.backward`."""
    grads: list[Tensor] = backward_operator()(grad, rois, levels, *maps, *pooling)
    return grads

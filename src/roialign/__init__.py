"""Pool regions of interest from a feature pyramid: correct, everywhere PyTorch runs."""

from collections.abc import Callable as _Callable
from typing import Any as _Any

from .convert import convert_poolers
from .functional import multiscale_roi_align, roi_align
from .mapper import LevelMapper
from .pooler import MultiScaleRoIAlign, RoIAlign

__version__ = "0.1.0"

__all__ = [
    "LevelMapper",
    "MultiScaleRoIAlign",
    "RoIAlign",
    "convert_poolers",
    "decompositions",
    "multiscale_roi_align",
    "roi_align",
]


def decompositions() -> dict[_Any, _Callable[..., _Any]]:
    """The operators of this package in plain ATen, for a program that is to run where it is not installed.

    Returns:
        A table for `torch.export.ExportedProgram.run_decompositions`. No shape of the result depends on
        the values of boxes, and a box that names an image or a level that does not exist gives NaN.

    Examples:
        >>> pooler = RoIAlign(7, spatial_scale=1 / 4, sampling_ratio=2)
        >>> rois = torch.tensor([[0.0, 10.0, 20.0, 90.0, 120.0]])
        >>> program = torch.export.export(pooler, (torch.rand(1, 8, 40, 40), rois))
        >>> lowered = program.run_decompositions(decompositions())
        >>> any("roialign" in str(node.target) for node in lowered.graph.nodes)
        False
    """
    from .lowering import decompositions  # what it needs of torch takes a while to import

    return decompositions()

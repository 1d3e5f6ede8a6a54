"""Pool regions of interest from a feature pyramid: correct, everywhere PyTorch runs."""

from .convert import convert_poolers
from .functional import multiscale_roi_align, roi_align
from .levels import LevelMapper
from .pooler import MultiScaleRoIAlign, RoIAlign

__version__ = "0.1.0"

__all__ = [
    "LevelMapper",
    "MultiScaleRoIAlign",
    "RoIAlign",
    "convert_poolers",
    "multiscale_roi_align",
    "roi_align",
]

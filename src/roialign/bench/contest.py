"""Ours and torchvision's side by side: what is called, and whether it agrees."""

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..doctor import first_line, max_or_nan
from .timing import Effort, milliseconds, ratio
from .workloads import ROIALIGN, Call, Library, Size, Workload, make_call

OURS, THEIRS = "roialign", "torchvision"


def find_libraries() -> tuple[dict[str, Library], dict[str, str]]:
    """What is compared, by name; and if torchvision's cannot be used, why."""
    try:
        theirs = importlib.import_module("torchvision.ops")
        return {OURS: ROIALIGN, THEIRS: Library(theirs.MultiScaleRoIAlign, theirs.roi_align)}, {}
    except Exception as error:  # "operator torchvision::nms does not exist" and its kin
        return {OURS: ROIALIGN}, {THEIRS: first_line(error)}


def make_calls(
    workload: Workload, size: Size, maps: Mapping[str, Tensor], libraries: Mapping[str, Library]
) -> dict[str, Call]:
    """Ours in the dtype of the workload, torchvision's in one that it has."""
    dtypes = {OURS: workload.dtype, THEIRS: workload.their_dtype}
    return {
        name: make_call(workload, size, {k: f.to(dtypes[name]) for k, f in maps.items()}, library)
        for name, library in libraries.items()
    }


def race(calls: Mapping[str, Call], effort: Effort) -> dict[str, Any]:
    """Times of the calls, by turns, and the ratio of torchvision's to ours."""
    ms = milliseconds(calls, effort)
    return {"ms": ms, "ratio": ratio(ms[THEIRS], ms[OURS]) if THEIRS in ms else None}


def agreement(workload: Workload, calls: Mapping[str, Call], orders: Mapping[str, Tensor]) -> dict[str, Any]:
    """The largest difference of results from ours, relative to the largest value, and whether it may be.

    Args:
        workload: which says how far results may lie apart.
        calls: by name.
        orders: `(K,)` by name, of those that sort the boxes: the box of each row of their results.
    """
    ours = [t.detach() for t in calls[OURS]()]
    found = {}
    for name, call in calls.items():
        if name in orders:
            found[name] = _difference([ours[0][orders[name]]], [torch.cat([*call()])])
        elif name != OURS:
            found[name] = _difference(ours, [t.detach() for t in call()])
    return {"differences": found, "agrees": found.get(THEIRS, 0.0) <= workload.tolerance}


def _difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Relative to the largest value of all: the gradient of a map without boxes is zero."""
    pairs = list(zip(ours, theirs, strict=True))
    apart = max_or_nan([float((a.to(b.dtype) - b).abs().max()) for a, b in pairs])
    return apart / max(max_or_nan([float(b.abs().max()) for b in theirs]), torch.finfo(torch.float32).tiny)

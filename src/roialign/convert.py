"""Swap the poolers of an existing model."""

import sys
from typing import Any, TypeVar

from torch import nn

from .levels import map_levels_of
from .pooler import RoIAlign

M = TypeVar("M", bound=nn.Module)


def convert_poolers(model: M) -> M:
    """Replace torchvision's poolers in a model by ours, in the manner of `convert_sync_batchnorm`.

    `torchvision.ops.MultiScaleRoIAlign` becomes `roialign.torchvision.MultiScaleRoIAlign` and
    `torchvision.ops.RoIAlign` becomes `roialign.RoIAlign`. Parameters, hooks and the training flag
    stay; a pooler used in two places stays one. Subclasses of the user's own are left alone.

    torchvision stores the scales it inferred from its first call; those are dropped, since ours
    are inferred anew on each call. Scales and a `map_levels` set by hand (scales that are no powers
    of two, a mapper that is not torchvision's) are kept.

    Args:
        model: any module; its submodules are replaced in place.

    Returns:
        The model, or its replacement if it is itself a pooler.
    """
    if "torchvision" not in sys.modules:  # then nothing in the model can be torchvision's
        return model
    replacements: dict[nn.Module, nn.Module] = {}
    for module in list(model.modules()):
        for name, child in module.named_children():
            if child not in replacements:
                replacements[child] = _replacement(child)
            setattr(module, name, replacements[child])
    return _replacement(model)  # type: ignore[return-value]


def _replacement(module: nn.Module) -> nn.Module:
    import torchvision.ops

    if type(module) is torchvision.ops.RoIAlign:
        return _clone(module, RoIAlign)
    if type(module) is not torchvision.ops.MultiScaleRoIAlign:
        return module

    from .torchvision import MultiScaleRoIAlign

    clone = _clone(module, MultiScaleRoIAlign, aligned=False)
    if _inferred(module):
        clone.scales = clone.map_levels = None
    elif clone.scales is not None and clone.map_levels is None:  # torchvision would infer both
        clone.scales = None
    return clone


def _clone(module: nn.Module, cls: type[nn.Module], **more: Any) -> Any:
    """A module of class `cls` with the state of `module`, hooks included."""
    clone = cls.__new__(cls)
    clone.__dict__.update(module.__dict__, **more)
    return clone


def _inferred(module: Any) -> bool:
    """Whether scales and mapper can be what torchvision inferred, rather than set by hand."""
    from torchvision.ops.poolers import LevelMapper

    if module.scales is None or type(module.map_levels) is not LevelMapper:
        return False
    return all(scale == 0.5**k for scale, k in zip(module.scales, map_levels_of(module.scales), strict=True))

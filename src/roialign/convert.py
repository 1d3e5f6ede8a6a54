"""Swap the poolers of an existing model."""

import math
import sys
from typing import Any, TypeVar, cast

from torch import nn

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
    return cast(M, _replacement(model))


def _replacement(module: nn.Module) -> nn.Module:
    import torchvision.ops

    if type(module) is torchvision.ops.RoIAlign:
        return _clone(module, RoIAlign)
    if type(module) is not torchvision.ops.MultiScaleRoIAlign:
        return module

    from .torchvision import MultiScaleRoIAlign

    by_hand = _set_by_hand(module)
    return _clone(
        module,
        MultiScaleRoIAlign,
        aligned=False,
        scales=module.scales if by_hand else None,
        map_levels=module.map_levels if by_hand else None,
    )


def _clone(module: nn.Module, cls: type[nn.Module], **more: object) -> nn.Module:
    """A module of class `cls` with the state of `module`, hooks included."""
    clone = cls.__new__(cls)
    clone.__dict__.update(module.__dict__, **more)
    return clone


def _set_by_hand(pooler: Any) -> bool:
    """Whether scales and mapper are a user's, rather than what torchvision inferred and stored."""
    from torchvision.ops.poolers import LevelMapper

    if pooler.scales is None or pooler.map_levels is None:  # then torchvision infers both anew
        return False
    inferable = all(scale == 0.5 ** round(-math.log2(scale)) for scale in pooler.scales)
    return not (inferable and type(pooler.map_levels) is LevelMapper)

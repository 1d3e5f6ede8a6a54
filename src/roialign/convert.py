"""Make the poolers of an existing model ours."""

import warnings
from collections import deque
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import nn

from . import pooler

M = TypeVar("M", bound=nn.Module)

# By name: torchvision need not be installed, nor its classes stand where they stood.
MULTISCALE, SINGLE = "torchvision.ops.poolers.MultiScaleRoIAlign", "torchvision.ops.roi_align.RoIAlign"
SEARCHED = (nn.Module, dict, list, tuple, deque, set, frozenset)


class FoundPooler(NamedTuple):
    """A place in a model that holds a pooler, and what `convert_poolers` makes of it.

    Attributes:
        name: the place, as Python writes it: `roi_heads.box_roi_pool`, `heads.pools[0]`; `""` is the
            model itself.
        module: the pooler. One with several names stands in several places.
        outcome: `"ours"`, by construction or converted; `"convertible"`, torchvision's; or `"left"`,
            torchvision's in a way that cannot be converted.
        reason: why it is left, else `""`.
    """

    name: str
    module: nn.Module
    outcome: Literal["ours", "convertible", "left"]
    reason: str = ""


def convert_poolers(model: M) -> M:
    """Turn torchvision's poolers in a model into ours, in place.

    `torchvision.ops.MultiScaleRoIAlign` becomes `roialign.torchvision.MultiScaleRoIAlign` and
    `torchvision.ops.RoIAlign` becomes `roialign.RoIAlign`. The objects stay and change their class:
    whatever holds one of them holds it still, and state, hooks and the training flag are its own.

    torchvision stores the scales it inferred from its first call; those are dropped, since ours
    are inferred anew on each call. Scales and a `map_levels` set by hand (scales that are no powers
    of two, a mapper that is not the one torchvision infers with them) are kept.

    Args:
        model: any module. `find_poolers` says where its poolers are looked for.

    Returns:
        The model.

    Warns:
        UserWarning: poolers of torchvision were left, each with its name and the reason: one whose
            `forward` was replaced on the instance, of a class of the user's own, or in TorchScript.
    """
    found = find_poolers(model)
    for module in {place.module for place in found if place.outcome == "convertible"}:
        _convert(module)
    left = [f"{place.name or 'the model itself'} ({place.reason})" for place in found if place.reason]
    if left:
        warnings.warn(f"convert_poolers left poolers of torchvision: {'; '.join(left)}", stacklevel=2)
    return model


def find_poolers(model: nn.Module) -> list[FoundPooler]:
    """List the poolers of a model: before `convert_poolers` what it will do, afterwards what it did.

    They are looked for among the submodules, and in all attributes of the model and its submodules
    that are modules, dicts, lists, tuples, sets or deques, or such in one another. A pooler that is only
    in an object of another kind or in a closure is not found, nor is a call of
    `torchvision.ops.roi_align`.

    Args:
        model: any module.

    Returns:
        One entry per place, submodules first; what stands in several places is searched at the first.

    Examples:
        >>> model = torch.nn.Sequential(pooler.RoIAlign(7, 1.0, 2))
        >>> [(place.name, place.outcome) for place in find_poolers(model)]
        [('0', 'ours')]
    """
    judged = ((name, module, _outcome(module)) for name, module in _modules(model))
    return [FoundPooler(name, module, *outcome) for name, module, outcome in judged if outcome]


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Each place of a module in a model; the inside of what has several places is walked once."""
    waiting: list[tuple[str, Any]] = [("", model)]
    walked = set()
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, nn.Module):
            yield name, value
        if id(value) not in walked:
            walked.add(id(value))
            # By type(): isinstance asks the object, and a lazy proxy may then raise.
            held = [item for item in _held(name, value) if issubclass(type(item[1]), SEARCHED)]
            waiting.extend(reversed(held))


def _held(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What a module or container holds, by name. Attributes from where they are stored: none is computed."""
    if isinstance(value, nn.Module):
        attributes = dict(vars(value))
        submodules = attributes.pop("_modules", {})
        for key, held in [*submodules.items(), *attributes.items()]:
            yield f"{name}.{key}" if name else key, held
    elif isinstance(value, dict):
        yield from ((f"{name}[{key!r}]", held) for key, held in list(value.items()))
    else:
        yield from ((f"{name}[{i}]", held) for i, held in enumerate(list(value)))


def _outcome(module: nn.Module) -> tuple[Any, ...]:
    """Outcome and reason for a pooler, nothing for another module."""
    if isinstance(module, (pooler.MultiScaleRoIAlign, pooler.RoIAlign)):
        return ("ours",)
    names = _class_names(module)
    if MULTISCALE not in names and SINGLE not in names:
        return ()
    if isinstance(module, torch.jit.ScriptModule):
        return "left", "TorchScript has compiled it: convert before that"
    if names[0] not in (MULTISCALE, SINGLE):
        return "left", f"its class, {names[0]}, is a subclass of torchvision's"
    if "forward" in vars(module):
        return "left", "its forward was replaced on the instance: convert before that"
    return ("convertible",)


def _class_names(module: nn.Module) -> list[str]:
    """The full names of a module's class and its bases; in TorchScript, of the class it was made from."""
    if isinstance(module, torch.jit.ScriptModule):
        path = module._c._type().qualified_name().split(".")
        return [".".join(part for part in path if not part.startswith("__"))]  # __torch__, ___torch_mangle_0
    return [f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__]


def _convert(module: Any) -> None:
    """Change the class: all that refers to the module, compiled code included, then refers to ours."""
    if _class_names(module)[0] == SINGLE:
        module.__class__ = pooler.RoIAlign
        return

    from .torchvision import MultiScaleRoIAlign

    state = pooler.from_torchvision(vars(module))
    module.__class__ = MultiScaleRoIAlign
    vars(module).update(state)

"""When calling an operator of PyTorch comes to calling its kernel, so that the way there can be saved.

The dispatcher asks all who may have a say in a call: transforms, modes, tracers, subclasses, autograd. For a
kernel in Python that takes some ten microseconds, longer than a small pooling, and it lets go of the
interpreter's lock, which beside a busy thread costs milliseconds. Whoever has a say has left a mark, on the
tensors or on the thread. These functions look for any mark but those that are always there: so what they do
not know, also what PyTorch has yet to think of, goes through the dispatcher.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_C: Any = torch._C
_CLASSES = frozenset((Tensor, torch.nn.Parameter))


def _bits(*names: str) -> int:
    keys = _C.DispatchKeySet(_C._parse_dispatch_key(names[0]))
    for name in names[1:]:
        keys = keys.add(_C._parse_dispatch_key(name))
    return int(keys.raw_repr())


try:
    _keys_of = _C._dispatch_keys
    _included = _C._dispatch_tls_local_include_set
    _excluded = _C._dispatch_tls_local_exclude_set
    _has_function_mode = _C._is_torch_function_mode_enabled
    _has_profiler = _C._autograd._profiler_enabled
    # All that dense tensors of the CPU have. Others have more: views that are yet to be conjugated or
    # negated, zeros without memory, batched, functional, sparse, quantised tensors, those of other devices.
    _STRANGE = ~_bits("CPU", "ADInplaceOrView", "AutogradCPU", "AutocastCPU")
    # All that a thread has of itself: modes, transforms and tracers add to it.
    _ACTIVE = ~_bits("BackendSelect", "ADInplaceOrView")
    _AUTOGRAD = _bits("AutogradCPU") & ~_bits("CPU")
    _complete = isinstance(forward_ad._current_level, int)
except Exception:  # no part of this is public
    _complete = False


def is_plain(tensors: Iterable[Tensor]) -> bool:
    """Whether nobody but autograd has a say in what is done with these tensors, here and now."""
    if (
        torch.compiler.is_compiling()  # first: to a compiler it is a constant
        or not _complete
        or _included().raw_repr() & _ACTIVE
        or _has_function_mode()
        or _has_profiler()  # which is to show the operator
        or forward_ad._current_level >= 0  # tensors with tangents have no mark
    ):
        return False
    strange = [type(t) not in _CLASSES or _keys_of(t).raw_repr() & _STRANGE for t in tensors]
    return not any(strange)  # subclasses, too, need not have a mark


def is_recorded(tensors: Iterable[Tensor]) -> bool:
    """Whether autograd has a say: it is on, and some of these tensors require gradients."""
    return torch.is_grad_enabled() and True in [t.requires_grad for t in tensors]


def autograd_is_below() -> bool:
    """Whether the thread is below autograd, as it is within an operator: then nothing is recorded."""
    return bool(_excluded().raw_repr() & _AUTOGRAD)

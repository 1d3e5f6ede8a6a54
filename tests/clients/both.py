"""The same client with torchvision's engine and with ours, judged by the client with pooling in float64.

A step is a function without arguments that runs a client as a program would, and returns lists of
tensors by name: outputs, and gradients. It must do the same each time it is called.
"""

import contextlib
import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from roialign import ops
from roialign.torchvision import install

Tensors = dict[str, list[Tensor]]
Step = Callable[[], Tensors]
Pool = Callable[..., Tensor]


def assert_same(step: Step) -> None:
    """Ours is as near to the client with exact pooling as torchvision's is, and it is ours that ran.

    Exact: torchvision's operator in float64, rounded once. The budget is that of `roialign.testing`, for
    the client as a whole: of a single number either may by chance be right to the last bit.
    """
    with replaced(in_float64):
        truth = step()
    theirs = step()
    with install(), engine_calls() as calls:
        ours = step()
    assert calls
    for name, tensors in truth.items():
        shapes = [(t.dtype, t.shape) for t in tensors]
        assert [(t.dtype, t.shape) for t in ours[name]] == shapes
        assert [(t.dtype, t.shape) for t in theirs[name]] == shapes
    assert error(ours, truth) <= 2 * error(theirs, truth) + rounding(truth)


def error(got: Tensors, truth: Tensors) -> float:
    """The largest error, in units of the largest value of the same name."""
    errors = []
    for name, exact in truth.items():
        pairs = zip(got[name], exact, strict=True)
        worst = torch.stack([(g.double() - t.double()).abs().max() for g, t in pairs if t.numel()]).max()
        errors.append(worst / max(float(t.abs().max()) for t in exact if t.numel()))
    return float(torch.stack(errors).max())  # NaN if anything is


def rounding(truth: Tensors) -> float:
    """One rounding to the coarsest dtype."""
    return max(torch.finfo(t.dtype).eps for tensors in truth.values() for t in tensors)


def loss_of(tensors: Iterable[Tensor]) -> Tensor:
    """A sum with weights at random, the same ones every time: no symmetry of a client cancels it."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack([(t.float() * torch.randn(t.shape, generator=generator)).sum() for t in tensors]).sum()


def gradients_of(model: torch.nn.Module) -> list[Tensor]:
    """Those of all parameters that got one."""
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@contextlib.contextmanager
def engine_calls() -> Iterator[list[Any]]:
    """What our engine is asked for meanwhile."""
    engine, calls = ops.engine("cpu"), []
    forward = engine.forward

    @functools.wraps(forward)
    def counted(*args: Any) -> Any:
        calls.append(args[0].shape)
        return forward(*args)

    engine.forward = counted
    try:
        yield calls
    finally:
        engine.forward = forward


@contextlib.contextmanager
def replaced(wrap: Callable[[Pool], Pool]) -> Iterator[None]:
    """Wrap torchvision's `roi_align`, by every name it was imported under, and the multi-scale module."""
    original = torchvision.ops.roi_align
    forward = torchvision.ops.MultiScaleRoIAlign.forward
    wrapped = wrap(original)
    modules = [
        m for m in list(sys.modules.values()) if getattr(m, "__dict__", {}).get("roi_align") is original
    ]
    try:
        for module in modules:
            module.roi_align = wrapped
        torchvision.ops.MultiScaleRoIAlign.forward = wrap(forward)
        yield
    finally:
        for module in modules:
            module.roi_align = original
        torchvision.ops.MultiScaleRoIAlign.forward = forward


def in_float64(pool: Pool) -> Pool:
    """Pool in float64, and round once to the dtype of the maps."""

    @functools.wraps(pool)
    def exact(*args: Any, **kwargs: Any) -> Tensor:
        dtype = next(t.dtype for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
        args, kwargs = tree_map_only(Tensor, lambda t: t.double(), (args, kwargs))
        return pool(*args, **kwargs).to(dtype)

    return exact


@dataclass(frozen=True)
class Call:
    """What a client asked torchvision to pool."""

    pool: Pool
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def forward(self) -> Tensor:
        return self.pool(*self.args, **self.kwargs)

    def leaves(self) -> list[Tensor]:
        """Maps that need a gradient; boxes get none from torchvision."""
        tensors = [t for t in tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor)]
        return [t for t in tensors if t.requires_grad and t.dim() == 4]

    def both_ways(self) -> None:
        """Forward, and backward where the client goes backward."""
        pooled, leaves = self.forward(), self.leaves()
        if leaves and pooled.requires_grad:
            torch.autograd.grad(pooled, leaves, torch.ones_like(pooled), allow_unused=True)


def recorded(step: Step) -> list[Call]:
    """Run a step and keep what it pools, with maps as they lie in memory."""
    calls: list[Call] = []
    inside = False

    def wrap(pool: Pool) -> Pool:
        @functools.wraps(pool)
        def record(*args: Any, **kwargs: Any) -> Tensor:
            nonlocal inside
            if inside:  # one level of a multi-scale call
                return pool(*args, **kwargs)
            kept = tree_map_only(Tensor, lambda t: t.detach().requires_grad_(t.requires_grad), (args, kwargs))
            calls.append(Call(pool, *kept))
            inside = True
            try:
                return pool(*args, **kwargs)
            finally:
                inside = False

        return record

    with replaced(wrap):
        step()
    return calls


def medians(run: Callable[[], object], turns: int, least: float = 0.01) -> tuple[float, float]:
    """Seconds of one run with torchvision's engine and with ours: medians of turns of at least 10 ms."""
    started = time.perf_counter()
    run()
    repeats = max(1, round(least / (time.perf_counter() - started)))
    with install():
        run()  # compiles
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(turns):
        for ours in (False, True):
            with install() if ours else contextlib.nullcontext():
                started = time.perf_counter()
                for _ in range(repeats):
                    run()
                seconds[ours].append((time.perf_counter() - started) / repeats)
    return statistics.median(seconds[False]), statistics.median(seconds[True])

"""Compile the kernels ahead, so that no first call has to wait: once per machine, or per container image.

Kernels are kept on disk beside the source, or, where that cannot be written, in the user's cache
folder; the environment variable `NUMBA_CACHE_DIR` overrides both. They are made for the CPU at hand:
another kind of CPU compiles its own. For an image that runs on many kinds, choose one that all of them
contain, when compiling and when running, by Numba's `NUMBA_CPU_NAME` and `NUMBA_CPU_FEATURES`.
"""

import argparse
import itertools
import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from . import multiscale_roi_align, ops, schema

HELP = "compile the kernels ahead, for a container image"

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in schema.DTYPES}
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
GRIDS = {"fixed": 2, "adaptive": 0}

Step = TypeVar("Step")


class Variant(NamedTuple):
    """What kernels are compiled for, by name."""

    dtype: str
    layout: str
    grid: str

    def __str__(self) -> str:
        return f"{self.dtype}, {self.layout}, {self.grid} grid"


class _Notes(logging.Handler):
    """What the engine logs while it compiles: why kernels cannot be kept."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=list(DTYPES),
        default=list(DTYPES),
        metavar="DTYPE",
        help=f"of the feature maps (default: {' '.join(DTYPES)})",
    )


def run(args: argparse.Namespace) -> int:
    """Compile, and say where to and how long it took; 1 if the kernels cannot be kept."""
    logger, notes = logging.getLogger("roialign"), _Notes()
    logger.addHandler(notes)
    start = time.perf_counter()
    try:
        cache_folder = getattr(ops.engine("cpu"), "cache_folder", None)
        if cache_folder is None:
            return _fail("there is nothing to compile: the CPU engine cannot be used; see doctor")
        before = kept_files(cache_folder())
        for variant in track("compiling", variants(args.dtypes)):
            compile_variant(variant)
    finally:
        logger.removeHandler(notes)
    seconds = time.perf_counter() - start
    after = kept_files(cache_folder())
    if notes.lines or not after:
        return _fail(notes.lines[0] if notes.lines else "compiled kernels cannot be kept")
    megabytes = sum(stat.st_size for stat in after.values()) / 1e6
    new = sum(
        path not in before or stat.st_mtime_ns > before[path].st_mtime_ns for path, stat in after.items()
    )
    print(f"{len(after)} files, {megabytes:.1f} MB, {new} of them new, in {seconds:.1f} s")
    print(f"The kernels are kept in {cache_folder()}")
    return 0


def _fail(reason: str) -> int:
    print(f"python -m roialign warmup: {reason}", file=sys.stderr)
    return 1


def kept_files(folder: str | None) -> dict[Path, os.stat_result]:
    """The files of compiled kernels in the cache folder; none if there is no folder."""
    return {} if folder is None else {path: path.stat() for path in Path(folder).glob("*.nb?")}


def variants(dtypes: Iterable[str]) -> list[Variant]:
    """All combinations with layouts and grids."""
    return list(itertools.starmap(Variant, itertools.product(dtypes, LAYOUTS, GRIDS)))


def compile_variant(variant: Variant) -> None:
    """Pool forward and backward from two tiny maps, which compiles or loads whatever that takes."""
    box = torch.tensor([[1.0, 1.0, 9.0, 9.0]])
    scales, ratio = [1 / 4, 1 / 8], GRIDS[variant.grid]
    for channels, boxes in sizes():
        features = [
            torch.zeros(1, channels, size, size, dtype=DTYPES[variant.dtype])
            .contiguous(memory_format=LAYOUTS[variant.layout])
            .requires_grad_()
            for size in (8, 4)
        ]
        rois = [box.expand(boxes, 4)]
        pooled = multiscale_roi_align(features, rois, 2, scales=scales, sampling_ratio=ratio)
        torch.autograd.grad(pooled, features, torch.zeros_like(pooled), retain_graph=True)
        torch.autograd.grad(pooled.sum(), features)  # whose gradient is one number, expanded


def sizes() -> tuple[tuple[int, int], ...]:
    """Numbers of channels and boxes that are served by different kernels.

    Few; as many channels as are read in place; and, in the other layout, as many boxes as are worth sharing.
    """
    from .cpu.direct import WIDE  # with Numba: not before it is needed
    from .cpu.engine import FEW, FEW_BACKWARD

    wide = int(WIDE)
    return (1, 1), (wide, -(-max(FEW, FEW_BACKWARD) // wide))


def track(title: str, steps: Sequence[Step]) -> Iterator[Step]:
    """Yield the steps one by one, showing how far they are: a bar on a terminal, else plain lines.

    Args:
        title: what is done to the steps.
        steps: `str()` of each is shown while it is worked on.
    """
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        yield from _track_lines(title, steps)
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield from _track_lines(title, steps)
        return
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(title, total=len(steps))
        for step in steps:
            progress.update(task, description=f"{title}: {step}")
            yield step
            progress.advance(task)


def _track_lines(title: str, steps: Sequence[Step]) -> Iterator[Step]:
    for i, step in enumerate(steps, 1):
        print(f"{title} {i}/{len(steps)}: {step}", file=sys.stderr, flush=True)
        yield step

"""What a call launches: our engine's kernels, as Triton compiles them, and torchvision's, from its wheel."""

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

from roialign.gpu import engine
from roialign.layout import is_channels_last
from roialign.schema import Pooling

sys.path.append(str(Path(__file__).parents[2] / "tests"))
from gpu_compiled import TOOLS, Driver

CAPABILITY = 90
THEIR_THREADS, THEIR_MOST_PROGRAMS = 512, 4096  # of roi_align_kernel.cu


class Launch(NamedTuple):
    """A kernel and what it is launched with."""

    name: str
    ptx: str
    arguments: list[Any]  # tensors and numbers, as the PTX takes them
    grid: int
    threads: int
    shared: int
    options: tuple[str, ...]  # of the assembler


def _flat(signature: Any, argument: Any) -> Iterator[Any]:
    """The arguments that the compiled kernel takes: not those that were compiled in."""
    if isinstance(signature, tuple):
        for s, a in zip(signature, argument, strict=True):
            yield from _flat(s, a)
    elif signature != "constexpr":
        yield argument


@contextmanager
def recorded(then: Callable[[Launch], None]) -> Iterator[None]:
    """Within, our launches are compiled and handed to a function, not launched."""
    run = JITFunction.run

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        bound = dict(zip(self.signature.parameters, args, strict=False)) | options
        arguments = [a for name, s in kernel.src.signature.items() for a in _flat(s, bound[name])]
        meta = kernel.metadata
        assert meta.global_scratch_size == 0, "scratch is not modelled"
        assert all(n == 1 for n in grid[1:]), "grids of two dimensions are not modelled"
        then(
            Launch(
                meta.name, kernel.asm["ptx"], [*arguments, 0, 0], grid[0], 32 * meta.num_warps, meta.shared,
                () if meta.enable_fp_fusion else ("--fmad=false",),
            )
        )  # fmt: skip

    triton.runtime.driver.set_active(Driver(CAPABILITY))
    JITFunction.run = record
    try:
        yield
    finally:
        JITFunction.run = run


def ours(features: list[Tensor], rois: Tensor, pooling: Pooling, grad: Tensor | None) -> list[Launch]:
    """Of a forward pass, or of a backward pass if there is a gradient."""
    launches: list[Launch] = []
    with recorded(launches.append):
        if grad is None:
            shape = (len(rois), features[0].shape[1], *pooling.output_size)
            out = engine.empty(shape, features[0].dtype, rois.device, is_channels_last(features[0]))
            engine.forward(out, features, rois, None, pooling)
        else:
            engine.backward([torch.empty_like(f) for f in features], grad, rois, None, pooling)
    return launches


def _their_ptx() -> dict[str, str]:
    """The two kernels of torchvision for float32, by `forward` and `backward`.

    The wheel holds machine code for the GPU, too, but PTX can be run here. It is that of the newest GPU.
    """
    library = next(Path(torchvision.__file__).parent.glob("_C*.so"))
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [TOOLS / "cuobjdump", "-xptx", "all", library], cwd=folder, check=True, capture_output=True
        )
        texts = [path.read_text() for path in sorted(Path(folder).glob("*.ptx"))]
    kernels = {}
    for text in texts:
        header = f".version 8.0\n.target sm_{CAPABILITY}\n.address_size 64\n"  # any that knows the target
        for entry in re.split(r"(?=(?:\.visible |\.weak )?\.entry )", text)[1:]:
            name = re.search(r"\d\droi_align_(forward|backward)_kernel_implIfE", entry.split("(")[0])
            if name and "ps_roi" not in entry.split("(")[0]:
                kernels.setdefault(name[1], header + entry[: entry.index("\n}") + 2])
    assert sorted(kernels) == ["backward", "forward"], "torchvision's library has other kernels"
    return kernels


def theirs(features: list[Tensor], rois: Tensor, pooling: Pooling, grad: Tensor | None) -> Iterator[Launch]:
    """Those of torchvision: one per map that has RoIs, on contiguous copies."""
    kernels = _their_ptx()
    step = pooling.staircase
    area = (rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])
    thresholds = torch.tensor(step.thresholds, dtype=rois.dtype)
    level = torch.tensor(step.order)[torch.searchsorted(thresholds, area, right=True)]
    for i, (f, scale) in enumerate(zip(features, pooling.scales, strict=True)):
        mine = rois[level == i].contiguous()
        _, channels, height, width = f.shape
        out = torch.zeros(len(mine), channels, *pooling.output_size)
        sizes = [channels, height, width, *pooling.output_size, pooling.sampling_ratio]
        grid = min(-(-out.numel() // THEIR_THREADS), THEIR_MOST_PROGRAMS)
        first = [out.numel(), out if grad is not None else torch.empty(f.shape), float(scale), *sizes]
        if grad is None:
            arguments = [*first, int(pooling.aligned), mine, out]
        else:
            target = torch.zeros(f.shape)
            arguments = [*first, int(pooling.aligned), target, mine, *out.stride(), target.numel()]
        kind = "forward" if grad is None else "backward"
        if len(mine):
            yield Launch(f"{kind} of map {i}", kernels[kind], arguments, grid, THEIR_THREADS, 0, ())

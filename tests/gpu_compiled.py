"""Compile the GPU engine's kernels as it launches them, for GPUs that need not be here.

Prints registers and shared memory, and fails if anything is spilled to local memory, if a kernel more is
launched than should be, or if the host looks at a value, for which it would have to wait.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from roialign.gpu import engine
from roialign.layout import is_channels_last
from roialign.levels import staircase
from roialign.rois import working_dtype
from roialign.schema import Pooling
from roialign.taps import EXACT
from roialign.testing import pyramid

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Case(NamedTuple):
    """What decides which kernels are launched."""

    output_size: tuple[int, int] = (7, 7)
    ratio: int = 2
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    strides: tuple[int, ...] = (4, 8, 16, 32)
    channels: int = 256
    aligned: bool = False
    levels_given: bool = False
    stretch: float = 1.0  # of the scales along x against those along y
    derivative: int = 0

    def __str__(self) -> str:
        grid = {0: "adaptive", EXACT: "exact"}.get(self.ratio, f"ratio {self.ratio}")
        size = "{}x{}".format(*self.output_size)
        maps = f"{len(self.strides)} maps"
        scales, column = (
            "x, y" if self.stretch != 1 else "both",
            ("", "x1", "y1", "x2", "y2")[self.derivative],
        )
        what = f"{str(self.dtype)[6:]:8} {self.layout:13} {size:5} {grid:8}"
        return f"{what} {maps} {scales:6} {column:10} {self.channels:3}"


EIGHT = (2, 4, 8, 16, 32, 64, 128, 256)
CASES = [
    *(
        Case(output_size, ratio, dtype, layout)
        for layout in ("contiguous", "channels_last")
        for output_size, ratio, dtype in (
            ((7, 7), 2, torch.float32),
            ((7, 7), 0, torch.float32),
            ((14, 14), 2, torch.float32),
            ((7, 7), 2, torch.bfloat16),
            ((7, 7), 2, torch.float64),
            ((14, 14), 0, torch.float64),
        )
    ),
    Case(dtype=torch.float16),
    Case(dtype=torch.float16, layout="channels_last", ratio=0),
    Case(ratio=EXACT),
    Case(ratio=EXACT, layout="channels_last"),
    Case(strides=EIGHT),
    Case(strides=EIGHT, layout="channels_last", ratio=0),
    Case((1, 1), strides=(16,), aligned=True, levels_given=True, layout="sliced", channels=100),
    Case((3, 14), 6, strides=(16,), aligned=True),
    Case(stretch=0.5),
    Case(stretch=0.5, ratio=0, layout="channels_last"),
    Case(derivative=1),
    Case(derivative=2, layout="channels_last"),
    Case(derivative=3, ratio=0, dtype=torch.bfloat16, layout="channels_last"),
    Case(derivative=4, ratio=EXACT, stretch=0.5, aligned=True),
    Case((14, 14), derivative=1, dtype=torch.float64),
    Case((14, 14), derivative=4, ratio=0, dtype=torch.float64),
]


class Driver:
    """What Triton asks about the device when it compiles."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


def launched(case: Case) -> list[Any]:
    """The kernels that pooling, forward and backward, would launch.

    The tensors have no values, so the engine cannot have looked at any: it does not wait for the GPU.
    """
    kernels = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernels.append(run(self, *args, grid=grid, warmup=True, **options))

    features = pyramid(
        case.strides, image_size=(256, 320), images=2, channels=case.channels, dtype=case.dtype,
        layout=case.layout,
    )  # fmt: skip
    features = [f.to("meta") for f in features]
    rois = torch.empty(1000, 5, dtype=working_dtype(features), device="meta")
    levels = torch.empty(1000, dtype=torch.int64, device="meta") if case.levels_given else None
    shape = (1000, case.channels, *case.output_size)
    out = engine.empty(shape, case.dtype, rois.device, is_channels_last(features[0]))
    scales = [1 / s for s in case.strides]
    steps = staircase(scales, 224, 4, rois.dtype)
    if case.stretch != 1:
        scales = [factor * scale for scale in scales for factor in (1, case.stretch)]
    pooling = Pooling(
        case.output_size, scales, case.ratio, case.aligned, *steps, derivative=case.derivative
    )  # fmt: skip
    JITFunction.run = compile_only
    try:
        engine.forward(out, features, rois, levels, pooling)
        first, forward = [k.metadata.name for k in kernels]
        assert first == ("place" if case.ratio > 0 else "write_for_bins")
        assert forward in ("forward_along_channels", "forward_along_taps")
        engine.backward(features, out, rois, levels, pooling)
        assert [k.metadata.name for k in kernels[2:]] in (
            ["prepare", "backward"],
            ["prepare", "backward", "add_up"],
        )
    finally:
        JITFunction.run = run
    return kernels


def usage(kernel: Any) -> dict[str, int]:
    """Registers, and bytes of stack, shared and local memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "--dump-resource-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(n) for name, n in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", printed)}
    assert len(found) == 4, printed
    return found


def main() -> None:
    spilled = []
    what = f"{'':10} {'':22} {'dtype':8} {'layout':13} {'bins':5} {'grid':8}"
    print(f"{what} {'':6} {'scales':6} derivative {'C':>3} registers shared")
    for capability in map(int, sys.argv[1:] or (80, 90, 100)):
        triton.runtime.driver.set_active(Driver(capability))
        for case in CASES:
            for kernel in launched(case):
                use = usage(kernel)
                row = f"{capability:>10} {kernel.metadata.name:22} {case}"
                print(f"{row} {use['REG']:>9} {use['SHARED']:>6}", flush=True)
                if use["STACK"] or use["LOCAL"]:
                    spilled.append(f"{row} {use}")
    assert not spilled, "\n".join(spilled)
    print("no spills")


if __name__ == "__main__":
    main()

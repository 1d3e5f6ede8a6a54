"""Compile the GPU engine's kernels as it launches them, for GPUs that need not be here.

Prints registers and shared memory, and fails if anything is spilled to local memory.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from roialign.gpu import engine
from roialign.testing import pyramid

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
STRIDES = [4, 8, 16, 32]
SIZE = (256, 320)
CASES = [((7, 7), 2), ((7, 7), 0), ((14, 14), 2)]


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


def launched(output_size: tuple[int, int], ratio: int, dtype: torch.dtype, layout: str) -> list[Any]:
    """The kernels that pooling, forward and backward, would launch."""
    kernels = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernels.append(run(self, *args, grid=grid, warmup=True, **options))

    features = pyramid(STRIDES, image_size=SIZE, images=2, channels=256, dtype=dtype, layout=layout)
    rois = torch.zeros(1000, 5)
    channels_last = layout == "channels_last"
    out = engine.empty((1000, 256, *output_size), dtype, rois.device, channels_last)
    rest = (rois, None, [1 / s for s in STRIDES], ratio, False, 224.0, 4.0)
    JITFunction.run = compile_only
    try:
        engine.forward(out, features, *rest)
        engine.backward(features, out, *rest)
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
    print(f"{'capability':>10} {'kernel':8} {'dtype':8} {'layout':13} {'case':13} registers shared")
    for capability in map(int, sys.argv[1:] or (80, 90, 100)):
        triton.runtime.driver.set_active(Driver(capability))
        for dtype in (torch.float32, torch.bfloat16):
            for layout in ("contiguous", "channels_last"):
                for output_size, ratio in CASES:
                    for kernel in launched(output_size, ratio, dtype, layout):
                        use = usage(kernel)
                        case = f"{output_size[0]}x{output_size[1]} {'ratio 2' if ratio else 'adaptive'}"
                        name, short = kernel.metadata.name, str(dtype).removeprefix("torch.")
                        row = f"{capability:>10} {name:8} {short:8} {layout:13} {case:14}"
                        print(f"{row} {use['REG']:>8} {use['SHARED']:>6}", flush=True)
                        if use["STACK"] or use["LOCAL"]:
                            spilled.append(f"{row} {use}")
    assert not spilled, "\n".join(spilled)
    print("no spills")


if __name__ == "__main__":
    main()

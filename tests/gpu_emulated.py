"""Run the checks of `gpu_interpreted`, but on the kernels as they are compiled: the PTX, in an emulator.

So what the compiler makes of them is tested, too, and that no lane reads or writes outside of a tensor.
"""

import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported
sys.path.insert(0, str(Path(__file__).parent.parent))

import gpu_interpreted
import numpy as np

from benchmarks.gpu_model import emulator, launches, ptx


def execute(launch: launches.Launch) -> None:
    """Run all programs at once, as if it were a GPU."""
    if launch.grid:
        emulator.run(ptx.parse(launch.ptx), launch, np.arange(launch.grid))


if __name__ == "__main__":
    with launches.recorded(execute):
        gpu_interpreted.main()

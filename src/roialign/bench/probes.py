"""The machine, what it can do at best, and what must be measured in a process of its own."""

import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import __version__
from .timing import Effort, time_by_turns
from .workloads import FULL, ROIALIGN, TINY, WORKLOADS, Call, Size, make_call, make_maps

_COPIED = 2**28  # bytes, beyond any cache

# Times are those of the calls; importing Numba and loading kernels are part of the first.
_FIRST_CALL = """
import json, time
start = time.perf_counter()
import torch
torch_there = time.perf_counter()
import roialign
all_there = time.perf_counter()
features = [torch.zeros(1, 16, 8, 8, requires_grad=True), torch.zeros(1, 16, 4, 4, requires_grad=True)]
boxes = [torch.tensor([[1.0, 1.0, 9.0, 9.0]])]
begin = time.perf_counter()
pooled = roialign.multiscale_roi_align(features, boxes, 7, [1 / 4, 1 / 8], 2)
forward = time.perf_counter()
pooled.sum().backward()
backward = time.perf_counter()
print(json.dumps({
    "import_s": all_there - torch_there, "forward_s": forward - begin, "backward_s": backward - forward
}))
"""
_IMPORT = _FIRST_CALL[: _FIRST_CALL.index("features")] + "print(all_there - torch_there)"
_ONE_LINE = """
from numba import njit
plus_one = njit(cache=True)(lambda x: x + 1)
"""
_FIRST_CALL_OF_NUMBA = """
import sys, time
import torch
sys.path.insert(0, sys.argv[1])
start = time.perf_counter()
from one_line import plus_one
plus_one(1)
print(time.perf_counter() - start)
"""
_MEMORY = """
import sys
from roialign.bench.probes import measure_memory
print(measure_memory(sys.argv[1], sys.argv[2] == "quick", int(sys.argv[3])))
"""


def machine() -> dict[str, Any]:
    """What the numbers depend on, beside the versions."""
    return {
        "cpu": _cpu_name(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,  # of others, before the start
        "system": f"{platform.system()} {platform.machine()}",
        "date": datetime.now(timezone.utc).isoformat(timespec="minutes"),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    """Versions of all that takes part; None if it is missing."""
    others = ("torchvision", "numba", "onnxruntime", "openvino")
    return {
        "roialign": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in others},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def floor(size: Size) -> dict[str, float]:
    """How fast memory can be copied, and how long the output of the box head takes to write at all."""
    copied = _COPIED if size == FULL else _COPIED // 16
    source, target = torch.ones(copied, dtype=torch.uint8), torch.ones(copied, dtype=torch.uint8)
    work = WORKLOADS["box-head"]
    shape = (size.boxes_of(work.boxes), size.channels, work.bins, work.bins)
    kept = torch.ones(shape)

    calls: dict[str, Callable[[], object]] = {
        "copy": lambda: target.copy_(source),
        "reused": lambda: kept.fill_(1),
        "fresh": lambda: torch.empty(shape).fill_(1),
        "huge": lambda: torch.from_numpy(np.empty(shape, np.float32)).fill_(1),  # NumPy asks for them
    }
    ms = {name: 1000 * min(times) for name, times in time_by_turns(calls, Effort(0.0, 9)).items()}
    return {
        "copy_gb_per_s": 2 * copied / ms["copy"] / 1e6,  # read and written
        "output_mb": kept.nbytes / 1e6,
        "write_reused_ms": ms["reused"],
        "write_fresh_ms": ms["fresh"],
        "write_fresh_huge_pages_ms": ms["huge"],
    }


def first_call() -> dict[str, Any]:
    """Seconds of the first calls in new processes: compiling, then from the disk; and of the import.

    What Numba alone takes of them is measured with a function of one line.
    """
    imports = [float(python(_IMPORT)) for _ in range(5)]
    with tempfile.TemporaryDirectory() as folder:
        cold, cached = (json.loads(python(_FIRST_CALL, NUMBA_CACHE_DIR=folder)) for _ in range(2))
        Path(folder, "one_line.py").write_text(_ONE_LINE, encoding="utf-8")
        with contextlib.suppress(subprocess.CalledProcessError):  # no Numba here
            for calls in (cold, cached):
                calls["numba_s"] = float(python(_FIRST_CALL_OF_NUMBA, folder, NUMBA_CACHE_DIR=folder))
    return {"import_s": statistics.median(imports), "cold": cold, "cached": cached}


def extra_memory(name: str, quick: bool) -> float | None:
    """Peak memory of a workload beyond its results, in MB, in a new process; None if unknown."""
    try:
        printed = python(_MEMORY, name, "quick" if quick else "full", str(torch.get_num_threads()))
    except subprocess.CalledProcessError:
        return None
    return None if printed.strip() == "None" else float(printed)


def python(program: str, *arguments: str, **environment: str) -> str:
    """What a program prints in a new process."""
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=True
    ).stdout


def measure_memory(name: str, quick: bool, threads: int) -> float | None:
    """The same in this process, which must have done nothing yet.

    The kernels are loaded by a tiny run before, so what is counted is the scratch of the threads and
    whatever else the call holds at its peak. Only Linux can tell.
    """
    torch.set_num_threads(threads)
    workload = WORKLOADS[name]
    size = workload.size_of(quick)
    dtype = workload.dtype
    tiny = {k: f.to(dtype) for k, f in make_maps(workload, TINY).items()}
    make_call(workload._replace(boxes=2), TINY, tiny, ROIALIGN)()
    maps = {k: f.to(dtype) for k, f in make_maps(workload, size).items()}
    results, grown = resident(make_call(workload, size, maps, ROIALIGN))
    return None if grown is None else (grown - sum(t.nbytes for t in results)) / 1e6


def resident(call: Call) -> tuple[Sequence[Tensor], int | None]:
    """What a call returns, and by how many bytes memory had grown at its peak; None if unknown."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = _status("VmRSS")
    except OSError:
        return call(), None
    results = call()
    return results, _status("VmHWM") - before


def _status(key: str) -> int:
    """Bytes, from the entry of this process in /proc."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))

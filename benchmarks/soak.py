"""Pool for an hour, with changing shapes and threads: memory must not grow and no bit of a result may change.

Run: python benchmarks/soak.py --minutes 60

In rounds of some seconds, Python threads that live for one round each draw problems at random - pyramid,
dtype, layout, grid, number of boxes - and pool them forward and backward, twice, `torch.set_num_threads`
being drawn anew before each call: both must give the same bits. Every third problem is one of a few that
come back all the time, and whose bits must be those of the start. Between rounds nothing runs, and memory
is measured.
"""

import argparse
import ctypes
import gc
import hashlib
import json
import os
import platform
import random
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
import torch

import roialign
from roialign.cpu import memory
from roialign.doctor import print_table
from roialign.ops import DTYPES
from roialign.testing import pyramid, random_boxes
from roialign.warmup import track

CALLERS = 3  # Python threads that pool at once
MOST_THREADS = 4  # of torch.set_num_threads
WARM_UP = 0.25  # of the run, which does not count

# The least that can leak in a call is a Python object, some 50 bytes; one in a hundred calls would be found.
LEAK_BYTES = 50
LEAK_OBJECTS = 0.01
# What may grow though nothing leaks: tables of the interpreter; and what the C library keeps free, a heap of
# 64 MB for each thread. The arenas of the calls are there after the warm-up.
SLACK_ALLOCATED = 8.0
SLACK_RESIDENT = 67.1 * (CALLERS + MOST_THREADS)

PYRAMIDS = ((4, 8, 16, 32), (8, 16, 32), (8, 32), (16,), (32, 16, 8, 4), (14,), (4, 8, 16, 32, 64))
LAYOUTS = ("contiguous", "channels_last", "sliced", "transposed")


class Problem(NamedTuple):
    """All that decides a result."""

    strides: Sequence[int]
    height: int
    width: int
    images: int
    channels: int
    dtype: torch.dtype
    layout: str
    rois: int
    output_size: tuple[int, int]
    sampling_ratio: int
    aligned: bool
    seed: int


class Sample(NamedTuple):
    """What was measured between two rounds."""

    seconds: float
    calls: int
    resident: float  # MB
    allocated: float  # MB, by the C library
    idle: float  # MB of those, which wait to serve again
    objects: int
    descriptors: int
    threads: int


def draw(rng: random.Random) -> Problem:
    """A problem at random; one in four gives a result of many megabytes."""
    large = rng.random() < 0.25
    return Problem(
        strides=rng.choice(PYRAMIDS),
        height=rng.randint(32, 320 if large else 160),
        width=rng.randint(32, 320 if large else 160),
        images=rng.randint(1, 2),
        channels=rng.choice((64, 96, 128) if large else (1, 3, 16, 33, 64)),
        dtype=rng.choice(DTYPES),
        layout=rng.choice(LAYOUTS),
        rois=rng.randint(100, 500) if large else rng.choice((0, 1, 7, 40)),
        output_size=(7, 7) if large else (rng.randint(1, 9), rng.randint(1, 9)),
        sampling_ratio=rng.choice((0, 1, 2, 3)),
        aligned=rng.random() < 0.5,
        seed=rng.randrange(2**31),
    )


_shapes = random.Random(7)
FIXED = tuple(draw(_shapes)._replace(dtype=DTYPES[i % 4], rois=50 + 150 * (i % 3)) for i in range(12))


def digest(problem: Problem, rng: random.Random, times: int = 1) -> list[str]:
    """The bits of the result and of the gradients, each time with another number of threads."""
    size = (problem.height, problem.width)
    features = pyramid(
        problem.strides, image_size=size, images=problem.images, channels=problem.channels,
        dtype=problem.dtype, layout=problem.layout, seed=problem.seed,
    )  # fmt: skip
    shares = [problem.rois // problem.images] * problem.images
    boxes = random_boxes(shares, image_size=size, seed=problem.seed)
    digests = []
    for _ in range(times):
        torch.set_num_threads(rng.randint(1, MOST_THREADS))
        leaves = [f.detach().requires_grad_() for f in features]
        pooled = roialign.multiscale_roi_align(
            leaves, boxes, problem.output_size, [1 / s for s in problem.strides], problem.sampling_ratio,
            aligned=problem.aligned, canonical_scale=56,
        )  # fmt: skip
        # Any weights that are not all alike: the gradient of a sum of squares.
        results = [pooled.detach(), *torch.autograd.grad(pooled, leaves, pooled.detach())]
        bits = hashlib.sha256()
        for result in results:
            bits.update(result.flatten().view(torch.uint8).numpy())
        digests.append(bits.hexdigest())
    return digests


class Soak:
    """The rounds, and what came of them."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.expected = [digest(problem, self.rng)[0] for problem in FIXED]
        self.drawn = self.repeated = 0
        self.faults: list[str] = []
        self.samples: list[Sample] = []
        self._lock = threading.Lock()
        self._start = time.monotonic()

    def round(self, seconds: float) -> None:
        """Let fresh threads pool for some seconds, and measure when they are gone."""
        until = time.monotonic() + seconds
        seeds = [self.rng.randrange(2**31) for _ in range(CALLERS)]
        callers = [threading.Thread(target=self._call, args=(until, seed)) for seed in seeds]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        self.samples.append(measure(time.monotonic() - self._start, 2 * self.drawn + self.repeated))

    def _call(self, until: float, seed: int) -> None:
        rng = random.Random(seed)
        try:
            while time.monotonic() < until:
                self._try_one(rng)
        except Exception as error:
            self.faults.append(f"{type(error).__name__}: {error}")

    def _try_one(self, rng: random.Random) -> None:
        if rng.random() < 1 / 3:
            i = rng.randrange(len(FIXED))
            problem, found = FIXED[i], {self.expected[i], *digest(FIXED[i], rng)}
            self._count(0, 1)
        else:
            problem = draw(rng)
            found = set(digest(problem, rng, times=2))
            self._count(1, 0)
        if len(found) > 1:
            self.faults.append(f"other bits: {problem}")

    def _count(self, drawn: int, repeated: int) -> None:
        with self._lock:
            self.drawn += drawn
            self.repeated += repeated


def measure(seconds: float, calls: int) -> Sample:
    """What the process holds while nothing runs."""
    gc.collect()
    idle = sum(map(len, tuple(memory._idle))) / 1e6
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    resident = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
    descriptors, threads = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
    objects = len(gc.get_objects())
    return Sample(seconds, calls, resident, allocated() / 1e6, idle, objects, descriptors, threads)


class _Mallinfo(ctypes.Structure):
    """What glibc says of its memory: ten numbers, of which two matter here."""

    _fields_ = [(name, ctypes.c_size_t) for name in "abcd"]
    _fields_ += [("mapped", ctypes.c_size_t), *((name, ctypes.c_size_t) for name in "fg")]
    _fields_ += [("used", ctypes.c_size_t), *((name, ctypes.c_size_t) for name in "ij")]


def allocated() -> int:
    """Bytes that the program holds of the C library's memory, by glibc 2.33 or later."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _Mallinfo
    info = mallinfo()
    return int(info.used + info.mapped)


def growth(samples: Sequence[Sample], values: Sequence[float]) -> float:
    """By how much values grow from the first to the last sample, by least squares."""
    calls = np.array([s.calls for s in samples], float)
    slope, _ = np.polyfit(calls, np.array(values, float), 1)
    return float(slope * (calls[-1] - calls[0]))


def judge(soak: Soak) -> dict[str, Any]:
    """Growth after the warm-up, what is allowed, and whether all is well."""
    samples = soak.samples[int(len(soak.samples) * WARM_UP) :]
    calls = samples[-1].calls - samples[0].calls
    limits = {
        # Without what waits to serve again, which is bounded by itself.
        "allocated memory, MB": (
            growth(samples, [s.allocated - s.idle for s in samples]),
            SLACK_ALLOCATED + calls * LEAK_BYTES / 1e6,
        ),
        "resident memory, MB": (growth(samples, [s.resident - s.idle for s in samples]), SLACK_RESIDENT),
        "Python objects": (growth(samples, [s.objects for s in samples]), 100 + calls * LEAK_OBJECTS),
        "file descriptors": (growth(samples, [s.descriptors for s in samples]), 0.5),
        "threads": (growth(samples, [s.threads for s in samples]), 0.5),
    }
    idle, most = max(s.idle for s in samples), memory._MOST_IDLE / 1e6
    passed = not soak.faults and idle <= most and all(value <= limit for value, limit in limits.values())
    return {
        "passed": passed,
        "minutes": round(soak.samples[-1].seconds / 60, 2),
        "calls": soak.samples[-1].calls,
        "random problems, each called twice": soak.drawn,
        "repeats of fixed problems": soak.repeated,
        "faults": soak.faults[:20],
        "growth after warm-up": {
            name: {"found": round(found, 3), "allowed": round(limit, 3)}
            for name, (found, limit) in limits.items()
        },
        "idle memory, MB": {"found": round(idle, 1), "allowed": round(most, 1)},
        "callers": CALLERS,
        "most threads": MOST_THREADS,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numba": numba.__version__,
            "roialign": roialign.__version__,
        },
    }


def show(verdict: dict[str, Any]) -> None:
    """Print the verdict as a table."""
    rows = [(name, str(value), "") for name, value in verdict.items() if isinstance(value, int | float)]
    for name, entry in {
        **verdict["growth after warm-up"],
        "idle memory, MB": verdict["idle memory, MB"],
    }.items():
        rows.append((name, str(entry["found"]), str(entry["allowed"])))
    print_table("Soak", ("", "found", "allowed"), rows)
    for fault in verdict["faults"]:
        print(fault)
    print("Nothing grows, and no bit changed." if verdict["passed"] else "The soak FAILED.")


def plot(samples: Sequence[Sample], path: str) -> None:
    """Draw memory and objects over time."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    minutes = [s.seconds / 60 for s in samples]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 5), sharex=True, height_ratios=(2, 1))
    top.plot(minutes, [s.resident for s in samples], lw=1, label="resident")
    top.plot(minutes, [s.allocated for s in samples], lw=1, label="allocated")
    top.plot(minutes, [s.allocated - s.idle for s in samples], lw=1, label="allocated, without idle blocks")
    top.set(ylabel="memory, MB", ylim=(0, None))
    top.legend(frameon=False)
    bottom.plot(minutes, [s.objects / 1000 for s in samples], lw=1, color="C2")
    bottom.set(ylabel="Python objects, 1000", xlabel="minutes", ylim=(0, None))
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.axvspan(0, minutes[int(len(minutes) * WARM_UP)], color="0.92", zorder=0)
    figure.suptitle(f"{samples[-1].calls:,} calls, between rounds; grey: warm-up", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> int:
    """Soak, show, write; 1 if anything grew or changed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--round", type=float, default=5, metavar="SECONDS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write the verdict and all samples")
    parser.add_argument("--plot", metavar="FILE", help="draw memory over time; needs matplotlib")
    args = parser.parse_args(argv)
    threads = torch.get_num_threads()
    soak = Soak(args.seed)
    rounds = max(8, round(60 * args.minutes / args.round))
    with suppress(KeyboardInterrupt):  # what has been measured by then is shown
        for _ in track("soaking", range(1, rounds + 1)):
            soak.round(args.round)
            if soak.samples[-1].seconds > 60 * args.minutes:
                break
    torch.set_num_threads(threads)
    verdict = judge(soak)
    show(verdict)
    if args.json:
        table = {name: [getattr(s, name) for s in soak.samples] for name in Sample._fields}
        table["seconds"] = [round(s, 1) for s in table["seconds"]]
        for name in ("resident", "allocated", "idle"):
            table[name] = [round(megabytes, 2) for megabytes in table[name]]
        lines = [f"    {json.dumps(name)}: {json.dumps(column)}" for name, column in table.items()]
        text = json.dumps(verdict, indent=2)[:-2] + ',\n  "samples": {\n' + ",\n".join(lines) + "\n  }\n}\n"
        Path(args.json).write_text(text)
    if args.plot:
        plot(soak.samples, args.plot)
    return 0 if verdict["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())

"""The box head beside threads of pure Python, which hold the interpreter's lock."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .contest import make_calls
from .timing import Effort, one_by_one, percentile
from .workloads import WORKLOADS, Library, Size, make_maps

THREADS = (0, 1, 4)
BOXES = 100


def measure(size: Size, effort: Effort, libraries: Mapping[str, Library]) -> list[dict[str, Any]]:
    """Median and 95th percentile of single calls, by the number of busy threads, in milliseconds."""
    workload = WORKLOADS["box-head"]._replace(boxes=BOXES)
    calls = make_calls(workload, size, make_maps(workload, size), libraries)
    rows = []
    for count in THREADS:
        with busy_threads(count):
            times = one_by_one(calls, effort)
        ms = {
            name: {"median": 1000 * percentile(seconds, 50), "p95": 1000 * percentile(seconds, 95)}
            for name, seconds in times.items()
        }
        rows.append({"busy": count, "boxes": size.boxes_of(BOXES), "ms": ms})
    return rows


@contextmanager
def busy_threads(count: int) -> Iterator[None]:
    """Some threads that count as fast as they can, meanwhile."""
    stop = threading.Event()

    def work() -> None:
        number = 0
        while not stop.is_set():
            for _ in range(1000):
                number += 1

    others = [threading.Thread(target=work, daemon=True) for _ in range(count)]
    for thread in others:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in others:
            thread.join()

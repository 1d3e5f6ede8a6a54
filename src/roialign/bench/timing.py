"""Times of functions that take turns."""

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

_FEWEST, _MOST = 3, 1000  # rounds
_SAMPLE = 2e-2  # seconds; a shorter call is repeated and its mean taken
_IN_A_ROW = 10  # single calls, before it is another's turn
_PAUSE = 5e-3  # seconds; the threads of one fall asleep before it is another's turn


class Effort(NamedTuple):
    """How long to measure: for so many rounds, or else for as many as the seconds allow."""

    seconds: float
    repeats: int | None = None

    def rounds(self) -> Iterator[int]:
        """Count the rounds until it is enough."""
        start, done = time.perf_counter(), 0
        while done < (self.repeats or _MOST):
            if self.repeats is None and done >= _FEWEST and time.perf_counter() - start > self.seconds:
                return
            yield done
            done += 1


def time_by_turns(calls: Mapping[str, Callable[[], object]], effort: Effort) -> dict[str, list[float]]:
    """Time functions in the order a b a b, after each was called twice.

    Args:
        calls: functions without arguments, by name.
        effort: how long.

    Returns:
        By name, the seconds of a call in each round.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    with _no_garbage_collection():
        batches = {name: _batch(call) for name, call in calls.items()}
        for _ in effort.rounds():
            for name, call in calls.items():
                time.sleep(_PAUSE)
                times[name].append(_time(call, batches[name]))
    return times


def one_by_one(calls: Mapping[str, Callable[[], object]], effort: Effort) -> dict[str, list[float]]:
    """The seconds of single calls, some in a row of each function in turn, after each was called once."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    with _no_garbage_collection():
        for call in calls.values():
            call()
        for _ in effort.rounds():
            for name, call in calls.items():
                times[name] += [_time(call, 1) for _ in range(_IN_A_ROW)]
    return times


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Have torch use some threads; None: as it is."""
    saved = torch.get_num_threads()
    torch.set_num_threads(count or saved)
    try:
        yield
    finally:
        torch.set_num_threads(saved)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _batch(call: Callable[[], object]) -> int:
    """Calls per sample, found after a first call that may have to compile."""
    call()
    return max(1, int(_SAMPLE / max(_time(call, 1), 1e-6)))


def _time(call: Callable[[], object], batch: int) -> float:
    start = time.perf_counter()
    for _ in range(batch):
        call()
    return (time.perf_counter() - start) / batch


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles, extremes and number of some values."""
    quantiles = torch.tensor(values, dtype=torch.float64).quantile(torch.linspace(0, 1, 5).double()).tolist()
    return dict(zip(("min", "q1", "median", "q3", "max"), quantiles, strict=True), runs=len(values))


def percentile(values: Sequence[float], percent: float) -> float:
    """Below which so many percent of the values lie."""
    return float(torch.tensor(values, dtype=torch.float64).quantile(percent / 100))


def milliseconds(calls: Mapping[str, Callable[[], object]], effort: Effort) -> dict[str, dict[str, float]]:
    """The spread of the times of functions that take turns, by name."""
    times = time_by_turns(calls, effort)
    return {name: spread([1000 * s for s in seconds]) for name, seconds in times.items()}


def ratio(slow: Mapping[str, float], fast: Mapping[str, float]) -> dict[str, float]:
    """The ratio of the medians of two spreads, and between what it lies if both quartiles conspire."""
    return {
        "q1": slow["q1"] / fast["q3"],
        "median": slow["median"] / fast["median"],
        "q3": slow["q3"] / fast["q1"],
    }

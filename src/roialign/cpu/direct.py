"""Forward between tensors whose channels lie innermost: nothing is packed, cells are read in place.

Sums are not split into rows and columns here. A bin of a fixed grid reads about as many cells as the
two halves would, and needs no memory between them.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from .geometry import AT, COLUMN_STEP, HEIGHT, IMAGE_STEP, MAP_COLUMNS, ONE, ROW_STEP, WIDTH, ZERO
from .jit import c_kernel, part
from .jobs import scratch_in, unpack
from .lanes import Scratch
from .simd import (
    LANES,
    fetch_add,
    fma,
    get,
    load,
    load_one,
    prefetch_write,
    put,
    size_of,
    store,
    store_one,
    zeros,
)
from .tables import AxisAt

ROIS = np.int64(8)  # in a task
CELLS = np.int64(2**10)  # of a row of bins that are listed at once; a sum of many such sums is more exact
WIDE = np.int64(4 * LANES)


class Job(NamedTuple):
    """What `run` is told: numbers, and addresses of arrays."""

    taken: Any  # tasks, so far
    maps: Any  # (levels, MAP_COLUMNS)
    levels: Any
    out: Any  # how it lies in memory
    rois: Any  # how many
    order: Any  # (rois,)
    homes: Any  # (rois,)
    ys: AxisAt
    xs: AxisAt
    channels: Any
    scratch: Scratch  # offsets


@c_kernel
def run(job, memory, source, working, result):
    """Take tasks until none is left. A task is a few RoIs with all their channels."""
    _, maps, levels, out, rois, order, homes, ys, xs, channels, offsets = unpack(Job, job)
    src_tag, tag, out_tag, counter = source(0), working(0), result(0), job
    scratch = scratch_in(offsets, memory)
    tasks = (rois + ROIS - 1) // ROIS
    task = fetch_add(counter)
    while task < tasks:
        for i in range(task * ROIS, min((task + 1) * ROIS, rois)):
            home = get(homes, i)
            m = maps + 8 * (home % levels) * MAP_COLUMNS
            src = get(m, AT) + home // levels * get(m, IMAGE_STEP)
            _pool(src_tag, src, m, tag, out_tag, out, scratch, i, get(order, i), ys, xs, channels)
        task = fetch_add(counter)


@part
def _pool(src_tag, src, m, tag, out_tag, out, scratch, i, k, ys, xs, channels):
    """Pool RoI k, a row of bins at a time."""
    x_taps, columns = xs.taps + 8 * get(xs.base, i), xs.cells + 8 * get(xs.base, i)
    n = get(xs.start, i * (get(out, WIDTH) + 1) + get(out, WIDTH))
    for t in range(n):
        put(scratch.src_column, t, get(columns, get(x_taps, t)) * get(m, COLUMN_STEP))
    rows_at_once = max(ONE, CELLS // max(ONE, n))
    for p in range(get(out, HEIGHT)):
        y0 = get(ys.start, i * (get(out, HEIGHT) + 1) + p)
        stop = get(ys.start, i * (get(out, HEIGHT) + 1) + p + 1)
        first, last = True, False
        while not last:
            y1 = min(y0 + rows_at_once, stop)
            last = y1 == stop
            _list_cells(tag, m, scratch, ys, xs, i, y0, y1, get(out, WIDTH))
            _sum_cells(src_tag, src, tag, out_tag, out, scratch, k, p, channels, first, last)
            y0, first = y1, False


@part
def _list_cells(tag, m, scratch, ys, xs, i, y0, y1, bins):
    """For each bin of a row, the offsets and weights of the cells it reads in the rows of taps `y0:y1`."""
    size = size_of(tag)
    rows, y_taps = ys.cells + 8 * get(ys.base, i), ys.taps + 8 * get(ys.base, i)
    y_weights, x_weights = ys.weights + size * get(ys.base, i), xs.weights + size * get(xs.base, i)
    x_start = xs.start + 8 * i * (bins + 1)
    n = ZERO
    for q in range(bins):
        put(scratch.dst_row, q, n)
        for y in range(y0, y1):
            row, weight = get(rows, get(y_taps, y)) * get(m, ROW_STEP), load_one(tag, y_weights + y * size)
            for x in range(get(x_start, q), get(x_start, q + 1)):
                put(scratch.src_row, n, row + get(scratch.src_column, x))
                store_one(tag, scratch.cells + n * size, weight * load_one(tag, x_weights + x * size))
                n += 1
    put(scratch.dst_row, bins, n)


@part
def _sum_cells(src_tag, src, tag, out_tag, out, scratch, k, p, channels, first, last):
    """Sum the listed cells into a row of bins or, while more lists are to come, into scratch."""
    bins = get(out, WIDTH)
    step, keep, out_step = LANES * size_of(src_tag), LANES * size_of(tag), LANES * size_of(out_tag)
    to = get(out, AT) + k * get(out, IMAGE_STEP) + p * bins * get(out, COLUMN_STEP)
    part, one = scratch.sums, type(tag)(1)
    for q in range(bins):
        bin_at = to + q * get(out, COLUMN_STEP)
        for byte in range(0, channels * size_of(out_tag) if last else ZERO, 64):
            prefetch_write(bin_at + byte)
        for c in range(0, channels, WIDE):
            c = min(c, channels - WIDE)  # the last may overlap the one before, to be whole
            at = src + c * size_of(src_tag)
            s0 = s1 = s2 = s3 = zeros(tag)
            for t in range(get(scratch.dst_row, q), get(scratch.dst_row, q + 1)):
                cell = at + get(scratch.src_row, t)
                weight = load_one(tag, scratch.cells + t * size_of(tag))
                s0 = fma(weight, load(src_tag, cell), s0)
                s1 = fma(weight, load(src_tag, cell + step), s1)
                s2 = fma(weight, load(src_tag, cell + 2 * step), s2)
                s3 = fma(weight, load(src_tag, cell + 3 * step), s3)
            if not first:
                s0, s1 = fma(one, load(tag, part), s0), fma(one, load(tag, part + keep), s1)
                s2, s3 = fma(one, load(tag, part + 2 * keep), s2), fma(one, load(tag, part + 3 * keep), s3)
            if last:
                pooled = bin_at + c * size_of(out_tag)
                store(out_tag, pooled, s0)
                store(out_tag, pooled + out_step, s1)
                store(out_tag, pooled + 2 * out_step, s2)
                store(out_tag, pooled + 3 * out_step, s3)
            else:
                store(tag, part, s0)
                store(tag, part + keep, s1)
                store(tag, part + 2 * keep, s2)
                store(tag, part + 3 * keep, s3)
            part += 4 * keep


def entries(most: int, channels: int, pooled_width: int) -> tuple[int, int, int]:
    """Entries of 16 numbers that a thread needs for weights, sums of a row of bins, and results (none)."""
    return math.ceil(most / LANES), pooled_width * math.ceil(channels / WIDE) * 4, 0

"""Forward from maps whose channels lie innermost: read in place, 64 channels at a time."""

import numpy as np

from .jit import kernel
from .lanes import ALL_LANES
from .simd import LANES, fetch_add, get, put, size_of
from .sums import PH, PW, SUM_ENTRIES, bins_at_once, sub_channel, sum_columns, sum_rows
from .tables import AT, COLUMN_STEP, IMAGE_STEP, MAP_COLUMNS, ROW_STEP, ZERO

SUBS = np.int64(4)  # blocks of 16 channels that are read at once
ROIS = np.int64(8)  # in a task


@kernel
def run(
    counter, src_tag, tag, out_tag, maps, levels, out, order, rois, map_of, ys, xs, channels, scratch
):  # fmt: skip
    """Take tasks until none is left. A task is a few RoIs with all their channels."""
    last = channels - LANES
    tasks = (rois + ROIS - 1) // ROIS
    task = fetch_add(counter)
    while task < tasks:
        for i in range(task * ROIS, min((task + 1) * ROIS, rois)):
            k = get(order, i)
            home = get(map_of, k)
            m = maps + 8 * (home % levels) * MAP_COLUMNS
            src = get(m, AT) + home // levels * get(m, IMAGE_STEP)
            for c0 in range(0, channels, SUBS * LANES):
                subs = min(SUBS, (channels - c0 + LANES - 1) // LANES)
                units = get(xs.touched, k) * subs
                step = bins_at_once(units, get(out, PW) * subs)
                for p0 in range(0, get(out, PH), step):
                    p1 = min(p0 + step, get(out, PH))
                    _place_in_map(src_tag, m, scratch, ys, xs, k, c0, last, subs)
                    sum_rows(src_tag, src, tag, scratch, ZERO, units, units, ys, k, get(out, PH), p0, p1)
                    sum_columns(tag, out_tag, out, scratch, xs, k, c0, last, ALL_LANES, subs, p0, p1)
        task = fetch_add(counter)


@kernel
def _place_in_map(src_tag, m, scratch, ys, xs, k, c0, last, subs):
    """Where the cells that RoI k touches lie in the map."""
    cells = ys.cells + 8 * get(ys.base, k)
    for i in range(get(ys.touched, k)):
        put(scratch.src_row, i, get(cells, i) * get(m, ROW_STEP))
    cells = xs.cells + 8 * get(xs.base, k)
    for sub in range(subs):
        channel = sub_channel(sub, c0, last) * size_of(src_tag)
        for i in range(get(xs.touched, k)):
            put(scratch.src_column, i * subs + sub, get(cells, i) * get(m, COLUMN_STEP) + channel)


def entries(columns: int, pooled_width: int) -> tuple[int, int, int]:
    """Entries of 16 numbers that a thread needs for packed cells (none), row sums and results."""
    least, subs = int(SUM_ENTRIES), int(SUBS)
    return 0, max(least, columns * subs), max(least, pooled_width * subs)

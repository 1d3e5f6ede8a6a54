"""What is known of all RoIs before there are tables, and tables for as many as there is room for."""

from typing import Any, NamedTuple

from torch import Tensor

from ..schema import Pooling
from . import backward, geometry, tables
from .maps import Maps, at, pose
from .memory import Arena


class Survey(NamedTuple):
    """All RoIs in order, and what is known of them before there are tables. Arrays are named by address."""

    problem: geometry.Problem
    tag: Any  # a number of the working precision
    order: int  # (K,) first those that are to be done
    done: int  # how many are to be done
    keys: int  # (K,) the first row of each RoI
    spans: int  # (N * L,) the most rows that a RoI of a map spans
    bounds: int  # (N * L + 1,) the first RoI of each map, in their order
    owned: object


class Tables(NamedTuple):
    """The tables of some RoIs."""

    ys: tables.AxisAt
    xs: tables.AxisAt
    homes: int  # address: the map of each RoI
    number: int  # of RoIs
    taps: int  # there is room for
    rows: int  # the most that a RoI touches
    columns: int
    x_taps: int  # the most that a RoI has


def take_survey(
    rois: Tensor, levels: Tensor | None, maps: Maps, pooling: Pooling, tag: Any, arena: Arena
) -> tuple[Survey, int]:
    """Put the RoIs in order; and how many cannot be pooled."""
    n = len(rois)
    problem, constants = pose(rois, levels, maps, pooling)
    homes, rows = len(maps.first) - 1, maps.first[-1]
    keys, order, spans = arena.take(8 * n), arena.take(8 * n), arena.take(8 * homes)
    bounds, counts = arena.take(8 * (homes + 1)), arena.take(8 * rows)
    lost = tables.survey(tag, problem, n, keys, at(maps.first), homes, spans, counts)
    done = tables.sort(n, keys, at(maps.first), homes, counts, order, bounds)
    return Survey(problem, tag, order, done, keys, spans, bounds, (rois, levels, maps, constants)), lost


def fill_tables(survey: Survey, lo: int, stop: int, maps: Maps, room: int, arena: Arena) -> Tables:
    """Fill tables for the RoIs from number `lo` in their order on: as many as there is room for."""
    problem, tag = survey.problem, survey.tag
    n, order = stop - lo, survey.order + 8 * lo
    y_room = x_room = 0
    if problem.sampling_ratio > 0:
        y_room, x_room = tables.room_of_rows(problem), 2 * problem.sampling_ratio * problem.bins_x
        n = min(n, max(1, room // (y_room + x_room)))
        y_taps, x_taps = n * y_room, n * x_room
        y_base, x_base = arena.take(8 * (n + 1)), arena.take(8 * (n + 1))
    else:
        y_base, x_base = arena.take(8 * (n + 1)), arena.take(8 * (n + 1))
        n, y_taps, x_taps = tables.measure(tag, problem, order, n, room, y_base, x_base)
    ys = _axis(y_base, n, n * (problem.rows + 1), y_taps, tag, arena)
    xs = _axis(x_base, n, n * (problem.bins_x + 1), x_taps, tag, arena)
    homes, place = arena.take(8 * n), arena.take(8 * maps.longest)
    most = tables.fill(tag, problem, order, n, y_room, x_room, ys, xs, homes, place, maps.longest)
    return Tables(ys, xs, homes, n, y_taps + x_taps, *most)


def most_taps(problem: geometry.Problem, tag: Any, order: int, n: int) -> tuple[int, int]:
    """Room for the most taps that one of some RoIs has along y and x; see `tables.most_taps`."""
    if problem.sampling_ratio <= 0:
        y_taps, x_taps = tables.most_taps(tag, problem, order, n)
        return y_taps, x_taps
    return tables.room_of_rows(problem), 2 * problem.sampling_ratio * problem.bins_x


def _axis(base: int, rois: int, starts: int, taps: int, tag: Any, arena: Arena) -> tables.AxisAt:
    start, places, cells, touched = (arena.take(8 * size) for size in (starts, taps, taps, rois))
    return tables.AxisAt(base, start, places, cells, touched, arena.take(tag.itemsize * taps))


def turn_around(axis: tables.AxisAt, t: Tables, bins: int, tag: Any, arena: Arena) -> tables.AxisAt:
    """The table from taps of bins on cells to taps of cells on bins."""
    starts, taps, weights = (arena.take(size * (t.taps + t.number)) for size in (8, 8, tag.itemsize))
    turned = axis._replace(start=starts, taps=taps, weights=weights)
    backward.turn_around(tag, t.number, bins, axis, turned)
    return turned

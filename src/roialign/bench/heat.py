"""The heat map of the shapes: the worst ratio of all cells that share some values."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ..doctor import print_table
from .contest import OURS, THEIRS
from .shapes import ASTONISHING, AXES, HEAT, LOSING

Report = dict[str, Any]

WORST = 10  # rows that are told by name
_SHORT = {"forward": "fwd", "backward": "bwd"}


def worst_by(rows: Sequence[Report], *axes: str) -> dict[tuple[Any, ...], float]:
    """The smallest ratio, by the values of some axes."""
    worst: dict[tuple[Any, ...], float] = {}
    for row in rows:
        key = tuple(row[axis] for axis in axes)
        worst[key] = min(worst.get(key, row["ratio"]["median"]), row["ratio"]["median"])
    return worst


def short(ratio: float) -> str:
    """At most three characters but for the point."""
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.1f}" if ratio >= 1.1 else f"{ratio:.2f}"


def print_shapes(shapes: Report) -> None:
    """Print how the sample was taken, the heat map, the axes one by one, and rows by name."""
    rows = shapes["rows"]
    named, sampled = ([row for row in rows if row["named"] is is_named] for is_named in (True, False))
    losing = sum(row["ratio"]["median"] < LOSING for row in rows)
    print(
        f"""Shapes: {len(sampled)} of {shapes["cells_of_grid"]} cells of the grid, which meet \
{shapes["pairs_measured"]} of {shapes["pairs_allowed"]} pairs of values, and {len(named)} by name.
{shapes["rule"]}
{shapes["cells_allowed"]} are left. Maps of an 800 x 1344 image: one of stride 8, or four of strides 4 to 32.
Half types: torchvision in float32. Ratio: torchvision / roialign, of the medians, forward or backward alone;
below {LOSING}x or above {ASTONISHING:g}x it is measured again, and longer.
{losing} of {len(rows)} cells lose: they are below {LOSING}x then too.
"""
    )
    if sampled:
        _print_map(sampled)
        _print_axes(sampled)
    columns = ("cell", OURS, THEIRS, "ratio")
    print_table("By name, milliseconds", columns, [_cells(row) for row in named], _style)
    worst = sorted(rows, key=lambda row: row["ratio"]["median"])[:WORST]
    print_table(f"The worst {len(worst)}, milliseconds", columns, [_cells(row) for row in worst], _style)


def _print_map(rows: Sequence[Report]) -> None:
    worst = worst_by(rows, *HEAT)
    heads = [(timed, boxes) for timed in AXES["timed"] for boxes in AXES["boxes"]]
    cells = [
        (f"{channels}, {bins}x{bins}", *(_heat(worst.get((channels, bins, *head))) for head in heads))
        for channels, bins in sorted(worst_by(rows, "channels", "bins"))
    ]
    columns = ("channels, bins", *(f"{_SHORT[timed]} {boxes}" for timed, boxes in heads))
    print_table("The worst ratio, forward and backward, by the number of boxes", columns, cells, _style)


def _print_axes(rows: Sequence[Report]) -> None:
    cells = []
    for axis, values in AXES.items():
        for value in values:
            ratios = [row["ratio"]["median"] for row in rows if row[axis] == value]
            if ratios:
                losing = sum(ratio < LOSING for ratio in ratios)
                middle = statistics.median(ratios)
                cells.append(
                    (axis, str(value), _heat(min(ratios)), _heat(middle), f"{losing} of {len(ratios)}")
                )
    print_table("By the value of one axis", ("", "", "worst", "median", "losing"), cells, _style)


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    times = (f"{row['ms'][name]['median']:.3g}" for name in (OURS, THEIRS))
    return (row["name"], *times, _heat(row["ratio"]["median"]))


def _heat(ratio: float | None) -> str:
    return "" if ratio is None else f"{short(ratio)}x"


def _style(cell: str) -> str:
    """Of a ratio, by what it is worth; of any other text, none."""
    try:
        ratio = float(cell.removesuffix("x")) if cell.endswith("x") else None
    except ValueError:
        ratio = None
    if ratio is None:
        return ""
    return "bold red" if ratio < LOSING else "yellow" if ratio < 1.5 else "green" if ratio < 5 else "cyan"

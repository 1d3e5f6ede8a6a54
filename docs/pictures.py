"""Draw the pictures of the documentation anew: `python docs/pictures.py`, with the extra `demo`.

They are written to `docs/pictures`, or to the folder that is given.
"""

import argparse
import itertools
import math
import runpy
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from roialign import LevelMapper, demo, plot
from roialign.levels import staircase
from roialign.taps import EXACT, lay_points, taps_of

FOLDER = Path(__file__).parent / "pictures"
EXAMPLES = Path(__file__).parent.parent / "examples"
DPI = 110
STRIDES = [4, 8, 16, 32]


def levels() -> Figure:
    """Boxes on the sample photograph, coloured by the map that serves them."""
    boxes = {
        name: box for name, box in demo.ASTRONAUT.items() if name != "eyes"
    }  # its label would hide another
    figure = Figure(figsize=(6.6, 6.6), layout="constrained")
    return plot.draw_levels(
        demo.sample_image(),
        list(boxes.values()),
        [1 / stride for stride in STRIDES],
        names=list(boxes),
        axes=figure.add_subplot(),
    )


def half_pixel() -> Figure:
    """One box with `aligned=False` and with `aligned=True`."""
    figure, axes = _row_of_axes(2, height=4.9)
    for place, aligned in zip(axes, (False, True), strict=True):
        plot.draw_sampling(_map(10, 10), [12, 12, 28, 28], 2, 1 / 4, 2, aligned, axes=place)
        place.set(xlim=(1.5, 8.5), ylim=(8.5, 1.5), title=f"aligned={aligned}")
    _share_legend(figure, axes)
    return figure


def grids() -> Figure:
    """Two points a bin and axis, as many as the bin has cells, and a box that leaves the map."""
    figure, axes = _row_of_axes(3, height=3.7)
    inside, leaving = [4, 8, 32, 32], [20, 8, 48, 32]
    for place, ratio, box, title in (
        (axes[0], 2, inside, "sampling_ratio=2"),
        (axes[1], -1, inside, "sampling_ratio=-1"),
        (axes[2], 2, leaving, "points beyond the map count as 0"),
    ):
        plot.draw_sampling(_map(10, 10), box, 2, 1 / 4, ratio, aligned=True, axes=place)
        place.set_title(title, fontsize=10)
    _share_legend(figure, axes)
    return figure


def gap() -> Figure:
    """Which map serves a square box, by its side: a pyramid without gaps, and one with strides 8 and 32."""
    figure, axes = _row_of_axes(2, height=3.6, sharey=True)
    sides = torch.logspace(math.log2(20), math.log2(1000), 2000, base=2)
    boxes = torch.stack((torch.zeros_like(sides), torch.zeros_like(sides), sides, sides), 1)
    for place, strides in zip(axes, (STRIDES, [8, 32]), strict=True):
        _draw_service(place, sides.tolist(), boxes, strides)
    axes[0].set_ylabel("stride of the map that serves", fontsize=9)
    return figure


def box_refinement() -> Figure:
    """What the example draws."""
    return runpy.run_path(str(EXAMPLES / "box_refinement.py"))["draw"]()


def taps() -> Figure:
    """The taps of one bin along an axis, by each of the four rules: cells, and how much each weighs."""
    figure, axes = _row_of_axes(4, height=2.9, sharey=True)
    cells = 8
    low, high = torch.tensor([1.7]), torch.tensor([5.3])  # in cells, the centre of cell k at k
    rules = {"sampling_ratio=1": 1, "sampling_ratio=2": 2, "sampling_ratio=-1": 0, '"exact"': EXACT}
    for place, (title, ratio) in zip(axes, rules.items(), strict=True):
        laid = lay_points(low, high, 1, torch.tensor([cells]), ratio, False)
        count = int(laid.number.max())
        bin_taps = taps_of(laid, 0, count)
        weights = torch.zeros(cells).index_add_(0, bin_taps.cell.flatten(), bin_taps.weight.flatten())
        place.axvspan(1.7, 5.3, color=plot.COLOURS[0], alpha=0.25, linewidth=0, label="bin")
        place.bar(range(cells), weights.tolist(), width=0.55, color=plot.COLOURS[6], label="taps")
        points, value, *_ = laid.lay(torch.arange(count))
        if ratio == EXACT:
            for end in {*points.floor().flatten().tolist(), *points.ceil().flatten().tolist()}:
                place.axvline(min(max(end, 1.7), 5.3), color="black", linewidth=0.6, linestyle=":")
        sizes = (60 * value / value.max()).flatten().tolist()
        place.scatter(
            points.flatten().tolist(), [-0.035] * count, s=sizes, color=plot.COLOURS[5], clip_on=False,
            zorder=4, label="sampling points, by weight",
        )  # fmt: skip
        place.set(xlim=(-0.6, cells - 0.4), ylim=(-0.07, 0.6), xticks=range(cells))
        place.set_title(title, fontsize=10)
    axes[0].set_ylabel("weight", fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    return figure


def volume() -> Figure:
    """A RoI in a volume: its bins, and the sampling points of one of them."""
    figure = Figure(figsize=(6.0, 4.9), layout="constrained")
    axes = figure.add_subplot(projection="3d", computed_zorder=False)
    size, box, bins, ratio = (5.0, 6.0, 8.0), (1.0, 1.0, 1.0, 7.0, 5.0, 4.0), (2, 2, 3), 2
    low, high = box[:3], box[3:]  # x, y, z
    _draw_cuboid(axes, (0, 0, 0), (size[2], size[1], size[0]), color="grey", linewidth=0.8)
    steps = [(h - a) / n for a, h, n in zip(low, high, reversed(bins), strict=True)]
    for place in itertools.product(*map(range, reversed(bins))):
        start = [a + i * step for a, i, step in zip(low, place, steps, strict=True)]
        _draw_cuboid(
            axes, start, [a + s for a, s in zip(start, steps, strict=True)], color="black", linewidth=0.5
        )
    _draw_cuboid(axes, low, high, color=plot.COLOURS[4], linewidth=2.2)
    first = [h - step for h, step in zip(high, steps, strict=True)]
    _draw_cuboid(axes, first, high, color=plot.COLOURS[6], linewidth=1.8)
    points = [
        [a + (i + 0.5) / ratio * step for i in range(ratio)] for a, step in zip(first, steps, strict=True)
    ]
    axes.scatter(
        *zip(*itertools.product(*points), strict=True), s=28, color=plot.COLOURS[5], depthshade=False
    )
    axes.set(xlabel="x", ylabel="y", zlabel="z", xlim=(0, size[2]), ylim=(size[1], 0), zlim=(0, size[0]))
    axes.set_box_aspect((size[2], size[1], size[0]))
    axes.view_init(elev=18, azim=-62)
    axes.tick_params(labelsize=8)
    return figure


def _draw_cuboid(axes: Any, low: Sequence[float], high: Sequence[float], **style: Any) -> None:
    """The twelve edges."""
    ends = list(zip(low, high, strict=True))
    for axis in range(3):
        others = [ends[i] for i in range(3) if i != axis]
        for place in itertools.product(*others):
            line = list(place)
            line.insert(axis, ends[axis])
            axes.plot(*(c if isinstance(c, tuple) else (c, c) for c in line), **style)


def _draw_service(axes: Axes, sides: list[float], boxes: torch.Tensor, strides: Sequence[int]) -> None:
    ours = staircase([1 / s for s in strides], 224, 4, boxes.dtype).levels(boxes).tolist()
    theirs = LevelMapper(round(math.log2(strides[0])), round(math.log2(strides[-1])))([boxes]).tolist()
    axes.plot(sides, [strides[i] for i in ours], color=plot.COLOURS[6], linewidth=2.5, label="roialign")
    served = [(side, strides[i]) for side, i in zip(sides, theirs, strict=True) if i < len(strides)]
    axes.plot(*zip(*served, strict=True), "--", color="black", linewidth=1.5, label="torchvision")
    lost = [side for side, i in zip(sides, theirs, strict=True) if i >= len(strides)]
    if lost:
        axes.axvspan(
            lost[0], sides[-1], linewidth=0, color=plot.COLOURS[5], alpha=0.25, label="torchvision: zeros"
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlim(sides[0], sides[-1])
    axes.set_xticks([28, 56, 112, 224, 448, 896], ["28", "56", "112", "224", "448", "896"])
    axes.set_yticks(STRIDES, [str(s) for s in STRIDES])
    axes.set_xlabel("side of the box, pixels", fontsize=9)
    axes.set_title(f"strides {', '.join(map(str, strides))}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9, loc="upper left")


def _row_of_axes(count: int, height: float, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(9.6, height), layout="constrained")
    return figure, list(figure.subplots(1, count, sharey=sharey))


def _share_legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend under all, instead of one on each."""
    handles, labels = axes[0].get_legend_handles_labels()
    for place in axes:
        place.get_legend().remove()
        place.set_title(place.get_title(), fontsize=10, pad=6)
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9, frameon=False)


def _map(height: int, width: int) -> torch.Tensor:
    """A map whose cells can be told apart and on which points can be seen."""
    values = torch.rand(1, height, width, generator=torch.Generator().manual_seed(0))
    return 0.35 + 0.3 * values


PICTURES: dict[str, Callable[[], Figure]] = {
    picture.__name__: picture for picture in (levels, half_pixel, grids, gap, taps, volume, box_refinement)
}


def main() -> None:
    """Draw all pictures, in 256 colours, for small files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER)
    folder = parser.parse_args().folder
    folder.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        png = BytesIO()
        draw().savefig(png, dpi=DPI, facecolor="white", bbox_inches="tight")
        with Image.open(png) as picture:
            small = picture.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)
        small.save(folder / f"{name}.png", optimize=True)
        print(f"wrote {folder / name}.png")


if __name__ == "__main__":
    main()

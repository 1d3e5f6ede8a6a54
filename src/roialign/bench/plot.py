"""The picture: ratios of the workloads, how the time grows with the number of boxes, and the shapes."""

from typing import TYPE_CHECKING, Any

from .heat import short, worst_by
from .shapes import AXES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

COLOURS = {"roialign": "#0072b2", "torchvision": "#d55e00"}


def draw(report: dict[str, Any], path: str) -> None:
    """Draw what a report holds, and save it."""
    from matplotlib.figure import Figure

    shapes = report["shapes"]
    heights = [5.2] * bool(report["workloads"] or report["growth"] or not shapes) + [8.6] * bool(shapes)
    figure = Figure(figsize=(13, sum(heights)), dpi=100, layout="constrained")
    parts = list(figure.subfigures(len(heights), height_ratios=heights, squeeze=False).flat)
    if shapes:
        _draw_shapes(parts.pop(), [row for row in shapes["rows"] if not row["named"]])
    if parts:
        left, right = parts[0].subplots(1, 2)
        _draw_ratios(left, [row for row in report["workloads"] if row["ratio"] is not None])
        _draw_growth(right, report["growth"] or [])
    machine, versions = report["machine"], report["versions"]
    names = ", ".join(f"{name} {versions[name]}" for name in ("roialign", "torchvision", "torch"))
    threads = f"{report['settings']['threads']} threads"
    figure.suptitle(f"{names}; {machine['cpu']}, {threads}", fontsize=10, parse_math=False)
    figure.savefig(path)


def _draw_ratios(axes: "Axes", rows: list[dict[str, Any]]) -> None:
    names = [row["name"] for row in rows]
    ratios = [row["ratio"]["median"] for row in rows]
    spread = [
        [row["ratio"]["median"] - row["ratio"]["q1"] for row in rows],
        [row["ratio"]["q3"] - row["ratio"]["median"] for row in rows],
    ]
    if rows:
        bars = axes.barh(names, ratios, xerr=spread, color=COLOURS["roialign"], ecolor="#888888")
        axes.bar_label(bars, [f" {r:.1f}x" for r in ratios], padding=4)
        axes.set_xlim(0, 1.2 * max(ratios))
    axes.invert_yaxis()
    axes.axvline(1, color=COLOURS["torchvision"], linestyle="--", linewidth=1)
    axes.set(title="Times as fast as torchvision (median and quartiles)")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_growth(axes: "Axes", points: list[dict[str, Any]]) -> None:
    for name, colour in COLOURS.items():
        mine = [(point["boxes"], point["ms"][name]["median"]) for point in points if name in point["ms"]]
        if mine:
            axes.plot(*zip(*mine, strict=True), "o-", color=colour, label=name)
    if points:
        axes.set(xscale="log", yscale="log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
        axes.legend(frameon=False)
    axes.set(title="Milliseconds by number of boxes (box head)", xlabel="boxes")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_shapes(figure: "SubFigure", rows: list[dict[str, Any]]) -> None:
    """A panel for each direction: channels down; bins, and within them boxes, across."""
    panels = figure.subplots(len(AXES["timed"]), 1)
    for axes, timed in zip(panels, AXES["timed"], strict=True):
        _draw_panel(axes, [row for row in rows if row["timed"] == timed])
        axes.set_title(f"{timed}: the worst ratio, torchvision / roialign", loc="left", fontsize=11, pad=28)
    panels[-1].set_xlabel("boxes; empty: not sampled, or left out as too large")


def _draw_panel(axes: "Axes", rows: list[dict[str, Any]]) -> None:
    from matplotlib.colors import LogNorm

    channels, bins, boxes = AXES["channels"], AXES["bins"], AXES["boxes"]
    worst = worst_by(rows, "channels", "bins", "boxes")
    across = [(b, k) for b in bins for k in boxes]
    ratios = [[worst.get((c, b, k), float("nan")) for b, k in across] for c in channels]
    axes.imshow(ratios, cmap="RdBu", norm=LogNorm(1 / 16, 16), aspect="auto")
    for (c, b, k), ratio in worst.items():
        place = across.index((b, k)), channels.index(c)
        pale = 1 / 6 < ratio < 6
        axes.text(*place, short(ratio), ha="center", va="center", size=9, color="black" if pale else "white")
    axes.set_xticks(range(len(across)), [f"{k:,}" for _, k in across], fontsize=8)
    axes.set_yticks(range(len(channels)), [f"C={c}" for c in channels])
    axes.set_facecolor("#eeeeee")
    for i, b in enumerate(bins):
        middle = (i + 0.5) * len(boxes) - 0.5
        axes.annotate(
            f"{b} x {b}", (middle, 1), (0, 6), ("data", "axes fraction"), "offset points", ha="center"
        )
        axes.axvline((i + 1) * len(boxes) - 0.5, color="white", linewidth=3)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)

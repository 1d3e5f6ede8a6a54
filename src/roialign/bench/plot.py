"""The picture: ratios of the workloads, and how the time grows with the number of boxes."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"roialign": "#0072b2", "torchvision": "#d55e00"}


def draw(report: dict[str, Any], path: str) -> None:
    """Draw what a report holds, and save it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.2), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
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

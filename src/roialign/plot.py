"""Pictures of what RoIAlign does: which map serves which box, and where a RoI samples its map.

Two frames of coordinates meet here. Boxes are measured on the edges of pixels: pixel i of the image
covers [i, i + 1), and so do the cells of a map once a box is multiplied by its scale. RoIAlign
samples between cell *centres*: the sample at p = k is cell k itself. In that frame, which is also
the one in which matplotlib shows an image, the edge coordinate x of the image lies at
`x * scale - 0.5`. With `aligned=True` that is where bins begin; with `aligned=False` they begin at
`x * scale`, half a cell further to the right and down than the box that was asked for.

matplotlib is imported when a picture is drawn (`pip install "roialign[demo]"`).
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .arguments import check_output_size, points_of
from .levels import map_levels_of, staircase
from .taps import Pieces, Points, lay_points

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours for the colour-blind, those that stand out on a photograph.
COLOURS = ("#56B4E9", "#F0E442", "#CC79A7", "#009E73", "#E69F00", "#D55E00", "#0072B2")


def level_colour(level: int) -> str:
    """The colour of the map with this index, the same in every picture."""
    return COLOURS[level % len(COLOURS)]


def sampling_points(
    box: Sequence[float] | Tensor,
    map_size: tuple[int, int],
    output_size: int | Sequence[int],
    scale: float,
    sampling_ratio: int | str = -1,
    aligned: bool = False,
) -> tuple[Tensor, Tensor]:
    """Where one RoI samples its map, as the definition says; a bin's points are the product of both.

    Args:
        box: `(x1, y1, x2, y2)` in pixels of the image.
        map_size: `(H, W)` of the map, in cells.
        output_size: bins, `(PH, PW)`, or one number for both.
        scale: cells of the map per pixel of the image.
        sampling_ratio: sampling points per bin and axis; adaptive if not positive; or "exact".
        aligned: shift by half a cell.

    Returns:
        Rows `(PH, T)` and columns `(PW, T')` of the points, in cells, the centre of cell k at k.
        NaN stands for a point that misses the map, and so counts as zero. A point that lies beyond
        the outermost centre, by a cell at most, reads the cell there.

    Raises:
        ValueError: the box is not four finite numbers.

    Examples:
        >>> ys, xs = sampling_points([0, 0, 8, 8], (4, 4), 1, scale=1 / 4, sampling_ratio=2)
        >>> xs
        tensor([[0.5000, 1.5000]])
    """
    rows, columns = _axes_of(box, map_size, output_size, scale, sampling_ratio, aligned)
    return _points(rows), _points(columns)


def draw_levels(
    image: Tensor,  # (C, H, W)
    boxes: Sequence[Sequence[float]] | Tensor,  # (K, 4)
    scales: Sequence[float] = (1 / 4, 1 / 8, 1 / 16, 1 / 32),
    names: Sequence[str] | None = None,
    canonical_scale: float = 224,
    canonical_level: float = 4,
    axes: "Axes | None" = None,
) -> "Figure":
    """Draw boxes on their image, coloured by the map that serves them.

    The filled square in the lower left corner of a box is one cell of its map, to scale.

    Args:
        image: `(3, H, W)` in colour, else the mean of its channels is shown; floats in [0, 1] or uint8.
        boxes: `(K, 4)` of `(x1, y1, x2, y2)` in pixels of the image.
        scales: cells of each map per pixel of the image, `1 / stride`.
        names: a label for each box.
        canonical_scale: side in pixels of the square box that belongs to `canonical_level`.
        canonical_level: k0 of FPN's equation 1.
        axes: where to draw, instead of a new figure.

    Returns:
        The figure; `figure.savefig("levels.png")` writes it.
    """
    boxes = torch.as_tensor(boxes, dtype=torch.float32).cpu().reshape(-1, 4)
    axes = _new_axes(image.shape[1] / image.shape[2]) if axes is None else axes
    show_image(axes, image)
    _leave_margin(axes, image)
    levels = staircase(scales, canonical_scale, canonical_level, boxes.dtype).levels(boxes).tolist()
    for i in torch.argsort(_area(boxes), descending=True).tolist():  # small ones on top
        colour = level_colour(levels[i])
        _draw_box(axes, boxes[i].tolist(), colour, cell=1 / scales[levels[i]])
        if names is not None:
            _label_box(axes, boxes[i].tolist(), names[i], colour)
    _level_legend(axes, scales, sorted(set(levels)))
    return _figure_of(axes)


def draw_sampling(
    feature: Tensor,  # (C, H, W)
    box: Sequence[float] | Tensor,  # (4,)
    output_size: int | Sequence[int],
    scale: float,
    sampling_ratio: int | str = -1,
    aligned: bool = False,
    axes: "Axes | None" = None,
) -> "Figure":
    """Draw the bins and the sampling points of one RoI on the map that it is pooled from.

    The axes count cells, the centre of cell k at k, so that a point on a whole number reads one
    cell alone. The solid frame is the box as it lies on the map, on the edges of its pixels. With
    `aligned=True` the bins fill it; with `aligned=False` they lie half a cell to the right and down.

    Args:
        feature: `(3, H, W)` is shown in colour, else the mean over the channels.
        box: `(x1, y1, x2, y2)` in pixels of the image.
        output_size: bins, `(PH, PW)`, or one number for both.
        scale: cells of the map per pixel of the image.
        sampling_ratio: sampling points per bin and axis; adaptive if not positive; or "exact".
        aligned: shift by half a cell.
        axes: where to draw, instead of a new figure.

    Returns:
        The figure.
    """
    height, width = feature.shape[1:]
    rows, columns = _axes_of(box, (height, width), output_size, scale, sampling_ratio, aligned)
    bins = check_output_size(output_size)
    x1, y1, x2, y2 = (float(c) * scale for c in box)
    y_edges, x_edges = _bin_edges((y1, y2), bins[0], aligned), _bin_edges((x1, x2), bins[1], aligned)
    x1, y1, x2, y2 = x1 - 0.5, y1 - 0.5, x2 - 0.5, y2 - 0.5

    left, right = min(x1, x_edges[0]) - 1, max(x2, x_edges[-1]) + 1
    top, bottom = min(y1, y_edges[0]) - 1, max(y2, y_edges[-1]) + 1
    axes = _new_axes((bottom - top) / (right - left)) if axes is None else axes
    show_image(axes, feature, extent=(-0.5, width - 0.5, height - 0.5, -0.5))
    _draw_box(axes, (x1, y1, x2, y2), COLOURS[4], label="box")
    _draw_bins(axes, y_edges, x_edges)
    draw_points(axes, _points(rows), _points(columns), size=14)
    axes.set(xlim=(left, right), ylim=(bottom, top))
    _count_cells(axes)
    if isinstance(rows, Points) and isinstance(columns, Points):
        how = f"{rows.grid.item():.0f} x {columns.grid.item():.0f} sampling points a bin"
    else:
        how = "the integral over a bin"
    axes.set_title(f"aligned={aligned}, {how}", fontsize=10, pad=24)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, fontsize=9, frameon=False)
    return _figure_of(axes)


def show_image(axes: "Axes", image: Tensor, extent: tuple[float, float, float, float] | None = None) -> None:
    """Show `(C, H, W)` so that the axes count pixel edges, or fill `extent` (left, right, bottom, top).

    Three channels are red, green and blue, floats in [0, 1] or uint8; of others the mean is shown.
    """
    height, width = image.shape[1:]
    values = image.detach().cpu().float() / (255 if image.dtype == torch.uint8 else 1)
    pixels = values.clamp(0, 1).movedim(0, 2) if len(image) == 3 else values.mean(0)
    bounded = bool(((pixels >= 0) & (pixels <= 1)).all())  # else the grey scale spans the values
    axes.imshow(
        pixels.numpy(),
        cmap="gray",
        vmin=0 if bounded else None,
        vmax=1 if bounded else None,
        extent=extent or (0, width, height, 0),
        interpolation="nearest" if max(height, width) < 800 else "auto",
    )


def draw_points(axes: "Axes", ys: Tensor, xs: Tensor, size: float, colour: str = "white") -> None:
    """Draw the product of the rows and columns that `sampling_points` gives."""
    y, x = torch.meshgrid(ys.flatten(), xs.flatten(), indexing="ij")
    seen = ~(y + x).isnan()
    axes.scatter(
        x[seen].numpy(),
        y[seen].numpy(),
        s=size,
        c=colour,
        edgecolors="black",
        linewidths=0.15 * math.sqrt(size),
        label="sampling points",
        zorder=4,
        snap=False,
    )


def _axes_of(
    box: Sequence[float] | Tensor,
    map_size: tuple[int, int],
    output_size: int | Sequence[int],
    scale: float,
    sampling_ratio: int | str,
    aligned: bool,
) -> tuple[Points | Pieces, Points | Pieces]:
    """The sampling points of one RoI, as the reference lays them: along the rows, along the columns."""
    bins = check_output_size(output_size)
    corners = torch.as_tensor(box, dtype=torch.float32).cpu()
    if corners.shape != (4,) or not corners.isfinite().all():
        raise ValueError(f"box must be four finite numbers, x1, y1, x2, y2, got {corners.tolist()}")
    x1, y1, x2, y2 = scale * corners[:, None]
    height, width = (torch.tensor([extent]) for extent in map_size)
    ratio = points_of(sampling_ratio)
    return (
        lay_points(y1, y2, bins[0], height, ratio, aligned),
        lay_points(x1, x2, bins[1], width, ratio, aligned),
    )


def _points(points: Points | Pieces) -> Tensor:
    """`(bins, T)` positions in cells, NaN where there is none or where it misses the map."""
    point, _value, _slope, touched = points.lay(torch.arange(int(points.number.max())))
    return torch.where(touched, point, torch.nan)[0]


def _bin_edges(box: tuple[float, float], bins: int, aligned: bool) -> list[float]:
    """Where bins begin and end, in cells, of a box that does so along one axis."""
    low, high = (torch.tensor([end]) for end in box)
    points = lay_points(low, high, bins, torch.tensor([1]), 1, aligned)
    assert isinstance(points, Points)
    starts = points.bin_start[0]
    return torch.cat((starts, starts[-1:] + points.bin_size[0])).tolist()


def _area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _new_axes(ratio: float) -> "Axes":
    """The axes of a new figure, for a picture of this height by width."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 7 * min(max(ratio, 0.2), 2.0) + 0.8), layout="constrained")
    return figure.add_subplot()


def _count_cells(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    for axis, what in ((axes.xaxis, "column of the map"), (axes.yaxis, "row of the map")):
        axis.set_major_locator(MaxNLocator(integer=True))
        axis.set_label_text(what, fontsize=9)


def _figure_of(axes: "Axes") -> "Figure":
    from matplotlib.figure import Figure

    figure = axes.figure
    return figure if isinstance(figure, Figure) else figure.figure


def _draw_box(
    axes: "Axes", box: Sequence[float], colour: str, cell: float | None = None, label: str | None = None
) -> None:
    """A frame that stands out on any picture and, in its lower left corner, one cell of its map."""
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    x1, y1, x2, y2 = box
    frame = Rectangle(
        (x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=2, label=label, zorder=3
    )
    frame.set_path_effects([withStroke(linewidth=4, foreground="black")])
    axes.add_patch(frame)
    if cell is not None:
        square = Rectangle(
            (x1, y2 - cell), cell, cell, facecolor=colour, edgecolor="black", linewidth=0.8, zorder=3
        )
        axes.add_patch(square)


def _leave_margin(axes: "Axes", image: Tensor) -> None:
    """So that the frame of a box as large as the image is seen whole."""
    height, width = image.shape[1:]
    margin = 0.006 * max(height, width)
    axes.set(xlim=(-margin, width + margin), ylim=(height + margin, -margin))


def _label_box(axes: "Axes", box: Sequence[float], name: str, colour: str) -> None:
    """Above the upper left corner, or within it where the image ends."""
    bottom, top = axes.get_ylim()
    room_above = box[1] - top > 0.05 * (bottom - top)
    axes.annotate(
        name,
        (box[0], box[1]),
        xytext=(0, 2) if room_above else (2, -2),
        textcoords="offset points",
        verticalalignment="bottom" if room_above else "top",
        fontsize=9,
        color="black",
        bbox={"boxstyle": "square,pad=0.15", "facecolor": colour, "edgecolor": "black", "linewidth": 0.8},
        parse_math=False,
        zorder=5,
    )


def _draw_bins(axes: "Axes", y_edges: list[float], x_edges: list[float]) -> None:
    from matplotlib.collections import LineCollection

    across = [[(x_edges[0], y), (x_edges[-1], y)] for y in y_edges]
    down = [[(x, y_edges[0]), (x, y_edges[-1])] for x in x_edges]
    axes.add_collection(LineCollection(across + down, colors=COLOURS[0], linewidths=1.2, label="bins"))


def _level_legend(axes: "Axes", scales: Sequence[float], used: Sequence[int]) -> None:
    """Which colour is which map, under the picture."""
    from matplotlib.patches import Patch

    names = [
        f"level {k}: stride {1 / scale:g}" for k, scale in zip(map_levels_of(scales), scales, strict=True)
    ]
    handles = [Patch(facecolor=level_colour(i), edgecolor="black", label=names[i]) for i in used]
    axes.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.01),
        ncols=4,
        fontsize=9,
        frameon=False,
        handlelength=1,
        handleheight=1,
    )
    axes.set_axis_off()

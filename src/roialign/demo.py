"""Pool named regions of a photograph through its pyramid, and draw what was pooled.

The pyramid is made of the pixels themselves, averaged to strides 4, 8, 16 and 32, so that what is
pooled can be seen. Each region is pooled from the level that equation 1 of FPN gives it.
"""

import argparse
import functools
import importlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import LevelMapper, MultiScaleRoIAlign, plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

HELP = "pool regions of a photograph and draw them"

STRIDES = {"p2": 4, "p3": 8, "p4": 16, "p5": 32}
SCALES = [1 / stride for stride in STRIDES.values()]
OUTPUT_SIZE = 28
SAMPLING_RATIO = 1
CANONICAL_SCALE, CANONICAL_LEVEL = 224, 4
K_MIN, K_MAX = 2, 5  # levels of the strides

# On skimage.data.astronaut(), 512 x 512.
ASTRONAUT: dict[str, list[float]] = {
    "whole picture": [0, 0, 512, 512],
    "suit": [24, 215, 366, 500],
    "portrait": [110, 10, 325, 300],
    "shuttle": [350, 0, 465, 288],
    "helmet": [276, 338, 512, 512],
    "face": [178, 78, 276, 194],
    "mission patch": [130, 345, 212, 425],
    "eyes": [188, 90, 262, 112],
}

FARTHEST, SMALLEST = 1_000_000, 0.01  # pixels, of one's own boxes
SHOWN = 8  # regions, at most, in the picture


class DemoError(Exception):
    """What the user gave cannot be used; the message says why."""


class Pooled(NamedTuple):
    """One region and what became of it."""

    name: str
    box: list[float]  # x1, y1, x2, y2 in pixels of the image
    wanted: int  # level, by equation 1
    map: int  # index of the map that serves it
    values: Tensor  # (3, OUTPUT_SIZE, OUTPUT_SIZE)
    milliseconds: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("image", nargs="?", metavar="IMAGE", help="a picture; default: a sample photograph")
    parser.add_argument("--out", default="demo.png", help="the picture to write (default: %(default)s)")
    parser.add_argument(
        "--boxes",
        metavar="FILE.json",
        help='regions to pool: [[x1, y1, x2, y2], ...] or {"name": [x1, y1, x2, y2], ...}, in pixels',
    )


def run(args: argparse.Namespace) -> int:
    """Pool, print the table, write the picture; 2 if the arguments cannot be used."""
    try:
        _require_extras()
        image = sample_image() if args.image is None else read_image(args.image)
        regions = read_regions(args.boxes) if args.boxes else default_regions(image, args.image is None)
        pooled = pool_regions(image, regions)
        print_table(pooled)
        write_picture(image, pooled, args.out)
    except DemoError as error:
        print(f"python -m roialign demo: {error}", file=sys.stderr)
        return 2
    return 0


def _require_extras() -> None:
    try:
        for name in ("matplotlib", "PIL", "rich", "skimage"):
            importlib.import_module(name)
    except ImportError as error:
        raise DemoError(f'{error}; pip install "roialign[demo]"') from None


def sample_image() -> Tensor:
    """scikit-image's photograph of Eileen Collins, `(3, 512, 512)` in [0, 1]."""
    photo = importlib.import_module("skimage.data").astronaut()
    return torch.from_numpy(photo).movedim(2, 0) / 255


def read_image(path: str) -> Tensor:
    """Read a picture of any kind as `(3, H, W)` in [0, 1]; transparency is dropped."""
    import numpy as np
    from PIL import Image

    if not Path(path).is_file():
        raise DemoError(f"IMAGE must be a picture file, got {path!r}, where there is no file")
    try:
        with Image.open(path) as picture:
            deep = picture.mode[0] in "IF"  # 16 or 32 bits, of any range
            pixels = np.asarray(picture if deep else picture.convert("RGB"), dtype=np.float32)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DemoError(
            f"IMAGE must be a picture file, got {path!r}, which cannot be read: {error}"
        ) from None
    image = torch.from_numpy(pixels.copy())
    return _stretch(image).expand(3, -1, -1) if deep else image.movedim(2, 0) / 255


def _stretch(image: Tensor) -> Tensor:
    """Map the range of the values to [0, 1], so that there is something to see."""
    image = image.nan_to_num()
    low, high = image.aminmax()
    return (image - low) / (high - low).clamp(min=1e-20)


def read_regions(path: str) -> dict[str, list[float]]:
    """Read boxes, with names or without, from a JSON file."""
    expected = '--boxes must be a JSON file of [[x1, y1, x2, y2], ...] or {"name": [x1, y1, x2, y2], ...}'
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"), parse_int=float)
    except OSError as error:
        raise DemoError(f"{expected}, got {path!r}: {error.strerror}") from None
    except ValueError as error:
        raise DemoError(f"{expected}, got {path!r}, which is not JSON: {error}") from None
    if not isinstance(content, list | dict) or not content:
        raise DemoError(f"{expected}, got {json.dumps(content)[:80]}")
    if isinstance(content, list):
        content = {f"box {i}": box for i, box in enumerate(content)}
    return {name: _check_box(name, box) for name, box in content.items()}


def _check_box(name: str, box: Any) -> list[float]:
    """Four numbers that are pixels of a picture, with x1 < x2 and y1 < y2."""
    found = json.dumps(box)[:80]
    if not (isinstance(box, list) and len(box) == 4 and all(type(c) is float for c in box)):
        raise DemoError(f"{name!r} must be four numbers, [x1, y1, x2, y2], got {found}")
    if not all(abs(c) <= FARTHEST for c in box):
        raise DemoError(f"{name!r} must lie within {FARTHEST} pixels of the origin, got {found}")
    if min(box[2] - box[0], box[3] - box[1]) < SMALLEST:
        raise DemoError(f"{name!r} must have x1 < x2 and y1 < y2, by {SMALLEST} at least, got {found}")
    return box


def default_regions(image: Tensor, is_sample: bool) -> Mapping[str, list[float]]:
    """Named regions of the sample; of any other picture, the same parts in proportion to its size."""
    if is_sample:
        return ASTRONAUT
    height, width = image.shape[1:]

    def part(x: float, y: float, size: float) -> list[float]:
        """A part of the picture by the position of its centre and its size, as fractions."""
        x1, y1 = (x - size / 2) * width, (y - size / 2) * height
        return [round(c, 1) for c in (x1, y1, x1 + size * width, y1 + size * height)]

    return {
        "whole picture": part(0.5, 0.5, 1),
        "centre half": part(0.5, 0.5, 1 / 2),
        "upper right quarter": part(0.75, 0.25, 1 / 2),
        "lower left quarter": part(0.25, 0.75, 1 / 2),
        "upper detail": part(0.2, 0.3, 1 / 4),
        "lower detail": part(0.8, 0.72, 1 / 4),
        "small detail": part(0.5, 0.5, 1 / 8),
        "tiny detail": part(0.62, 0.36, 1 / 16),
    }


def build_pyramid(image: Tensor) -> dict[str, Tensor]:
    """Average the pixels of `(3, H, W)` to one map per stride; a cell at the rim averages what it has."""
    return {
        name: F.avg_pool2d(image[None], stride, ceil_mode=True, count_include_pad=False)
        for name, stride in STRIDES.items()
    }


def pool_regions(image: Tensor, regions: Mapping[str, list[float]]) -> list[Pooled]:
    """Pool every region from the level that suits its size.

    The cells are averages over areas, so boxes are aligned with their centres (`aligned=True`).
    Scales are given, since a picture of any size need not be a multiple of the strides.
    """
    pooler = MultiScaleRoIAlign(
        list(STRIDES),
        OUTPUT_SIZE,
        SAMPLING_RATIO,
        canonical_scale=CANONICAL_SCALE,
        canonical_level=CANONICAL_LEVEL,
        aligned=True,
        scales=SCALES,
    )
    pyramid = build_pyramid(image)
    boxes = torch.tensor(list(regions.values()), dtype=torch.float32)
    values = pooler(pyramid, [boxes])
    wanted = _levels(boxes, -99, 99) - 99
    served = _levels(boxes, K_MIN, K_MAX)
    times = [_milliseconds(functools.partial(pooler, pyramid, [box[None]])) for box in boxes]
    columns = (regions.keys(), regions.values(), wanted.tolist(), served.tolist(), values, times)
    return [Pooled(*row) for row in zip(*columns, strict=True)]


def _levels(boxes: Tensor, k_min: int, k_max: int) -> Tensor:
    return LevelMapper(k_min, k_max, CANONICAL_SCALE, CANONICAL_LEVEL)([boxes])


def _milliseconds(call: Callable[[], object]) -> float:
    """The median time of a few calls, the first left out: it may have to compile."""
    times = []
    for _ in range(6):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[1:])


def side_of(box: list[float]) -> float:
    """The side of the square of the same area."""
    return math.sqrt((box[2] - box[0]) * (box[3] - box[1]))


def why_level(pooled: Pooled) -> str:
    """Equation 1 with the numbers of one region put in."""
    wanted, side = pooled.wanted, side_of(pooled.box)
    limit = f", finest is {K_MIN}" if wanted < K_MIN else f", coarsest is {K_MAX}" if wanted > K_MAX else ""
    equation = f"floor({CANONICAL_LEVEL} + log2({side:.4g}/{CANONICAL_SCALE})) = {wanted}"
    return f"{equation}{limit} -> stride {1 / SCALES[pooled.map]:g}"


def print_table(pooled: list[Pooled]) -> None:
    """Print one row per region."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("region", "box (x1 y1 x2 y2)", box=box.SIMPLE_HEAD)
    table.add_column("sqrt(area)", justify="right")
    table.add_column("level")
    table.add_column("output")
    table.add_column("ms", justify="right")
    for region in pooled:
        table.add_row(
            Text(region.name, style=f"bold {plot.level_colour(region.map)}"),
            " ".join(f"{c:g}" for c in region.box),
            f"{side_of(region.box):.1f}",
            why_level(region),
            " x ".join(map(str, region.values.shape)),
            f"{region.milliseconds:.2f}",
        )
    console = Console()
    if not console.is_terminal:
        console = Console(width=130)
    console.print(table)


def write_picture(image: Tensor, pooled: list[Pooled], path: str) -> None:
    """Draw and save, and say where."""
    try:
        draw(image, pooled[:SHOWN]).savefig(path)
    except (OSError, ValueError) as error:
        raise DemoError(f"--out must be a picture file that can be written, got {path!r}: {error}") from None
    rest = len(pooled) - SHOWN
    print(f"wrote {path}" + (f", without the last {rest} regions" if rest > 0 else ""))


def draw(image: Tensor, pooled: list[Pooled]) -> "Figure":
    """The picture with its boxes on the left; on the right each region and what was pooled from it."""
    from matplotlib.figure import Figure

    image = (image * 63).round() / 63  # shades that the eye can tell apart: a file half as large
    figure = Figure(figsize=(16, 9), dpi=100, facecolor="#f4f4f4")
    halves = figure.add_gridspec(1, 2)
    left, right = figure.add_subfigure(halves[0]), figure.add_subfigure(halves[1])
    axes = left.add_axes((0.02, 0.06, 0.96, 0.88))
    plot.draw_levels(image, [p.box for p in pooled], SCALES, [_short(p.name) for p in pooled], axes=axes)
    left.suptitle("Each box is pooled from the map that suits its size; a corner square is one cell", y=0.98)
    _draw_regions(right, image, pooled)
    bins = f"{OUTPUT_SIZE} x {OUTPUT_SIZE} bins"
    right.suptitle(f"Its sampling points, one for each of {bins}, and what they give", y=0.98)
    return figure


def _draw_regions(figure: "SubFigure", image: Tensor, pooled: list[Pooled]) -> None:
    """Two regions in a row; for each its part of the photograph with the sampling points, and the result."""
    rows = max(2, math.ceil(len(pooled) / 2))
    grid = figure.subplots(rows, 5, width_ratios=[1, 1, 0.15, 1, 1])  # a gap between the pairs
    figure.subplots_adjust(0.01, 0.02, 0.99, 0.92, wspace=0.06, hspace=0.22)
    for axes in grid.flat:
        axes.set_axis_off()
    for i, region in enumerate(pooled):
        first = 3 * (i % 2)
        _draw_region(grid[i // 2, first], grid[i // 2, first + 1], image, region)


def _short(name: str) -> str:
    return name if len(name) <= 24 else name[:23] + "…"


def _draw_region(photo: "Axes", result: "Axes", image: Tensor, region: Pooled) -> None:
    x1, y1, x2, y2 = region.box
    colour = plot.level_colour(region.map)
    plot.show_image(photo, image)
    ys, xs = sampling_points_on_image(image, region)
    plot.draw_points(photo, ys, xs, size=2)
    plot.show_image(result, region.values, extent=(x1, x2, y2, y1))
    photo.set_title(_short(region.name), fontsize=10, parse_math=False)
    result.set_title(f"pooled at stride {1 / SCALES[region.map]:g}", fontsize=10)
    for axes in (photo, result):
        axes.set(xlim=(x1, x2), ylim=(y2, y1), xticks=[], yticks=[])
        axes.set_axis_on()
        axes.spines[:].set(color=colour, linewidth=3)


def sampling_points_on_image(image: Tensor, region: Pooled) -> tuple[Tensor, Tensor]:
    """Where a region samples, in pixels of the image: the centre of cell k is at (k + 1/2) strides."""
    scale = SCALES[region.map]
    height, width = (math.ceil(size * scale) for size in image.shape[1:])
    ys, xs = plot.sampling_points(
        region.box, (height, width), OUTPUT_SIZE, scale, SAMPLING_RATIO, aligned=True
    )
    return (ys + 0.5) / scale, (xs + 0.5) / scale

import pytest
import torch

pytest.importorskip("matplotlib")

from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from roialign import plot, roi_align

NAN = torch.nan


@pytest.mark.parametrize(
    ("aligned", "expected"),
    [
        # The box [8, 24) at stride 4 covers cells 2 .. 5: edges 2 and 6, centres 1.5 .. 5.5.
        (False, [[2.5, 3.5], [4.5, 5.5]]),
        (True, [[2.0, 3.0], [4.0, 5.0]]),
    ],
)
def test_sampling_points_by_hand(aligned, expected):
    ys, xs = plot.sampling_points([8, 0, 24, 16], (8, 8), 2, 1 / 4, sampling_ratio=2, aligned=aligned)
    assert xs.tolist() == expected
    assert (ys == xs - 2).all()


@pytest.mark.parametrize(
    ("box", "ratio", "expected"),
    [
        ([0, 0, 6, 1], -1, [[0.5, 1.5, 2.5], [3.5, NAN, NAN]]),  # the map ends at 4
        ([-6, 0, 0, 1], 1, [[NAN], [NAN]]),  # -4.5 and -1.5 miss the map
        ([-4, 0, 0, 1], 1, [[NAN], [-1.0]]),  # -1 reads the first cell still
        ([2, 0, 2, 1], 1, [[2.25], [2.75]]),  # a box without width is one cell wide
    ],
)
def test_points_that_miss_the_map_are_nan(box, ratio, expected):
    _, xs = plot.sampling_points(box, (4, 4), (1, 2), 1.0, ratio)
    seen = xs[:, ~xs.isnan().all(0)] if ratio < 1 else xs
    torch.testing.assert_close(seen, torch.tensor(expected), equal_nan=True)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [-1, 1, 3])
def test_sampling_points_are_those_that_are_pooled(ratio, aligned):
    """On a map that counts its columns a bin is the mean of its points, clamped to the map."""
    columns = torch.arange(16.0).expand(1, 1, 12, 16)
    box = [5.3, 7.1, 49.9, 40.2]
    pooled = roi_align(columns, [torch.tensor([box])], (3, 5), 0.25, ratio, aligned)
    _, xs = plot.sampling_points(box, (12, 16), (3, 5), 0.25, ratio, aligned)
    torch.testing.assert_close(pooled[0, 0, 0], xs.clamp(0, 15).nanmean(1))


@pytest.mark.parametrize("box", [[1, 2, 3], [0, 0, NAN, 1]])
def test_a_box_that_is_none_is_refused(box):
    with pytest.raises(ValueError, match="box must be four finite numbers, x1, y1, x2, y2, got"):
        plot.sampling_points(box, (4, 4), 1, 1.0)


def test_draw_levels_colours_boxes_by_level():
    boxes = [[0, 0, 500, 500], [0, 0, 30, 30], [10, 10, 130, 130]]
    figure = plot.draw_levels(torch.rand(3, 64, 64), boxes, names=["a", "b", "c"])
    assert type(figure) is Figure
    (axes,) = figure.axes
    assert len(axes.images) == 1
    assert [text.get_text() for text in axes.texts] == ["a", "c", "b"]  # small ones on top
    frames = [p for p in axes.patches if isinstance(p, Rectangle) and not p.get_fill()]
    cells = [p for p in axes.patches if p not in frames]
    assert [f.get_width() for f in frames] == [500, 120, 30]
    assert [c.get_width() for c in cells] == [32, 8, 4]
    colours = [plot.level_colour(i) for i in (3, 1, 0)]
    assert [to_hex(f.get_edgecolor()).upper() for f in frames] == colours
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["level 2: stride 4", "level 3: stride 8", "level 5: stride 32"]


def test_draw_levels_without_boxes():
    figure = plot.draw_levels(torch.zeros(1, 8, 8, dtype=torch.uint8), [])
    assert not figure.axes[0].patches


@pytest.mark.parametrize(("aligned", "first"), [(False, (2.0, 4.0)), (True, (1.5, 3.5))])
def test_draw_sampling_shows_half_a_cell(aligned, first, tmp_path):
    figure = plot.draw_sampling(torch.randn(5, 10, 10), [8, 16, 24, 32], (2, 4), 1 / 4, 2, aligned)
    assert type(figure) is Figure
    (axes,) = figure.axes
    (frame,) = axes.patches
    (bins,) = [c for c in axes.collections if isinstance(c, LineCollection)]
    (points,) = [c for c in axes.collections if isinstance(c, PathCollection)]
    assert frame.get_xy() == (1.5, 3.5)  # the box lies on the edges of cells 2 and 4
    assert tuple(bins.get_segments()[0][0]) == first
    assert len(bins.get_segments()) == 3 + 5
    assert len(points.get_offsets()) == 2 * 4 * 2 * 2
    assert axes.get_title() == f"aligned={aligned}, 2 x 2 sampling points a bin"
    figure.savefig(tmp_path / "sampling.png")


def test_drawing_in_axes_of_ones_own():
    figure = Figure()
    left, right = figure.subfigures(1, 2)
    feature = torch.rand(3, 16, 16)
    assert plot.draw_levels(feature, [[1, 1, 9, 9]], axes=left.subplots()) is figure
    assert plot.draw_sampling(feature, [1, 1, 9, 9], 2, 1.0, axes=right.subplots()) is figure

"""Scales from shapes, equation 1, and which map serves a level."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import poolers as peer

import roialign
from roialign import levels
from roialign.testing import random_boxes

PYRAMIDS = [(2, 5), (0, 8), (3, 3), (-1, 2)]


def boundary_sides(canonical_scale: int) -> np.ndarray:
    """Sides exactly on every boundary of equation 1, and a few ulps to either side."""
    exact = np.float32(canonical_scale) * np.float32(2.0) ** np.arange(-6, 4, dtype=np.float32)
    sides = [exact]
    for direction in (0, np.inf):
        neighbour = exact
        for _ in range(12):  # the eps of 1e-6 is some ulps wide
            neighbour = np.nextafter(neighbour, np.float32(direction))
            sides.append(neighbour)
    return np.concatenate(sides)


def square_boxes(sides: np.ndarray) -> torch.Tensor:
    sides = torch.from_numpy(sides)[:, None]
    return torch.cat((torch.zeros_like(sides).expand(-1, 2), sides.expand(-1, 2)), 1)


@pytest.mark.parametrize(
    "canonical", [{}, {"canonical_scale": 100, "canonical_level": 3}, {"eps": 1e-3}], ids=str
)
@pytest.mark.parametrize(("k_min", "k_max"), PYRAMIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mapper_is_torchvisions_on_the_boundaries(k_min, k_max, canonical, dtype):
    boxes = square_boxes(boundary_sides(canonical.get("canonical_scale", 224))).to(dtype)
    shifted = boxes + torch.tensor([3.0, 5.0, 3.0, 5.0], dtype=dtype)  # rounds to other areas
    for boxlists in ([boxes], [shifted], [boxes, shifted]):
        ours = roialign.LevelMapper(k_min, k_max, **canonical)(boxlists)
        theirs = peer.LevelMapper(k_min, k_max, **canonical)(boxlists)
        assert ours.dtype == torch.int64
        assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("canonical_scale", [224, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pooling_is_from_torchvisions_level_on_the_boundaries(canonical_scale, dtype):
    boxes = square_boxes(boundary_sides(canonical_scale)).to(dtype)
    boxes = torch.cat((boxes, boxes + torch.tensor([3.0, 5.0, 3.0, 5.0], dtype=dtype)))
    features = [torch.full((1, 1, 4, 4), float(i), dtype=dtype) for i in range(4)]
    out = roialign.multiscale_roi_align(
        features, [boxes], 1, [1 / 4, 1 / 8, 1 / 16, 1 / 32], 1, canonical_scale=canonical_scale
    )
    expected = peer.LevelMapper(2, 5, canonical_scale)([boxes])
    # Larger boxes have their one sampling point outside the maps of 4 cells; hold it at the corner.
    inside = boxes[:, 2] / 2 <= 4 * 2.0 ** (2 + expected)
    assert torch.equal(out.flatten()[inside].long(), expected[inside])
    assert inside.sum() > 100


@given(
    corner=st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=2),
    size=st.lists(st.floats(0, 1e5, width=32), min_size=2, max_size=2),
    k_min=st.integers(0, 4),
    extent=st.integers(0, 5),
)
@settings(deadline=None, max_examples=200)
def test_mapper_is_torchvisions_on_any_box(corner, size, k_min, extent):
    (x, y), (w, h) = corner, size
    boxes = [torch.tensor([[x, y, x + w, y + h]])]
    ours, theirs = (cls(k_min, k_min + extent)(boxes) for cls in (roialign.LevelMapper, peer.LevelMapper))
    assert torch.equal(ours, theirs)


def test_mapper_keeps_torchvisions_attributes():
    ours, theirs = (cls(2, 5, 100, 3, 1e-4) for cls in (roialign.LevelMapper, peer.LevelMapper))
    assert vars(ours) == vars(theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int32])
def test_mapper_calculates_in_float32(dtype):
    boxes = torch.tensor([[0, 0, 256, 256], [0, 0, 1024, 1024]], dtype=dtype)  # areas beyond float16
    assert roialign.LevelMapper(2, 5)([boxes]).tolist() == [2, 3]


@pytest.mark.parametrize(
    ("box", "level"),
    [
        ([8, 8, 8, 8], 0),
        ([8, 8, 40, 8], 0),
        ([40, 8, 8, 30], 0),
        ([600, 600, 8, 8], 3),
        ([0, 0, 1e30, 1e30], 3),
    ],
)
def test_mapper_of_degenerate_boxes(box, level):
    assert roialign.LevelMapper(2, 5)([torch.tensor([box], dtype=torch.float32)]).tolist() == [level]


def test_mapper_needs_an_ordered_range():
    with pytest.raises(ValueError, match=r"^k_min must not exceed k_max, got k_min=5, k_max=2$"):
        roialign.LevelMapper(5, 2)


@pytest.mark.parametrize(
    ("map_levels", "served"),  # by wanted level 0, 1, ... 8: the index of the map
    [
        ([2, 3, 4, 5], [0, 0, 0, 1, 2, 3, 3, 3, 3]),
        ([5, 4, 3, 2], [3, 3, 3, 2, 1, 0, 0, 0, 0]),
        ([3, 5], [0, 0, 0, 0, 1, 1, 1, 1, 1]),
        ([5, 3], [1, 1, 1, 1, 0, 0, 0, 0, 0]),
        ([4, 2, 7], [1, 1, 1, 0, 0, 2, 2, 2, 2]),
        ([5, 5], [0] * 9),
        ([4, 5, 5], [0, 0, 0, 0, 0, 1, 1, 1, 1]),
        ([4, 4, 5], [0, 0, 0, 0, 0, 2, 2, 2, 2]),
        ([6], [0] * 9),
    ],
)
def test_map_that_serves_a_level(map_levels, served):
    sides = torch.tensor([224 * 2.0 ** (level - 4) * 1.1 for level in range(9)])[:, None]
    boxes = torch.cat((torch.zeros(9, 2), sides.expand(-1, 2)), 1)
    assert (
        levels.staircase([0.5**k for k in map_levels], 224, 4, torch.float32).levels(boxes).tolist() == served
    )


@pytest.mark.parametrize("canonical_level", [4, 3.5])
def test_levels_of_shuffled_maps_are_the_shuffled_levels(canonical_level):
    boxes = random_boxes([200], image_size=(1000, 1000))[0]
    in_order, shuffled = (
        levels.staircase([0.5**k for k in order], 224, canonical_level, torch.float32).levels(boxes)
        for order in ([2, 3, 4, 5], [4, 2, 5, 3])
    )
    assert torch.equal(torch.tensor([1, 3, 0, 2])[in_order], shuffled)


@pytest.mark.parametrize(
    ("scales", "expected"),
    [
        ([1 / 4, 1 / 8, 1 / 16, 1 / 32], [2, 3, 4, 5]),
        ([1.0, 2.0, 0.3], [0, -1, 2]),
        ([1 / 11, 1 / 12, 1 / 14], [3, 4, 4]),
    ],
)
def test_level_of_a_map_is_the_nearest_power_of_two(scales, expected):
    assert levels.map_levels_of(scales) == expected


@pytest.mark.parametrize(
    ("image_shapes", "map_sizes", "strides"),
    [
        ([(800, 1344)], [(200, 336), (100, 168), (50, 84), (25, 42)], [4, 8, 16, 32]),
        ([(800, 1333)], [(200, 336), (100, 168), (50, 84), (25, 42)], [4, 8, 16, 32]),
        ([(33, 64)], [(16, 16)], [4]),  # the height was padded from 33 to 64
        ([(64, 33)], [(16, 16)], [4]),
        ([(33, 33), (64, 40)], [(16, 16)], [4]),  # the largest image counts
        ([(40, 33), (33, 64)], [(16, 16)], [4]),
        ([(97, 97)], [(7, 7), (4, 4), (2, 2), (1, 1)], [16, 32, 64, 128]),
        ([(100, 100)], [(100, 100), (200, 200), (400, 400)], [1, 0.5, 0.25]),
        ([(1, 1)], [(1, 1)], [1]),
        ([(224, 224)], [(16, 16)], [16]),  # 14 is nearest to 16
        ([], [(16, 16), (8, 8)], [1, 1]),
    ],
)
def test_inferred_scales(image_shapes, map_sizes, strides):
    assert levels.infer_scales(map_sizes, image_shapes) == [1 / stride for stride in strides]


@given(
    cells=st.integers(1, 400),
    stride=st.integers(0, 7),
    shape=st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
)
@settings(deadline=None, max_examples=200)
def test_inferred_scale_of_one_axis_is_torchvisions(cells, stride, shape):
    """Of a square map; of the axis torchvision looks at, when it is the longer one."""
    height = max(shape)
    width = min(shape)
    theirs = peer._infer_scale(torch.empty(1, 1, cells, cells), [height, width])
    assert levels.infer_scales([(cells, cells)], [(height, width)]) == [theirs]
    assert levels.infer_scales([(cells, cells)], [(width, height)]) == [theirs]
    assert levels.infer_scales([(cells, cells)], [(cells << stride, cells << stride)]) == [0.5**stride]


EQUATION_1 = [(224, 4), (224.0, 4.0), (28, 4), (100, 3), (7.3, 2.5), (1e-3, 0), (56, -2), (1000, 9.75)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("canonical_scale", "canonical_level"), EQUATION_1)
def test_the_staircase_is_equation_1_beside_every_step(canonical_scale, canonical_level, dtype):
    """The areas within some floats of a step are assigned as torchvision's mapper assigns them."""
    scales = [2.0**-k for k in range(2, 7)]
    steps = levels.staircase(scales, canonical_scale, canonical_level, dtype)
    assert list(steps.thresholds) == sorted(steps.thresholds)
    integers = torch.int32 if dtype == torch.float32 else torch.int64
    area = torch.tensor(steps.thresholds, dtype=dtype)
    area = (area.view(integers)[:, None] + torch.arange(-9, 10)).to(integers).view(dtype).flatten()
    area = torch.cat((area, torch.tensor([0.0, 1e-30, 1e30, torch.inf, -1.0, torch.nan], dtype=dtype)))
    boxes = torch.stack((area * 0, area * 0, torch.ones_like(area), area), 1).nan_to_num(torch.nan, torch.inf)
    boxes[:, :2] = 0  # (1 - 0) * (area - 0) is the area itself
    for mapper_class in (roialign.LevelMapper, peer.LevelMapper):
        mapper = mapper_class(2, 6, canonical_scale, canonical_level)
        defined = area >= 0  # torchvision makes no level of a NaN
        assert torch.equal(steps.levels(boxes)[defined], mapper([boxes])[defined])
    assert steps.levels(boxes)[~defined].eq(0).all()


def in_fake_mode(call):
    with torch._subclasses.FakeTensorMode():
        return call()


def on_another_default_device(call):
    with torch.device("meta"):
        return call()


def while_tracing(call):
    results = []

    def traced(x):
        results.append(call())
        return x + 1

    torch.jit.trace(traced, torch.ones(1))
    return results[0]


def under_a_transform(call):
    results = []

    def f(x):
        results.append(call())
        return x.sum()

    torch.func.vmap(torch.func.grad(f))(torch.ones(2, 3))
    return results[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("mode", [in_fake_mode, on_another_default_device, while_tracing, under_a_transform])
def test_the_staircase_is_found_whatever_mode_is_active(mode):
    scales = [1 / 4, 1 / 8, 1 / 16]
    expected = levels.staircase(scales, 224, 4, torch.float32)
    levels._staircase.cache_clear()
    assert mode(lambda: levels.staircase(scales, 224, 4, torch.float32)) == expected
    assert all(type(threshold) is float for threshold in expected.thresholds)


def test_numbers_that_vary_stay_numbers_for_the_compiler():
    """A float argument becomes a symbol when it changes; the staircase needs its value."""
    maps = [torch.rand(1, 2, 16 >> i, 16 >> i) for i in range(3)]
    boxes = [torch.tensor([[0.0, 0, 60, 60], [3, 3, 30, 20], [9, 9, 20, 22]])]

    def pool(canonical_scale, stride):
        scales = [1 / stride, 0.5 / stride, 0.25 / stride]
        return roialign.multiscale_roi_align(maps, boxes, 2, scales, 2, canonical_scale=canonical_scale)

    compiled = torch.compile(pool, fullgraph=True, backend="eager")
    for scale, stride in ((28.0, 4.0), (14.0, 4.0), (31.5, 3.5), (30, 4), (7.7, 5.25)):
        torch.testing.assert_close(compiled(scale, stride), pool(scale, stride))

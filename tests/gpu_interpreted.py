"""Run the GPU engine on CPU tensors, in Triton's interpreter, and hold it against the reference."""

import itertools
import os
import time
from collections.abc import Callable

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

import torch
from torch import Tensor

from roialign import arguments, ops, reference
from roialign.gpu import engine
from roialign.layout import is_channels_last
from roialign.levels import staircase
from roialign.schema import Pooling
from roialign.testing import LAYOUTS, assert_within_budget, hostile_boxes, pyramid, random_boxes

SIZE = (48, 72)
LAYERS = (("contiguous", 3), ("channels_last", 32))  # one for each of the forward kernels
CANONICAL = (28.0, 4.0)


def rois_of(boxes: list[Tensor]) -> Tensor:
    return torch.cat([torch.cat((torch.full_like(b[:, :1], i), b), 1) for i, b in enumerate(boxes)])


def assert_agrees(actual: Tensor, truth: Tensor, expected: Tensor) -> None:
    if actual.dtype == torch.float64:  # the truth is rounded likewise
        torch.testing.assert_close(actual, truth, rtol=1e-12, atol=1e-12, equal_nan=True)
    else:
        assert_within_budget(actual, truth=truth, reference=expected)


def pooling_of(scales, output_size, ratio, aligned, working) -> Pooling:
    points, steps = arguments.points_of(ratio), staircase(scales, *CANONICAL, working)
    return Pooling(output_size, scales, points, aligned, *steps)


def check(
    strides,
    output_size,
    ratio,
    *,
    aligned=False,
    dtype=torch.float32,
    layout="contiguous",
    channels=5,
    images=2,
    rois=None,
    given=None,
    dtypes=None,
    layouts=None,
    twice=False,
    stretch=1.0,
    derivative=0,
) -> None:
    """Forward and backward against the reference, which in float64 serves as the truth.

    Along x the scales of the maps are `stretch` times those along y; of a `derivative` it is those of what
    changes with that column of the rois.
    """
    working = torch.float64 if dtype == torch.float64 else torch.float32
    features = pyramid(strides, image_size=SIZE, images=images, channels=channels, dtype=dtype, layout=layout)
    features = [f.to(d) for f, d in zip(features, dtypes or [dtype] * len(strides), strict=True)]
    features = [
        LAYOUTS[name](f) for f, name in zip(features, layouts or [layout] * len(strides), strict=True)
    ]
    if rois is None:
        rois = rois_of(random_boxes([3] * images, image_size=SIZE, dtype=working))
    rois = rois.to(working)
    scales = [1 / s for s in strides]
    pooling = pooling_of(scales, output_size, ratio, aligned, working)._replace(derivative=derivative)
    if stretch != 1:
        pooling = pooling._replace(scales=[factor * scale for scale in scales for factor in (1, stretch)])
    mapped = given
    if given is None:  # the truth has the levels that the working precision chose
        mapped = pooling.staircase.levels(rois[:, 1:])
    shape = (len(rois), channels, *output_size)
    out = reference.empty(shape, dtype, rois.device, is_channels_last(features[0]))
    expected, truth = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=torch.float64)
    engine.forward(out, features, rois, given, pooling)
    reference.forward(expected, features, rois, given, pooling)
    reference.forward(truth, [f.double() for f in features], rois.double(), mapped, pooling)
    assert_agrees(out, truth, expected)

    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    grad = LAYOUTS[layout](grad)
    results: list[list[Tensor]] = []
    for garbage in (torch.nan, 7.0)[: 1 + twice]:
        names = layouts or [layout] * len(strides)
        maps = [LAYOUTS[name](torch.full_like(f, garbage)) for f, name in zip(features, names, strict=True)]
        results.append(maps)
        engine.backward(results[-1], grad, rois, given, pooling)
    same = [torch.empty_like(f) for f in features]
    truths = [torch.empty_like(f, dtype=torch.float64) for f in features]
    reference.backward(same, grad, rois, given, pooling)
    reference.backward(truths, grad.double(), rois.double(), mapped, pooling)
    for first, again, r, t in zip(results[0], results[-1], same, truths, strict=True):
        assert torch.equal(first, again)  # the same bits, and every element is written
        assert_agrees(first, t, r)


def check_dtypes_and_layouts() -> None:
    for i, dtype in enumerate(ops.DTYPES):
        for layout in ("contiguous", "channels_last", "sliced"):
            check([8, 16], (2, 3), (2, 3, 0)[i % 3], dtype=dtype, layout=layout, images=1, twice=True)
    check([8, 16], (2, 3), 2, layout="channels_last", channels=16)  # strides that 16 divides
    check([8, 16, 32], (2, 3), 2, dtypes=[torch.float32, torch.bfloat16, torch.float32])


def check_bins_and_grids() -> None:
    for output_size in ((1, 1), (2, 3), (7, 7), (3, 14)):
        for ratio in (2, 3, 0, -1, 6):
            if output_size == (2, 3) or ratio in (2, 0):
                check([16, 32], output_size, ratio, aligned=ratio == 3, channels=3, images=1)
    check([16], (2, 2), -1, aligned=True)


def check_integrals() -> None:
    for layout, channels in (("contiguous", 3), ("channels_last", 32)):
        for aligned in (False, True):
            check([8, 16], (2, 3), "exact", aligned=aligned, layout=layout, channels=channels, images=1)
    check([16], (7, 7), "exact", channels=2, images=1, dtype=torch.float64)
    boxes = hostile_boxes()
    rois = torch.cat((torch.zeros(len(boxes), 1), boxes), 1)
    check([16, 32], (2, 3), "exact", aligned=True, rois=rois, channels=2)


def check_pyramids() -> None:
    boxes = rois_of(random_boxes([9, 7], image_size=SIZE, seed=3))
    for strides in ([16], [16, 32], [32, 8, 16], [16, 32, 64, 128], [16, 32, 32], [1 / 0.07]):
        check(strides, (2, 2), 2, rois=boxes, channels=3)
    given = torch.tensor([0, 1, 1, 0, 2, 1, 0, 0, 1, 1, -1, 3, 2, 2, 1, 0])
    check([16, 32, 64], (2, 2), 2, rois=boxes, given=given, channels=3)
    many = rois_of(random_boxes([40, 30], image_size=SIZE, seed=4))  # more than a word of the mask
    check([16, 32], (1, 2), 2, rois=many, channels=2)


def check_scales_of_each_axis() -> None:
    boxes = rois_of(random_boxes([7], image_size=SIZE, seed=7))
    for layout, channels in LAYERS:
        for ratio in (2, 0, "exact"):
            for strides, stretch in (([16], 0.6), ([8, 32, 16], 1.7)):
                check(
                    strides, (2, 3), ratio,
                    rois=boxes, images=1, channels=channels, layout=layout, stretch=stretch,
                    aligned=stretch < 1, dtype=torch.float64 if ratio == 0 else torch.float32,
                )  # fmt: skip


def check_derivatives() -> None:
    """Every column and grid; boxes widened, without length, inside out, beside the map, or not poolable."""
    some = rois_of(random_boxes([4], image_size=SIZE, seed=8))
    cells = torch.tensor([[0.0, 16, 16, 48, 32], [0.0, -16, 0, 96, 48], [0.0, -40, -8, 8, 64]])
    lost = torch.tensor([[0.0, torch.nan, 0, 9, 9], [0.0, 0, 0, torch.inf, 9], [3.0, 0, 0, 9, 9]])
    boxes = hostile_boxes()[:7]
    odd = torch.cat((torch.zeros(len(boxes), 1), boxes), 1)
    rois = torch.cat((some, cells, lost, odd))
    ways = itertools.cycle(
        [
            (torch.float32, False, LAYERS[0]),
            (torch.float64, True, LAYERS[0]),
            (torch.float32, True, LAYERS[1]),
            (torch.float64, False, LAYERS[1]),
            (torch.bfloat16, False, LAYERS[0]),
        ]
    )
    for ratio, column in itertools.product((1, 2, 6, 0, "exact"), (1, 2, 3, 4)):
        dtype, aligned, (layout, channels) = next(ways)
        check(
            [8, 16], (2, 3), ratio,
            rois=rois, images=1, channels=channels, aligned=aligned, dtype=dtype, layout=layout,
            stretch=1.3, derivative=column,
        )  # fmt: skip


def check_many_channels() -> None:
    """As many as fill a warp, and not a whole number of them."""
    for layout in ("contiguous", "channels_last"):
        for channels, ratio in ((32, 2), (40, 0), (144, 2)):
            check([16, 32], (2, 3), ratio, layout=layout, channels=channels, images=1)
    check([16, 32], (2, 3), 2, dtype=torch.bfloat16, layout="channels_last", channels=264, images=1)


def check_layouts_that_differ() -> None:
    for layouts in (
        ["channels_last", "contiguous"],
        ["contiguous", "channels_last"],
        ["sliced", "channels_last"],
    ):
        check([16, 32], (2, 3), 2, layouts=layouts, channels=33, twice=True)


def check_large_outputs() -> None:
    """More bins than a program takes, or turns around at once."""
    rois = rois_of(random_boxes([1], image_size=SIZE, seed=6))
    for ratio in (1, 2, 0):
        check([16], (9, 35), ratio, channels=2, images=1, rois=rois)
        check([16], (9, 10), ratio, layout="channels_last", channels=32, images=1, rois=rois)


def check_parts_of_tiles() -> None:
    """So many RoIs that those of a tile are summed in parts; some of them and no other."""
    rois = rois_of(random_boxes([150], image_size=SIZE, seed=5))
    rois[7:130] = rois[0]
    for layout in ("contiguous", "channels_last"):
        check([32, 64], (1, 2), 1, rois=rois, channels=2, images=1, layout=layout, twice=True)


def check_rooms_for_tables() -> None:
    """So little room that RoIs are taken a few at a time."""
    room = engine._TABLES
    try:
        for engine._TABLES in (1, 3000):
            for ratio in (2, 0):
                check([16, 32], (2, 2), ratio, channels=2, images=1)
                check([16, 32], (2, 2), ratio, channels=2, dtype=torch.float16, images=1)
    finally:
        engine._TABLES = room


def check_boundaries_of_levels() -> None:
    """Sizes beside the steps of equation 1: each must fall on the side where PyTorch has it."""
    strides = [8, 16, 32, 64]
    scales = [1 / s for s in strides]
    for working in (torch.float32, torch.float64):
        sides = torch.tensor([7.0, 14.0, 28.0, 56.0], dtype=working)
        near = [sides]
        for direction in (0.0, 1e9):
            side = sides
            for _ in range(6):
                side = torch.nextafter(side, torch.full_like(side, direction))
                near.append(side)
        side = torch.cat(near)
        rois = torch.stack((side * 0, side * 0, side * 0, side, side), 1)
        features = [torch.full((1, 1, 2, 2), float(i), dtype=working) for i in range(4)]
        out = torch.empty(len(rois), 1, 1, 1, dtype=working)
        pooling = pooling_of(scales, (1, 1), 1, False, working)
        engine.forward(out, features, rois, None, pooling)
        wanted = pooling.staircase.levels(rois[:, 1:])
        inside = ~out.flatten().eq(0) | wanted.eq(0)  # the centre of every box meets its map
        assert inside.all()
        assert torch.equal(out.flatten().long(), wanted)


def check_hostile_boxes() -> None:
    for aligned, ratio in ((False, 2), (True, 2), (True, 3), (True, 0)):
        boxes = hostile_boxes()
        rois = torch.cat((torch.zeros(len(boxes), 1), boxes), 1)
        rois[3, 0], rois[5, 0], rois[8, 0] = 2, -1, torch.nan
        check([16, 32], (2, 3), ratio, aligned=aligned, rois=rois, channels=2)


def check_that_nan_stays_where_it_is() -> None:
    rois = torch.tensor([[0.0, 4, 4, 20, 20], [0.0, 40, 20, 60, 40]])
    feature = torch.zeros(1, 1, 12, 18)
    feature[..., 9, 17] = torch.nan
    out, expected = torch.empty(2, 2, 1, 2, 2)
    grad = torch.ones(2, 1, 2, 2)
    grad[0, 0, 1, 1] = torch.nan
    rest = (rois, None, pooling_of([0.25], (2, 2), 2, False, torch.float32))
    engine.forward(out, [feature], *rest)
    reference.forward(expected, [feature], *rest)
    assert torch.equal(out.isnan(), expected.isnan())
    actual, wanted = torch.empty(2, 1, 1, 12, 18)
    engine.backward([actual], grad, *rest)
    reference.backward([wanted], grad, *rest)
    assert actual.isnan().any()
    assert torch.equal(actual.isnan(), wanted.isnan())


def check_that_nan_stays_where_it_is_in_derivatives() -> None:
    """Half of the boxes end at whole cells, where one more is read; between points far apart none is."""
    generator = torch.Generator().manual_seed(9)
    for ratio, (layout, channels) in zip((1, 2, 0, "exact"), [*LAYERS, *LAYERS], strict=True):
        rois = torch.randint(-8, 28, (12, 5), generator=generator) / 2
        rois[:, 0], rois[:8, 3:] = 0, rois[:8, 1:3] + rois[:8, 3:].abs()
        feature = torch.randn(1, 1, 9, 11, generator=generator)
        feature[torch.rand(feature.shape, generator=generator) < 0.12] = torch.nan
        feature = LAYOUTS[layout](feature.expand(1, channels, 9, 11))
        for column in (1, 2, 3, 4):
            pooling = pooling_of([1.0], (2, 3), ratio, column > 2, torch.float32)._replace(derivative=column)
            out, expected = torch.empty(2, 12, channels, 2, 3)
            engine.forward(out, [feature], rois, None, pooling)
            reference.forward(expected, [feature], rois, None, pooling)
            assert torch.equal(out.isnan(), expected.isnan())
            assert 0 < out.isnan().sum() < out.numel()


def check_no_rois() -> None:
    features = pyramid([8, 16], image_size=SIZE)
    grads = [torch.full_like(f, torch.nan) for f in features]
    engine.backward(
        grads,
        torch.empty(0, 4, 2, 2),
        torch.empty(0, 5),
        None,
        pooling_of([0.125, 0.0625], (2, 2), 2, False, torch.float32),
    )
    assert all((g == 0).all() for g in grads)


def check_operators() -> None:
    """Through the dispatcher: gradients of the first and second order, and of boxes."""
    saved = dict(ops.ENGINES)
    ops.ENGINES["cpu"] = "roialign.gpu.engine"
    try:
        features = pyramid([16, 32], image_size=(32, 32), channels=1, dtype=torch.float64)
        rois = rois_of(random_boxes([2], image_size=(32, 32), dtype=torch.float64))
        leaves = [f.requires_grad_() for f in features]

        pooling = pooling_of([1 / 16, 1 / 32], (1, 2), 2, False, torch.float64)

        def pool(*maps):
            return torch.ops.roialign.multiscale_roi_align(maps, rois, None, *pooling)

        def pool_from(boxes):
            what = pooling._replace(box_gradients=True)
            return torch.ops.roialign.multiscale_roi_align(features, boxes, None, *what)

        assert torch.autograd.gradcheck(pool, leaves)
        assert torch.autograd.gradgradcheck(pool, leaves)
        assert torch.autograd.gradcheck(pool_from, rois.requires_grad_())
    finally:
        ops.ENGINES.update(saved)


def main() -> None:
    checks: list[Callable[[], None]] = [f for name, f in globals().items() if name.startswith("check_")]
    for function in checks:
        start = time.monotonic()
        function()
        print(f"{function.__name__}: {time.monotonic() - start:.1f} s", flush=True)
    print("all agree")


if __name__ == "__main__":
    main()

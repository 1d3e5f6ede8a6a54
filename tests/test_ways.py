"""The three ways of the CPU engine: who takes which, that they agree to the bit, and how much is packed."""

import itertools

import pytest
import torch

from roialign import multiscale_roi_align, ops, roi_align
from roialign.testing import assert_within_budget

pytest.importorskip("numba")

from roialign.cpu import engine, forward, planes_backward

MAP = (40, 60)


def boxes_on(height, width, count, images=1, seed=0):
    """`(K, 5)` boxes of all sizes, some beyond the map or with nothing in it."""
    generator = torch.Generator().manual_seed(seed)
    extent = torch.tensor([width, height], dtype=torch.float32)
    corner = torch.rand(count, 2, generator=generator) * extent * 1.2 - 3
    size = torch.rand(count, 2, generator=generator) ** 2 * extent * 1.2
    image = torch.randint(images, (count, 1), generator=generator)
    return torch.cat((image, corner, corner + size), 1)


def sliced(x):
    wide = x.new_zeros(*x.shape[:3], 2 * x.shape[3])
    wide[..., ::2] = x
    return wide[..., ::2]


LAYOUTS = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced": sliced,
    "images innermost": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
}


def pool_and_back(feature, boxes, size, ratio):
    leaf = feature.detach().requires_grad_()
    pooled = roi_align(leaf, boxes, size, 1.0, ratio)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(pooled.shape, generator=generator).to(pooled.dtype)
    return pooled.detach(), *torch.autograd.grad(pooled, leaf, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ratio", [0, 1, 2])
@pytest.mark.parametrize("size", [1, 7, (3, 21)])
@pytest.mark.parametrize("channels", [1, 3, 8, 17, 40])
def test_strides_threads_and_other_boxes_change_no_bit(channels, size, ratio, dtype):
    feature = torch.randn(2, channels, *MAP, generator=torch.Generator().manual_seed(2)).to(dtype)
    boxes = boxes_on(*MAP, 30, images=2)
    expected = pool_and_back(feature, boxes, size, ratio)
    for lay in LAYOUTS.values():
        for got, once in zip(pool_and_back(lay(feature), boxes, size, ratio), expected, strict=True):
            assert torch.equal(got, once)
    alone = torch.cat([roi_align(feature, box[None], size, 1.0, ratio) for box in boxes])
    assert torch.equal(alone, expected[0])
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for got, once in zip(pool_and_back(feature, boxes, size, ratio), expected, strict=True):
                assert torch.equal(got, once)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "shape", [(1, 1, 20, 30), (1, 3, 20, 30), (1, 3, 1, 30), (2, 3, 20, 1), (1, 20, 1, 1)]
)
@pytest.mark.parametrize("odd", [0, 1, 7, 10**12])
def test_strides_of_axes_of_size_one_mean_nothing(shape, odd):
    feature = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    for lay in (lambda x: x, LAYOUTS["channels_last"]):
        x = lay(feature)
        strides = [odd if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)]
        for count in (1, 20):
            boxes = boxes_on(*shape[2:], count, images=shape[0])
            expected = pool_and_back(feature, boxes, 3, 2)
            for got, once in zip(
                pool_and_back(x.as_strided(shape, strides), boxes, 3, 2), expected, strict=True
            ):
                assert torch.equal(got, once)


@pytest.fixture
def way(monkeypatch):
    """Let every call go one way."""

    def choose(name):
        monkeypatch.setattr(engine, "_way", lambda *_: name)
        monkeypatch.setattr(engine, "_backward_way", lambda *_: name)
        engine._ways.cache_clear()

    yield choose
    monkeypatch.undo()
    engine._ways.cache_clear()


@pytest.mark.parametrize("layout", ["contiguous", *LAYOUTS])
@pytest.mark.parametrize("size", [1, 7, (33, 9)])
def test_lanes_along_columns_and_along_channels_give_the_same_bits(way, size, layout):
    feature = torch.randn(2, 37, *MAP, generator=torch.Generator().manual_seed(3))
    feature = LAYOUTS.get(layout, lambda x: x)(feature)
    boxes = boxes_on(*MAP, 60, images=2)
    for ratio in (0, 1, 2):
        way(engine.PLANES)
        first = pool_and_back(feature, boxes, size, ratio)
        way(engine.PACKED)
        for one, other in zip(first, pool_and_back(feature, boxes, size, ratio), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("width", [1, 5, 15, 16, 17, 33, 70])
@pytest.mark.parametrize("channels", [1, 2, 3, 15])
def test_narrow_and_wide_maps(channels, width):
    """Windows of 16 numbers fit in a row, just so, or not at all."""
    for layout in (torch.contiguous_format, torch.channels_last):
        feature = torch.rand(1, channels, 6, width).contiguous(memory_format=layout)
        boxes = boxes_on(6, width, 20)
        for size, ratio in itertools.product((1, 2, 9, (2, 40)), (0, 2)):
            ours = pool_and_back(feature, boxes, size, ratio)
            with ops.use_reference():
                same = pool_and_back(feature, boxes, size, ratio)
                truth = pool_and_back(feature.double(), boxes.double(), size, ratio)
            for got, expected, exact in zip(ours, same, truth, strict=True):
                assert_within_budget(got, reference=expected, truth=exact)


@pytest.mark.parametrize("rows", [1, 3, 200])
def test_bands_of_a_gradient_change_no_bit(monkeypatch, rows):
    feature = torch.rand(2, 3, 90, 50)
    boxes = boxes_on(90, 50, 40, images=2)
    whole = pool_and_back(feature, boxes, 7, 2)[1]
    monkeypatch.setattr(planes_backward, "LEAST", 1)
    monkeypatch.setattr(planes_backward, "BAND", rows * 50)
    assert torch.equal(pool_and_back(feature, boxes, 7, 2)[1], whole)


def test_maps_of_both_layouts_in_one_call():
    """A result of one layout from maps of the other."""
    for channels in (3, 20, 70):
        maps = [torch.randn(1, channels, 32, 48), torch.randn(1, channels, 16, 24)]
        boxes = [boxes_on(128, 192, 40)[:, 1:]]
        levels = torch.arange(40) % 2
        expected = multiscale_roi_align(maps, boxes, (3, 5), [0.25, 0.125], 2, levels=levels)
        for mixed in (
            [maps[0], LAYOUTS["channels_last"](maps[1])],
            [LAYOUTS["channels_last"](maps[0]), maps[1]],
        ):
            got = multiscale_roi_align(mixed, boxes, (3, 5), [0.25, 0.125], 2, levels=levels)
            torch.testing.assert_close(got, expected)


def packed_by(monkeypatch, feature, boxes, size):
    """Cells, of 16 channels, that are packed by a call."""
    jobs, run = [], engine._run
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_run", lambda *args: jobs.append(run(*args)))
        roi_align(feature, boxes, size, 1.0, 2)
    return sum(job[forward.Job._fields.index("packed")] for job in jobs)


@pytest.mark.parametrize("count", [20, 200])
def test_no_output_size_makes_a_cell_be_packed_twice(monkeypatch, way, count):
    way(engine.PACKED)
    feature = torch.rand(1, 32, 100, 160)
    boxes = boxes_on(100, 160, count)
    cells = 100 * 160 * 2  # blocks of 16 channels
    groups = 64  # of several RoIs, or of one
    for size in (7, 28, 112, 224):
        packed = packed_by(monkeypatch, feature, boxes, size)
        own = int(
            (forward.DENSE * (boxes[:, 3] - boxes[:, 1] + 2) * (boxes[:, 4] - boxes[:, 2] + 2))
            .clamp(min=64)
            .sum()
        )
        assert 0 < packed <= max(own * 2, groups * cells)
    most = [packed_by(monkeypatch, feature, boxes, size) for size in (28, 112, 224)]
    assert max(most) <= 2 * min(most)  # 64 times the bins


def test_the_way_is_chosen_by_channels_layout_and_boxes():
    assert engine._way(256, True, 1) == engine._way(64, True, 10**6) == engine.DIRECT
    assert engine._way(3, False, 10**6) == engine._way(15, True, 10**6) == engine.PLANES
    assert engine._way(256, False, 8) == engine._way(32, True, 80) == engine.PLANES
    assert engine._way(256, False, 16) == engine._way(32, True, 100) == engine.PACKED
    assert engine._backward_way(3, False, 10**6) == engine._backward_way(256, False, 1) == engine.PLANES
    assert engine._backward_way(256, True, 100) == engine.PLANES
    assert engine._backward_way(16, False, 1000) == engine._backward_way(16, True, 1000) == engine.PACKED


def test_a_box_that_cannot_be_pooled_is_nan_in_every_way(way):
    for channels in (3, 20, 70):
        for lay in (lambda x: x, LAYOUTS["channels_last"]):
            feature = lay(torch.rand(1, channels, *MAP))
            boxes = boxes_on(*MAP, 40)
            boxes[::7, 2] = torch.nan
            boxes[3, 4] = torch.inf
            lost = ~boxes.isfinite().all(1)
            for name in (engine.PLANES, engine.PACKED) if channels > 15 else (engine.PLANES,):
                way(name)
                pooled = roi_align(feature, boxes, 5, 1.0, 2)
                assert torch.equal(pooled.isnan().all((1, 2, 3)), lost)
                assert torch.equal(pooled.isnan().any((1, 2, 3)), lost)
                grad = pool_and_back(feature, boxes, 5, 2)[1]
                weight = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(1))[~lost]
                leaf = feature.detach().requires_grad_()
                expected = torch.autograd.grad(roi_align(leaf, boxes[~lost], 5, 1.0, 2), leaf, weight)[0]
                assert torch.equal(grad, expected)


def test_descending_points_are_summed_as_the_reference_does():
    """With `aligned`, a box may be inside out: its sampling points run backwards."""
    feature = torch.rand(1, 3, 20, 30)
    boxes = torch.tensor([[0, 20.0, 12, 5, 3], [0, 8.0, 3, 2, 15], [0, 9.0, 9, 9, 9]])
    for size in (1, 4, 7):
        got = roi_align(feature, boxes, size, 1.0, 2, True)
        with ops.use_reference():
            torch.testing.assert_close(got, roi_align(feature, boxes, size, 1.0, 2, True))

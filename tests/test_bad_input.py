"""Input that no one should give and some do: what the documentation promises, row by row."""

import functools
import math
import re
import subprocess
import sys

import pytest
import torch
import torchvision.ops as peer
from processes import ON_X86, killed

import roialign
from roialign.testing import hostile_boxes, pyramid, random_boxes

pytestmark = pytest.mark.usefixtures("engine")

NAN, INF = math.nan, math.inf
SOUND = [4.0, 4.0, 40.0, 30.0]
SPOILED = [[*SOUND[:place], spoil, *SOUND[place + 1 :]] for spoil in (NAN, INF, -INF) for place in range(4)]
RATIOS = [2, -1]
LEVELS = {"one level": [8], "several levels": [4, 8, 16]}


def pool(strides, boxes, *, size=(64, 64), output_size=2, ratio=2, layout="contiguous", **options):
    features = pyramid(strides, image_size=size, images=len(boxes), layout=layout, **options)
    return roialign.multiscale_roi_align(
        features, boxes, output_size, [1 / s for s in strides], ratio, canonical_scale=28
    )


@functools.cache
def run_peer(program: str) -> subprocess.CompletedProcess[str]:
    """Run torchvision in a process of its own, which may die."""
    prelude = "import torch, torchvision.ops as peer\nnan, inf = float('nan'), float('inf')\n"
    return subprocess.run(
        [sys.executable, "-c", prelude + program], capture_output=True, text=True, timeout=120
    )


# NaN or infinity in a box


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("strides", LEVELS.values(), ids=LEVELS.keys())
@pytest.mark.parametrize("bad", SPOILED, ids=str)
def test_box_that_is_not_finite_gives_nan_to_its_roi_alone(bad, strides, ratio, layout):
    boxes = torch.tensor([SOUND, bad, SOUND])
    out = pool(strides, [boxes], ratio=ratio, layout=layout)
    expected = pool(strides, [boxes[::2]], ratio=ratio, layout=layout)
    assert out[1].isnan().all()
    assert torch.equal(out[::2], expected)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("strides", LEVELS.values(), ids=LEVELS.keys())
def test_box_that_is_not_finite_has_no_gradient(strides, ratio):
    boxes = torch.tensor([SOUND, *SPOILED, [20.0, 10.0, 44.0, 60.0]])
    features = [f.requires_grad_() for f in pyramid(strides, image_size=(64, 64))]
    scales = [1 / s for s in strides]
    finite = boxes.isfinite().all(1)
    every = roialign.multiscale_roi_align(features, [boxes], 2, scales, ratio, canonical_scale=28)
    sound = roialign.multiscale_roi_align(features, [boxes[finite]], 2, scales, ratio, canonical_scale=28)
    actual = torch.autograd.grad(every, features, torch.ones_like(every))
    expected = torch.autograd.grad(sound, features, torch.ones_like(sound))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0)


@pytest.mark.skipif(not ON_X86, reason="NaN becomes the cell -2^31 on x86 alone; on ARM it becomes cell 0")
def test_peer_is_killed_by_nan_in_a_box():
    done = run_peer("peer.roi_align(torch.rand(1, 2, 16, 16), torch.tensor([[0, nan, 0, 8, 8]]), 2, 1.0, 2)")
    assert killed(done.returncode)


# image index out of range in (K, 5)


@pytest.mark.parametrize(
    ("index", "shown"),
    [(2.0, "2"), (1e6, "1e+06"), (-1.0, "-1"), (-1e6, "-1e+06"), (NAN, "nan"), (INF, "inf"), (3e9, "3e+09")],
)
def test_image_index_out_of_range(index, shown):
    rois = torch.tensor([[0.0, *SOUND], [1.0, *SOUND], [index, *SOUND], [9.0, *SOUND]])
    message = f"boxes[2] must have its image index in [0, 2), got {shown}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        roialign.roi_align(torch.rand(2, 3, 16, 16), rois, 2)


def test_peer_is_killed_by_an_image_index_out_of_range():
    done = run_peer("peer.roi_align(torch.rand(1, 2, 16, 16), torch.tensor([[1e6, 0, 0, 8, 8]]), 2, 1.0, 2)")
    assert killed(done.returncode)


# more lists of boxes than images


def test_more_lists_than_images():
    boxes = [torch.tensor([SOUND])] * 3
    with pytest.raises(
        ValueError, match=r"^boxes must hold at most one tensor per image, got 3 for 2 images$"
    ):
        roialign.MultiScaleRoIAlign(["0"], 2, 2)({"0": torch.rand(2, 3, 16, 16)}, boxes, [(64, 64)] * 3)


def test_peer_raises_nothing_for_more_lists_than_images():
    done = run_peer(
        "x, boxes = {'0': torch.rand(1, 2, 16, 16)}, [torch.tensor([[0.0, 0, 8, 8]])] * 3\n"
        "print(len(peer.MultiScaleRoIAlign(['0'], 2, 2)(x, boxes, [(64, 64)] * 3)))"
    )
    assert killed(done.returncode) or done.stdout == "3\n"


# boxes inside out or without area


@pytest.mark.parametrize("strides", LEVELS.values(), ids=LEVELS.keys())
@pytest.mark.parametrize(
    ("box", "served_by"),
    [
        ([40.0, 8.0, 8.0, 30.0], 0),  # one side negative: no size
        ([8.0, 30.0, 40.0, 8.0], 0),
        ([60.0, 60.0, 2.0, 2.0], 2),  # both: eq. 1 sees their product
        ([8.0, 8.0, 8.0, 8.0], 0),
        ([8.0, 8.0, 40.0, 8.0], 0),
    ],
)
def test_boxes_inside_out_or_without_area_follow_one_rule(box, served_by, strides):
    served_by = min(served_by, len(strides) - 1)
    features = pyramid(strides, image_size=(64, 64))
    boxes = [torch.tensor([box])]
    scales = [1 / s for s in strides]
    out = roialign.multiscale_roi_align(features, boxes, 2, scales, 2, canonical_scale=28)
    expected = peer.roi_align(features[served_by], boxes, 2, scales[served_by], 2)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(
    "box", [[40.0, 8.0, 8.0, 30.0], [8.0, 8.0, 8.0, 8.0], [60.0, 60.0, 2.0, 2.0]], ids=str
)
def test_aligned_boxes_inside_out_are_not_widened(box):
    feature, boxes = pyramid([4], image_size=(64, 64))[0], [torch.tensor([box])]
    out = roialign.roi_align(feature, boxes, 2, 1 / 4, 2, aligned=True)
    torch.testing.assert_close(out, peer.roi_align(feature, boxes, 2, 1 / 4, 2, aligned=True))
    # As many points as the bin has cells is none; the peer may fail to allocate a negative number.
    assert roialign.roi_align(feature, boxes, 2, 1 / 4, -1, aligned=True).eq(0).all()


def test_peer_gives_zeros_for_a_box_inside_out_with_several_levels():
    x = {"0": torch.ones(1, 1, 16, 16), "1": torch.ones(1, 1, 8, 8)}
    boxes = [torch.tensor([[40.0, 8.0, 8.0, 30.0]])]
    assert peer.MultiScaleRoIAlign(["0", "1"], 2, 2)(x, boxes, [(64, 64)]).eq(0).all()
    assert roialign.MultiScaleRoIAlign(["0", "1"], 2, 2)(x, boxes, [(64, 64)]).eq(1).all()


# pyramids with gaps, from coarse to fine, of stride 14, and that change


@pytest.mark.parametrize("strides", [[8, 32], [32, 16, 8], [4, 16, 64]], ids=str)
def test_peer_gives_silent_zeros_where_ours_pools(strides):
    x = {str(i): torch.ones(1, 1, 512 // s, 512 // s) for i, s in enumerate(strides)}
    boxes = [torch.tensor([[1.0, 1.0, 501.0, 501.0]])]
    ours, theirs = (
        cls(list(x), 2, 2)(x, boxes, [(512, 512)])
        for cls in (roialign.MultiScaleRoIAlign, peer.MultiScaleRoIAlign)
    )
    assert theirs.eq(0).all()
    assert ours.eq(1).all()


def test_stride_of_no_power_of_two_needs_scales():
    feature = torch.arange(16.0).expand(1, 1, 16, 16)  # 224 pixels at stride 14
    boxes = [torch.tensor([[56.0, 56.0, 84.0, 84.0]])]  # 4 to 6 cells
    ours = roialign.MultiScaleRoIAlign(["p"], 1, 2, scales=[1 / 14])({"p": feature}, boxes, None)
    assert ours.item() == pytest.approx(5)
    theirs = peer.MultiScaleRoIAlign(["p"], 1, 2)({"p": feature}, boxes, [(224, 224)])
    assert theirs.item() == pytest.approx(5 * 14 / 16)


def scaled(scales, cells, image_shapes):
    x = {str(i): torch.ones(1, 1, *size) for i, size in enumerate(cells)}
    boxes = [torch.tensor([[4.0, 4.0, 6.0, 6.0]])]
    return roialign.MultiScaleRoIAlign(list(x), 1, 2, scales=scales)(x, boxes, image_shapes)


@pytest.mark.parametrize(
    ("strides", "cells", "image_shapes", "got"),
    [
        ([4, 8, 16, 32], [(64, 64), (32, 32), (16, 16), (8, 8)], [(256, 256)], "4 for a map of 64 x 64"),
        ([32, 16], [(8, 8), (16, 16)], [(256, 256)], "32 for a map of 8 x 8"),
        ([1, 2, 4], [(64, 64), (32, 32), (16, 16)], [(64, 64)], "2 for a map of 32 x 32"),
        ([2, 4], [(64, 96), (32, 48)], [(100, 150)], "4 for a map of 32 x 48"),  # padded
        ([14], [(16, 16)], [(224, 224)], "14 for a map of 16 x 16"),
        ([16], [(84, 84)], [(480, 640), (800, 600)], "16 for a map of 84 x 84"),  # padded to the largest
    ],
)
def test_strides_given_for_scales_are_refused_where_the_images_contradict_them(
    strides, cells, image_shapes, got
):
    with pytest.raises(
        ValueError, match=rf"^scales must be cells per pixel, 1 / stride, got {got} cells and"
    ):
        scaled(strides, cells, image_shapes)


@pytest.mark.parametrize(
    ("scales", "cells", "image_shapes"),
    [
        ([1 / 14], [(16, 16)], [(224, 224)]),
        ([1 / 14], [(15, 15)], [(223, 223)]),  # the last, incomplete patch dropped
        ([1 / 8, 1 / 32], [(64, 64), (16, 16)], [(512, 512)]),
        ([1 / 4], [(256, 256)], [(20, 30)]),  # a small image in a large canvas
        ([1 / 4], [(200, 200)], [(4000, 6000)]),  # the sizes of a photograph before it was shrunk
        ([2], [(128, 128)], [(64, 64)]),  # finer than the image
        ([2, 1, 1 / 2], [(128, 128), (64, 64), (32, 32)], [(64, 64)]),
        ([2], [(256, 256)], [(64, 64)]),  # and padded
        ([8], [(505, 505)], [(64, 64)]),  # and without a border
        ([1], [(62, 62)], [(64, 64)]),
        ([4, 8], [(64, 64), (32, 32)], None),  # nothing to contradict them
        ([4, 8], [(64, 64), (32, 32)], []),
    ],
)
def test_scales_that_may_be_right_are_not_questioned(scales, cells, image_shapes):
    scaled(scales, cells, image_shapes)


def test_other_sizes_after_the_first_call():
    small, large = ({"0": pyramid([s], image_size=(128, 128))[0]} for s in (8, 16))
    boxes = random_boxes([10], image_size=(128, 128))
    ours, theirs = roialign.MultiScaleRoIAlign(["0"], 2, 2), peer.MultiScaleRoIAlign(["0"], 2, 2)
    right = peer.MultiScaleRoIAlign(["0"], 2, 2)(large, boxes, [(128, 128)])
    for pooler in (ours, theirs):
        pooler(small, boxes, [(128, 128)])
    torch.testing.assert_close(ours(large, boxes, [(128, 128)]), right)
    assert not torch.allclose(theirs(large, boxes, [(128, 128)]), right)


@pytest.mark.parametrize(("image", "cells"), [((33, 33), 16), ((33, 60), 16), ((64, 33), 16)])
def test_images_much_smaller_than_the_padded_batch(image, cells):
    """33 pixels padded to 64 look like a stride of two on that axis."""
    feature = torch.rand(1, 2, cells, cells)
    boxes = [torch.tensor([[4.0, 4.0, 30.0, 30.0]])]
    out = roialign.MultiScaleRoIAlign(["0"], 2, 2)({"0": feature}, boxes, [image])
    stride = 4 if max(image) > 45 else 2  # an image that is small on both axes cannot be told
    torch.testing.assert_close(out, peer.roi_align(feature, boxes, 2, 1 / stride, 2))


# boxes far larger than the image


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("output_size", [1, 3, (2, 7)], ids=str)
def test_large_box_with_an_adaptive_grid_has_torchvisions_value(output_size, aligned):
    feature = pyramid([1], image_size=(12, 14), dtype=torch.float64)[0].requires_grad_()
    boxes = [torch.tensor([[-301.7, -205.3, 410.1, 333.9], [5.1, -1000.2, 9.3, 1400.7]], dtype=torch.float64)]
    results = []
    for function in (roialign.roi_align, peer.roi_align):
        out = function(feature, boxes, output_size, 1.0, -1, aligned)
        results.append((out, *torch.autograd.grad(out, feature, torch.ones_like(out))))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_adaptive_grids_that_all_miss_the_map(layout):
    """Not a single sampling point to visit, in either direction."""
    feature = pyramid([1], image_size=(16, 16), channels=64, layout=layout)[0].requires_grad_()
    out = roialign.roi_align(feature, [torch.tensor([[100.0, 100.0, 120.0, 120.0]])], 2, 1.0, -1)
    assert out.eq(0).all()
    assert torch.autograd.grad(out.sum(), feature)[0].eq(0).all()


@pytest.mark.parametrize("side", [1e5, 1e9, 1e18, 1e30])
def test_work_is_bounded_by_the_map(side):
    """A grid of side * side points: the peer runs out of memory from 1e5 on."""
    feature = torch.ones(1, 1, 16, 16).requires_grad_()
    out = roialign.roi_align(feature, [torch.tensor([[-side, -side, side, side]])], 1, 1.0, -1)
    # One point per cell; those in [-1, 16] see ones: about 17 * 17 of (2 * side) ** 2.
    assert 0 <= out.item() <= (18 / (2 * side)) ** 2
    assert torch.autograd.grad(out.sum(), feature)[0].isfinite().all()


def test_peer_runs_out_of_memory_for_a_large_box():
    roi = torch.tensor([[0, -1e9, -1e9, 1e9, 1e9]])
    with pytest.raises((MemoryError, ValueError, RuntimeError)):
        peer.roi_align(torch.ones(1, 1, 16, 16), roi, 1, 1.0, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [1, 2, -1])
@pytest.mark.parametrize("strides", LEVELS.values(), ids=LEVELS.keys())
def test_hostile_boxes_never_crash_and_spoil_only_their_own(strides, ratio, aligned, dtype):
    features = [f.requires_grad_() for f in pyramid(strides, image_size=(64, 64), dtype=dtype)]
    boxes = torch.cat((hostile_boxes(dtype=dtype), torch.tensor([SOUND], dtype=dtype)))
    out = roialign.multiscale_roi_align(
        features, [boxes], 2, [1 / s for s in strides], ratio, aligned=aligned, canonical_scale=28
    )
    assert torch.equal(out.isfinite().flatten(1).all(1), boxes.isfinite().all(1))
    for grad in torch.autograd.grad(out, features, torch.ones_like(out)):
        assert grad.isfinite().all()


# dtypes that torchvision refuses on the CPU


@pytest.mark.parametrize(
    "boxes_dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.uint8]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes_of_features_and_boxes_need_not_agree(dtype, boxes_dtype):
    features = pyramid([4, 8], image_size=(64, 64), dtype=dtype)
    boxes = torch.tensor([[4, 8, 40, 30], [0, 0, 9, 9]])  # exact in every dtype
    actual, expected = (
        roialign.multiscale_roi_align(features, [b], 2, [1 / 4, 1 / 8], 2)
        for b in (boxes.to(boxes_dtype), boxes.to(torch.float64))
    )
    assert actual.dtype == dtype
    assert torch.equal(actual, expected)


# NaN in the features


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("spoil", [NAN, INF])
@pytest.mark.parametrize(
    ("ratio", "aligned", "box"),
    [
        (1, False, [4.0, 4.0, 8.0, 8.0]),
        (2, False, [4.2, 3.7, 11.4, 9.9]),
        (-1, False, [4.2, 3.7, 11.4, 9.9]),
        (2, True, [-6.0, -6.0, 3.0, 3.0]),  # partly outside
        (2, False, [10.0, 10.0, 22.0, 22.0]),
        (-1, True, [-60.0, -50.0, 80.0, 70.0]),
        (2, False, [40.0, 40.0, 50.0, 50.0]),  # wholly outside: touches nothing
        (1, False, [-3.0, -3.0, -2.0, -2.0]),
    ],
)
def test_only_cells_that_a_sample_touches_can_spoil_a_result(box, ratio, aligned, spoil, layout):
    """A cell of weight zero beside a sample is touched as torchvision touches it: its NaN counts."""
    clean = pyramid([1], image_size=(16, 17), images=2, channels=3, layout=layout)[0]
    boxes = [torch.tensor([box])]
    expected = roialign.roi_align(clean, boxes, 3, 1.0, ratio, aligned)
    probe = torch.ones(1, 1, 16, 17, dtype=torch.float64).requires_grad_()
    weights = peer.roi_align(probe, [boxes[0].double()], 3, 1.0, ratio, aligned)
    touched = torch.autograd.grad(weights.sum(), probe)[0][0, 0] != 0

    outside = clean.clone()
    outside[0, :, ~grown(touched)] = spoil
    outside[1] = spoil
    assert torch.equal(roialign.roi_align(outside, boxes, 3, 1.0, ratio, aligned), expected)

    if touched.any():
        inside = clean.clone()
        y, x = touched.nonzero()[len(touched.nonzero()) // 2].tolist()
        inside[0, 1, y, x] = spoil
        out = roialign.roi_align(inside, boxes, 3, 1.0, ratio, aligned)
        assert not out[0, 1].isfinite().all()
        assert torch.equal(out[0, ::2], expected[0, ::2])


def grown(mask):
    """The mask and the next row and column, which a sample on a whole number touches with weight 0."""
    mask = mask.clone()
    mask[1:] |= mask[:-1].clone()
    mask[:, 1:] |= mask[:, :-1].clone()
    return mask

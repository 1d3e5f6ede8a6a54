"""Values and gradients beside torchvision's, in one table."""

from collections.abc import Callable, Sequence

import pytest
import torch
import torchvision.ops as peer
from torch import Tensor

import roialign
from roialign.testing import LAYOUTS, assert_within_budget, error_budget, pyramid, random_boxes

pytestmark = pytest.mark.usefixtures("engine")

SIZE = (160, 192)
STRIDES = {
    "one": [16],
    "two": [8, 16],
    "four": [4, 8, 16, 32],
    "five": [4, 8, 16, 32, 64],
    "finer than the image": [1, 2],
    "MobileNet": [32, 32],
    "last twice": [16, 32, 32],
}
MIXTURES = [
    *((name,) * 3 for name in LAYOUTS),
    ("contiguous", "channels_last", "sliced"),
    ("channels_last", "expanded_images", "contiguous"),
]

Pool = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]


def named(features: Sequence[Tensor]) -> dict[str, Tensor]:
    return {str(i): f for i, f in enumerate(features)}


def poolers(maps: int, output_size, ratio: int, *, image=SIZE, **canonical) -> tuple[Pool, Pool, Pool]:
    """Ours, torchvision's, and torchvision's in float64 with the levels that its float32 chose."""
    names = [str(i) for i in range(maps)]
    ours = roialign.MultiScaleRoIAlign(names, output_size, ratio, **canonical)
    theirs = peer.MultiScaleRoIAlign(names, output_size, ratio, **canonical)
    exact = peer.MultiScaleRoIAlign(names, output_size, ratio, **canonical)

    def pool_exactly(features, boxes):
        exact.scales = theirs.scales
        exact.map_levels = lambda _: theirs.map_levels([b.float() for b in boxes])
        return exact(named(features), [b.double() for b in boxes], [image])

    return (
        lambda features, boxes: ours(named(features), boxes, [image]),
        lambda features, boxes: theirs(named(features), boxes, [image]),
        pool_exactly,
    )


def pool_with_gradient(pool: Pool, features, boxes, dtype) -> list[Tensor]:
    """The pooled RoIs and the gradient of every map that got any."""
    features = [f.detach().to(dtype).requires_grad_() for f in features]
    out = pool(features, boxes)
    weight = torch.randn(
        out.shape, generator=torch.Generator().manual_seed(9)
    ).bfloat16()  # exact in all dtypes
    grads = torch.autograd.grad(out, features, weight.to(out.dtype), allow_unused=True)
    # torchvision gives None to a map without boxes, ours zeros.
    return [
        out.detach(),
        *(torch.zeros_like(f) if g is None else g for f, g in zip(features, grads, strict=True)),
    ]


ROUNDINGS = 10  # scale, product, half a cell, width, bin, its start (2), sampling point in it (3)
ASIDE = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, -1.0, 1.0, -1.0]], dtype=torch.float64)


def shifted(boxes: Sequence[Tensor]) -> list[list[Tensor]]:
    """Boxes as far off as float32 may lay their sampling points, along both diagonals.

    What a coordinate passes rounds it by half an `eps` of the box's largest, and such roundings add up to
    about the root of their number.
    """
    step = ROUNDINGS**0.5 * torch.finfo(torch.float32).eps / 2
    return [[b.double() + step * b.abs().amax(1, keepdim=True) * aside for b in boxes] for aside in ASIDE]


def assert_parity(pools: tuple[Pool, Pool, Pool], features, boxes) -> None:
    """Ours is as near to torchvision in float64 as others are; halves in float32.

    The others are torchvision in the same dtype, and in float64 with sampling points as far off as roundings
    may put them. Torchvision alone will not do: where a compiler made one rounding of a product and a sum, as
    on ARM, it may be nearer to the truth than the roundings that it is written with.
    """
    ours, theirs, exactly = pools
    dtype = features[0].dtype
    working = torch.promote_types(dtype, torch.float32)
    result = pool_with_gradient(ours, features, boxes, dtype)
    same = pool_with_gradient(theirs, features, [b.to(working) for b in boxes], working)
    if dtype == torch.float64:
        for a, r in zip(result, same, strict=True):
            torch.testing.assert_close(a, r, rtol=1e-12, atol=1e-12)
        return
    truth = pool_with_gradient(exactly, features, boxes, torch.float64)
    others = [same, *(pool_with_gradient(exactly, features, b, torch.float64) for b in shifted(boxes))]
    for a, t, *references in zip(result, truth, *others, strict=True):
        worst = max((r.to(dtype) for r in references), key=lambda r: error_budget(r, t))
        assert_within_budget(a, truth=t, reference=worst)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("strides", STRIDES.values(), ids=STRIDES.keys())
def test_pyramids(strides, dtype):
    features = pyramid(strides, image_size=SIZE, dtype=dtype)
    boxes = random_boxes([40], image_size=SIZE)
    assert_parity(poolers(len(strides), 7, 2, canonical_scale=56), features, boxes)


@pytest.mark.parametrize("ratio", [1, 2, 3, 0, -1])
@pytest.mark.parametrize("output_size", [1, 7, (3, 5), (14, 2)], ids=str)
def test_bins_and_sampling_points(output_size, ratio):
    features = pyramid([4, 8, 16, 32], image_size=SIZE)
    boxes = random_boxes([20], image_size=SIZE, seed=1)
    assert_parity(poolers(4, output_size, ratio, canonical_scale=56), features, boxes)


@pytest.mark.parametrize(
    ("images", "counts"),
    [(1, [12]), (1, [0]), (2, [6, 4]), (2, [0, 9]), (2, [9]), (3, [7, 0, 5]), (3, [0, 0, 0]), (3, [6, 4])],
)
def test_batches(images, counts):
    features = pyramid([4, 8, 16, 32], image_size=SIZE, images=images)
    boxes = random_boxes(counts, image_size=SIZE, seed=2)
    assert_parity(poolers(4, 7, 2), features, boxes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", MIXTURES, ids="-".join)
def test_layouts(layout, dtype):
    features = pyramid([8, 16, 32], image_size=SIZE, images=2, channels=20, layout=layout, dtype=dtype)
    boxes = random_boxes([15, 10], image_size=SIZE, seed=3)
    assert_parity(poolers(3, 7, 2, canonical_scale=56), features, boxes)


@pytest.mark.parametrize("channels", [1, 3, 15, 16, 17, 33])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_channel_counts(channels, layout):
    features = pyramid([8, 16], image_size=SIZE, channels=channels, layout=layout)
    boxes = random_boxes([10], image_size=SIZE, seed=4)
    assert_parity(poolers(2, 7, 2, canonical_scale=56), features, boxes)


@pytest.mark.parametrize("counts", [[1], [300], [150, 200]], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_box_counts(counts, layout):
    features = pyramid([4, 8, 16, 32], image_size=SIZE, images=2, channels=18, layout=layout)
    boxes = random_boxes(counts, image_size=SIZE, seed=5)
    assert_parity(poolers(4, 7, 2, canonical_scale=56), features, boxes)


@pytest.mark.parametrize(("scale", "level"), [(224, 4), (112, 4), (60, 3), (30, 2), (500, 6)])
def test_canonical_scale_and_level(scale, level):
    features = pyramid([4, 8, 16, 32], image_size=SIZE)
    boxes = random_boxes([40], image_size=SIZE, seed=6)
    assert_parity(poolers(4, 3, 2, canonical_scale=scale, canonical_level=level), features, boxes)


def test_one_cell_maps():
    features = pyramid([128, 256], image_size=(128, 128))
    boxes = random_boxes([30], image_size=(128, 128), seed=7)
    assert_parity(poolers(2, 3, 2, image=(128, 128), canonical_scale=14), features, boxes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize(
    ("output_size", "ratio", "scale"), [(7, 2, 1 / 4), ((3, 5), -1, 1 / 14), (1, 0, 1.0), (14, 3, 0.3)]
)
def test_roi_align(output_size, ratio, scale, aligned, dtype):
    features = pyramid([8], image_size=SIZE, images=2, dtype=dtype)
    boxes = random_boxes([15, 10], image_size=SIZE, seed=8)

    def pooled_by(function):
        def pool(features, boxes):
            boxes = [b.to(features[0].dtype) for b in boxes]
            return function(features[0], boxes, output_size, scale, ratio, aligned)

        return pool

    assert_parity((pooled_by(roialign.roi_align), *(pooled_by(peer.roi_align),) * 2), features, boxes)


def test_roi_align_takes_rows_in_any_order_of_images():
    features = pyramid([8], image_size=SIZE, images=3)[0]
    image = torch.tensor([2.0, 0.0, 1.0, 2.0, 1.0, 0.0])

    def pooled_by(function):
        def pool(features, boxes):
            rois = torch.cat((image[:, None], boxes[0]), 1).to(features[0].dtype)
            return function(features[0], rois, 7, 1 / 8, 2)

        return pool

    boxes = random_boxes([6], image_size=SIZE, seed=9)
    assert_parity((pooled_by(roialign.roi_align), *(pooled_by(peer.roi_align),) * 2), [features], boxes)


@pytest.mark.parametrize("output_size", [2, 7])
@pytest.mark.parametrize("ratio", [1, 2])
def test_float16_throughout_is_near_torchvisions(output_size, ratio):
    """torchvision computes the coordinates in float16 there, so near is all it can be."""
    cells, scale = 16, 1 / 4
    feature = torch.rand(1, 4, cells, cells, generator=torch.Generator().manual_seed(0)).half()
    corner = torch.rand(20, 2, generator=torch.Generator().manual_seed(1)) * 24
    boxes = [torch.cat((corner, corner + 8 + corner.flip(0)), 1).half()]  # inside the map
    eps = torch.finfo(torch.float16).eps
    # Four roundings move a coordinate by at most 4 * eps/2 * 16 cells; the values, in [0, 1], change
    # by at most 1 per cell on either axis. Sums and weights add one rounding per sampling point and tap.
    budget = 2 * (4 * eps / 2 * cells) + (4 + 4 * ratio**2) * eps
    actual = roialign.roi_align(feature, boxes, output_size, scale, ratio)
    expected = peer.roi_align(feature, boxes, output_size, scale, ratio)
    assert (actual.float() - expected.float()).abs().max() <= budget


def test_large_coordinates_keep_their_precision_beside_half_features():
    """At 2049 float16 steps by two: boxes must not be rounded to the dtype of the features."""
    feature = torch.arange(600.0).repeat(1, 1, 8, 1).half()
    boxes = [torch.tensor([[2049.0, 4.0, 2057.0, 12.0]])]
    actual = roialign.roi_align(feature, boxes, 1, 1 / 4, 2)
    assert actual.item() == pytest.approx((2049 + 2057) / 2 / 4, abs=0.25 + 1e-3)  # half's spacing at 512
    other = roialign.roi_align(feature.float(), boxes, 1, 1 / 4, 2)
    assert actual.item() == other.half().item()

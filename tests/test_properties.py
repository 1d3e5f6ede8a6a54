"""What holds for any input: linearity, adjointness, invariances."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import roialign
from roialign.testing import hostile_boxes, pyramid, random_boxes

pytestmark = pytest.mark.usefixtures("engine")

# The engine is the same for all examples of a test, so the fixture may stay.
some = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])

SIZE = (64, 80)
STRIDES = [4, 8, 16]
SCALES = [1 / s for s in STRIDES]

seeds = st.integers(0, 10_000)
layouts = st.sampled_from(["contiguous", "channels_last", "sliced", "transposed"])
poolings = st.fixed_dictionaries(
    {
        "output_size": st.tuples(st.integers(1, 8), st.integers(1, 8)),
        "sampling_ratio": st.sampled_from([-1, 0, 1, 2, 3]),
        "aligned": st.booleans(),
        "canonical_scale": st.sampled_from([14, 28, 56]),
    }
)


def maps(seed, layout="contiguous", images=2, channels=3, dtype=torch.float64):
    return pyramid(
        STRIDES, image_size=SIZE, images=images, channels=channels, dtype=dtype, layout=layout, seed=seed
    )


def pool(features, boxes, pooling):
    return roialign.multiscale_roi_align(features, boxes, scales=SCALES, **pooling)


@given(seed=seeds, layout=layouts, pooling=poolings, a=st.floats(-3, 3), b=st.floats(-3, 3))
@some
def test_linear_in_the_features(seed, layout, pooling, a, b):
    f, g = maps(seed, layout), maps(seed + 1)
    boxes = random_boxes([3, 4], image_size=SIZE, seed=seed)
    mixture = [a * x + b * y for x, y in zip(f, g, strict=True)]
    expected = a * pool(f, boxes, pooling) + b * pool(g, boxes, pooling)
    torch.testing.assert_close(pool(mixture, boxes, pooling), expected, rtol=1e-10, atol=1e-10)


@given(seed=seeds, layout=layouts, pooling=poolings)
@some
def test_backward_is_the_adjoint_of_forward(seed, layout, pooling):
    """<A x, y> = <x, A' y>."""
    features = [f.requires_grad_() for f in maps(seed, layout)]
    out = pool(features, random_boxes([3, 4], image_size=SIZE, seed=seed), pooling)
    y = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    grads = torch.autograd.grad(out, features, y)
    left = (out * y).sum()
    right = sum((f * g).sum() for f, g in zip(features, grads, strict=True))
    size = out.norm() * y.norm()
    assert abs(left - right) <= 1e-12 * size


@given(seed=seeds, layout=layouts, pooling=poolings, order=st.permutations(range(9)))
@some
def test_boxes_may_be_permuted(seed, layout, pooling, order):
    features, boxes = maps(seed, layout, images=1), random_boxes([9], image_size=SIZE, seed=seed)[0]
    expected = pool(features, [boxes], pooling)[list(order)]
    torch.testing.assert_close(
        pool(features, [boxes[list(order)]], pooling), expected, rtol=1e-11, atol=1e-11
    )


@given(
    seed=seeds, layout=layouts, pooling=poolings, counts=st.lists(st.integers(0, 4), min_size=3, max_size=3)
)
@some
def test_images_of_a_batch_are_pooled_on_their_own(seed, layout, pooling, counts):
    features, boxes = maps(seed, layout, images=3), random_boxes(counts, image_size=SIZE, seed=seed)
    alone = [pool([f[i : i + 1] for f in features], boxes[i : i + 1], pooling) for i in range(3)]
    torch.testing.assert_close(pool(features, boxes, pooling), torch.cat(alone), rtol=1e-11, atol=1e-11)


@given(seed=seeds, pooling=poolings, cells=st.tuples(st.integers(0, 3), st.integers(0, 3)))
@some
def test_translation_by_whole_cells(seed, pooling, cells):
    """A window of the map, and boxes in its coordinates; they stay a cell away from its borders."""
    dy, dx = cells
    feature = pyramid([4], image_size=(80, 96), dtype=torch.float64, seed=seed)[0]
    generator = torch.Generator().manual_seed(seed)
    corner = torch.randint(20, 40, (5, 2), generator=generator)
    boxes = torch.cat((corner, corner + torch.randint(0, 30, (5, 2), generator=generator)), 1).double()
    shift = 4 * torch.tensor([dx, dy, dx, dy])
    size, ratio, aligned = (pooling[key] for key in ("output_size", "sampling_ratio", "aligned"))
    expected = roialign.roi_align(feature, [boxes], size, 1 / 4, ratio, aligned)
    actual = roialign.roi_align(feature[:, :, dy:, dx:], [boxes - shift], size, 1 / 4, ratio, aligned)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@given(seed=seeds, layout=layouts, pooling=poolings)
@some
def test_mirrored_maps_and_boxes_give_the_mirrored_result(seed, layout, pooling):
    """A cell centre lies at a whole number when aligned, so the map is mirrored about its middle."""
    feature = pyramid([4], image_size=(80, 96), dtype=torch.float64, layout=layout, seed=seed)[0]
    boxes = random_boxes([6], image_size=(60, 70), dtype=torch.float64, seed=seed)[0].clamp(8, 70)
    size, ratio = pooling["output_size"], pooling["sampling_ratio"]
    expected = roialign.roi_align(feature, [boxes], size, 1 / 4, ratio, aligned=True).flip(3)
    mirrored = torch.stack((96 - boxes[:, 2], boxes[:, 1], 96 - boxes[:, 0], boxes[:, 3]), 1)
    actual = roialign.roi_align(feature.flip(3), [mirrored], size, 1 / 4, ratio, aligned=True)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@given(seed=seeds, layout=layouts, aligned=st.booleans())
@some
def test_maps_may_come_in_any_order(seed, layout, aligned):
    boxes = random_boxes([5, 5], image_size=SIZE, seed=seed)
    x = dict(zip("abc", maps(seed, layout), strict=True))
    scales = dict(zip("abc", SCALES, strict=True))
    expected = None
    for order, given_scales in itertools.product(itertools.permutations("abc"), (None, scales)):
        pooler = roialign.MultiScaleRoIAlign(
            list("abc"), 3, 2, canonical_scale=28, aligned=aligned, scales=given_scales
        )
        out = pooler({name: x[name] for name in order}, boxes, [SIZE])
        expected = out if expected is None else expected
        assert torch.equal(out, expected)


@given(seed=seeds, layout=layouts, pooling=poolings, dtype=st.sampled_from([torch.float32, torch.bfloat16]))
@some
@pytest.mark.usefixtures("threads")
def test_result_and_gradient_have_the_same_bits_for_any_number_of_threads(seed, layout, pooling, dtype):
    features = [f.requires_grad_() for f in maps(seed, layout, channels=33, dtype=dtype)]
    boxes = random_boxes([30, 20], image_size=SIZE, seed=seed)
    results = []
    for threads in (1, 2, 3, 5, 2):
        torch.set_num_threads(threads)
        out = pool(features, boxes, pooling)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
        results.append([out, *torch.autograd.grad(out, features, weight)])
    for result in results[1:]:
        assert all(torch.equal(a, e) for a, e in zip(result, results[0], strict=True))


@given(
    rows=st.lists(st.lists(st.floats(width=32), min_size=4, max_size=4), min_size=1, max_size=6),
    layout=layouts,
    pooling=poolings,
)
@some
def test_no_box_crashes_or_spoils_another(rows, layout, pooling):
    features = [f.requires_grad_() for f in maps(0, layout, images=1, dtype=torch.float32)]
    sound = torch.tensor([[4.0, 4.0, 40.0, 30.0], [10.0, 10.0, 12.0, 50.0]])
    wild = torch.tensor(rows, dtype=torch.float32)
    out = pool(features, [torch.cat((sound[:1], wild, sound[1:]))], pooling)
    expected = pool(features, [sound], pooling)
    torch.testing.assert_close(out[[0, -1]], expected, rtol=1e-5, atol=1e-6)
    finite = wild.isfinite().all(1)
    assert out[1:-1][~finite].isnan().all()
    ordinary = (wild.abs() < 1e18).all(1)  # no square of a side overflows
    assert out[1:-1][ordinary].isfinite().all()
    for grad in torch.autograd.grad(out, features, torch.ones_like(out)):
        assert grad.isfinite().all()


@given(pooling=poolings, layout=layouts, order=st.permutations(range(len(hostile_boxes()))))
@some
def test_hostile_boxes_in_any_order(pooling, layout, order):
    boxes = hostile_boxes()[list(order)]
    out = pool(maps(0, layout, images=1, dtype=torch.float32), [boxes], pooling)
    assert torch.equal(out.isnan().flatten(1).any(1), ~boxes.isfinite().all(1))


@given(seed=seeds, layout=layouts, pooling=poolings, value=st.floats(-100, 100))
@some
def test_constant_maps_pool_to_the_constant(seed, layout, pooling, value):
    features = [torch.full_like(f, value) for f in maps(seed, layout, images=1)]
    corner = torch.rand(6, 2, generator=torch.Generator().manual_seed(seed)) * 30 + 4
    boxes = torch.cat((corner, corner + 1 + corner.flip(0)), 1).clamp(max=min(SIZE))  # inside the image
    out = pool(features, [boxes], pooling)
    assert out.min().item() == pytest.approx(value, rel=1e-12, abs=1e-12)
    assert out.max().item() == pytest.approx(value, rel=1e-12, abs=1e-12)

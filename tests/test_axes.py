"""Maps of one, two and three axes: sequences, images and volumes; and a scale for each axis."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

import roialign
from roialign import ops
from roialign.testing import assert_within_budget

# Forward mode asks TorchScript for decompositions.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")

RATIOS = [1, 2, 3, 0, "exact"]
VOLUME = (6, 9, 11)  # cells
LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels innermost": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
    "turned": lambda t: t.transpose(2, -1).contiguous().transpose(2, -1),
    "sliced": lambda t: t.repeat_interleave(2, 2)[:, :, ::2],  # of whose slices rows do not go on in the next
    "expanded": lambda t: t[:1, :1].expand(t.shape),
}


def volume(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def boxes_of(axes: int, count: int, size: tuple[int, ...], seed: int = 0) -> Tensor:
    """`(count, 2 * axes)`, x first: some within, some over the border, some beside it, one inside out."""
    generator = torch.Generator().manual_seed(seed)
    sides = torch.tensor(size[::-1], dtype=torch.float64)
    low = (torch.rand(count, axes, dtype=torch.float64, generator=generator) * 1.4 - 0.3) * sides
    high = low + torch.rand(count, axes, dtype=torch.float64, generator=generator) * sides
    high[-1] = low[-1] - 2
    return torch.cat((low, high), 1)


def brute_force(feature: Tensor, box: list[float], bins: tuple[int, ...], scales, ratio: int, aligned: bool):
    """One bin after the other, one point after the other, by the words of docs/semantics.md."""
    axes, offset = feature.dim() - 1, 0.5 if aligned else 0.0
    starts, sizes = [], []
    for axis in range(axes):
        column = axes - 1 - axis
        start, end = (box[column + i * axes] * scales[axis] - offset for i in (0, 1))
        starts.append(start)
        sizes.append(end - start if aligned else max(end - start, 1.0))
    out = torch.zeros(feature.shape[0], *bins, dtype=torch.float64)
    grids = [ratio or max(math.ceil(size / n), 0) for size, n in zip(sizes, bins, strict=True)]
    for place in itertools.product(*map(range, bins)):
        for point in itertools.product(*map(range, grids)):
            at = [
                start + (b + (i + 0.5) / grid) * size / n
                for start, b, i, grid, size, n in zip(starts, place, point, grids, sizes, bins, strict=True)
            ]
            out[(slice(None), *place)] += interpolate(feature, at) / math.prod(grids)
    return out


def interpolate(feature: Tensor, at: list[float]) -> Tensor:
    for p, extent in zip(at, feature.shape[1:], strict=True):
        if not -1 <= p <= extent:
            return torch.zeros(feature.shape[0], dtype=torch.float64)
        p = min(max(p, 0.0), extent - 1.0)
        low = min(int(p), extent - 1)
        high = min(low + 1, extent - 1)
        feature = feature[:, low] * (1 - (p - low)) + feature[:, high] * (p - low)
    return feature


@pytest.mark.parametrize("reference", [False, True], ids=["engine", "reference"])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [1, 2, 0])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_brute_force(axes, ratio, aligned, reference):
    size, bins = VOLUME[-axes:], (2, 3, 2)[-axes:]
    scales = (0.5, 1.25, 1.0)[-axes:]
    feature = volume(1, 3, *size)
    boxes = boxes_of(axes, 8, [n / s for n, s in zip(size, scales, strict=True)])
    with ops.use_reference() if reference else torch.enable_grad():
        out = roialign.roi_align(feature, [boxes], bins, scales, ratio, aligned)
    for i, box in enumerate(boxes.tolist()):
        torch.testing.assert_close(out[i], brute_force(feature[0], box, bins, scales, ratio, aligned))


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("aligned", [False, True])
def test_a_volume_of_equal_slices_is_an_image(ratio, aligned):
    feature, boxes = volume(2, 20, 9, 11), boxes_of(3, 9, VOLUME)
    boxes[:, 2], boxes[:, 5] = 1.2, 4.4  # within all slices
    deep = feature[:, :, None].expand(-1, -1, 6, -1, -1)
    out = roialign.roi_align(deep, [boxes, boxes[:4]], (2, 3, 4), 1.0, ratio, aligned)
    flat = boxes[:, [0, 1, 3, 4]]
    expected = roialign.roi_align(feature, [flat, flat[:4]], (3, 4), 1.0, ratio, aligned)
    torch.testing.assert_close(out, expected[:, :, None].expand(-1, -1, 2, -1, -1))


@pytest.mark.parametrize("ratio", RATIOS)
def test_an_image_of_one_row_is_a_sequence(ratio):
    feature, boxes = volume(2, 20, 40), boxes_of(1, 9, (40,))
    out = roialign.roi_align(feature, [boxes, boxes[:3]], 5, 1.0, ratio)
    rows = torch.stack((boxes[:, 0], torch.zeros(9), boxes[:, 1], torch.ones(9)), 1)
    expected = roialign.roi_align(feature[:, :, None], [rows, rows[:3]], (1, 5), 1.0, ratio)
    torch.testing.assert_close(out, expected[:, :, 0])


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("ratio", [2, 0, "exact"])
def test_no_axis_is_another(order, ratio):
    feature, boxes, bins, scales = volume(1, 5, *VOLUME), boxes_of(3, 9, VOLUME), (2, 3, 4), (1.0, 0.5, 0.75)
    out = roialign.roi_align(feature, [boxes], bins, scales, ratio)
    turned = feature.permute(0, 1, *(2 + axis for axis in order))
    columns = [2 - axis for axis in reversed(order)]
    swapped = boxes[:, columns + [c + 3 for c in columns]]
    result = roialign.roi_align(
        turned, [swapped], [bins[axis] for axis in order], [scales[axis] for axis in order], ratio
    )
    torch.testing.assert_close(result, out.permute(0, 1, *(2 + axis for axis in order)))


def test_grid_sample_in_five_dimensions():
    """One point a bin, inside the volume, is trilinear interpolation at its middle."""
    feature, size = volume(1, 4, *VOLUME), torch.tensor(VOLUME[::-1], dtype=torch.float64)
    low = torch.rand(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * (size - 4)
    boxes, bins = torch.cat((low, low + 3.5), 1), (2, 3, 4)
    out = roialign.roi_align(feature, [boxes], bins, 1.0, 1)
    middles = [(torch.arange(n, dtype=torch.float64) + 0.5) * 3.5 / n for n in bins]
    z, y, x = (low[:, 2 - i, None] + middles[i] for i in range(3))
    shape = (6, *bins)
    points = x[:, None, None], y[:, None, :, None], z[:, :, None, None]
    points = torch.stack([p.expand(shape) for p in points], -1)
    grid = 2 * points / (size - 1) - 1
    expected = grid_sample(feature.expand(6, -1, -1, -1, -1), grid, align_corners=True)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("axes", [1, 3])
@pytest.mark.parametrize("channels", [1, 3, 16, 70])
def test_engines_agree_with_the_definition(axes, layout, dtype, channels):
    sizes = [(40,), (21,)] if axes == 1 else [(6, 9, 11), (3, 5, 6)]
    features = [LAYOUTS[layout](volume(2, channels, *size, seed=i).to(dtype)) for i, size in enumerate(sizes)]
    boxes = [boxes_of(axes, n, sizes[0], seed=n) for n in (12, 5)]
    boxes[0][3, 0] = torch.nan
    for ratio in RATIOS:
        results = []
        for double, reference in ((False, False), (False, True), (True, True)):
            kind = torch.float64 if double or dtype == torch.float64 else torch.float32
            leaves = [f.double() if double else f for f in features]
            leaves = [f.detach().requires_grad_() for f in leaves]
            given = [b.to(kind) for b in boxes]
            with ops.use_reference() if reference else torch.enable_grad():
                out = roialign.multiscale_roi_align(
                    leaves, given, (2, 3, 2)[-axes:], [1.0, 0.5], ratio, canonical_scale=3, canonical_level=0
                )
                grad = volume(*out.shape, seed=1).to(dtype).to(out.dtype)
                results.append((out.detach(), *torch.autograd.grad(out, leaves, grad)))
        for actual, expected, truth in zip(*results, strict=True):
            assert actual.stride() == expected.stride()
            if dtype == torch.float64:
                torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11, equal_nan=True)
            else:
                assert_within_budget(actual, truth=truth, reference=expected)


def test_many_boxes_of_many_channels_and_few_of_each():
    """Ways through the engine that small problems do not take."""
    feature = volume(2, 64, 12, 20, 24).float()
    boxes = [boxes_of(3, n, (12, 20, 24), seed=n).float() for n in (90, 40)]
    for memory_format in (torch.contiguous_format, torch.channels_last_3d):
        leaf = feature.to(memory_format=memory_format).requires_grad_()
        for few in (slice(None), slice(1)):
            some = [b[few] for b in boxes]
            out = roialign.roi_align(leaf, some, 7, 1.0, 2)
            assert out.is_contiguous(memory_format=memory_format)
            (grad,) = torch.autograd.grad(out.square().sum(), leaf)
            assert grad.is_contiguous(memory_format=memory_format)
            with ops.use_reference():
                expected = roialign.roi_align(leaf, some, 7, 1.0, 2)
                (expected_grad,) = torch.autograd.grad(expected.square().sum(), leaf)
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_gradients(axes):
    sizes = [[n // k + 2 for n in VOLUME[-axes:]] for k in (1, 2)]
    features = [volume(1, 2, *size).requires_grad_() for size in sizes]
    boxes = boxes_of(axes, 5, VOLUME[-axes:]).requires_grad_()

    def pool(boxes, *maps):
        return roialign.multiscale_roi_align(
            maps, [boxes], 2, [1.0, 0.5], "exact", canonical_scale=3, canonical_level=0, box_gradients=True
        )

    assert torch.autograd.gradcheck(pool, (boxes, *features), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda *maps: pool(boxes.detach(), *maps), features)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_levels_by_the_geometric_mean_of_the_sides(axes):
    """A cube of side `canonical_scale * 2^k` belongs to level k, and so does every box as large."""
    maps = [torch.full((1, 1, *[64 >> level] * axes), float(level)) for level in range(4)]
    sides = [1.9, 2.0, 3.9, 4.0, 7.9, 8.0, 15.9, 16.0, 40.0]
    boxes = torch.tensor([[0.0] * axes + [side] * axes for side in sides])
    scales = [1.0, 0.5, 0.25, 0.125]
    options = {"canonical_scale": 2, "canonical_level": 0}
    out = roialign.multiscale_roi_align(maps, [boxes], 1, scales, 1, **options)
    assert out.flatten(1).amax(1).round().tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3]
    if axes > 1:  # twice as long, half as wide
        stretched = boxes.clone()
        stretched[:, axes] *= 2
        stretched[:, axes + 1] /= 2
        again = roialign.multiscale_roi_align(maps, [stretched], 1, scales, 1, **options)
        assert torch.equal(again.round(), out.round())


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_a_scale_for_each_axis(axes):
    """What is stretched along one axis, map and boxes with it, is pooled the same."""
    size, factors = VOLUME[-axes:], (3.0, 0.5, 2.0)[-axes:]
    features = [volume(1, 3, *size), volume(1, 3, *[n // 2 for n in size])]
    boxes = boxes_of(axes, 8, size)
    options = {"levels": torch.arange(8) % 2}
    out = roialign.multiscale_roi_align(features, [boxes], 2, [1.0, 0.5], 2, **options)
    stretched = boxes * torch.tensor(factors[::-1] * 2, dtype=torch.float64)
    scales = [[1 / f for f in factors], [0.5 / f for f in factors]]
    result = roialign.multiscale_roi_align(features, [stretched], 2, scales, 2, **options)
    torch.testing.assert_close(result, out)
    with ops.use_reference():
        expected = roialign.multiscale_roi_align(features, [stretched], 2, scales, 2, **options)
    torch.testing.assert_close(result, expected)
    names, levels = {"a": scales[0], "b": scales[1]}, options["levels"]
    pooler = roialign.MultiScaleRoIAlign(["a", "b"], 2, 2, scales=names, map_levels=lambda _: levels)
    assert torch.equal(pooler(dict(zip("ab", features, strict=True)), [stretched]), result)


def test_scales_per_axis_and_equation_1():
    """A map's level is that of the geometric mean of its strides."""
    maps = [torch.full((1, 1, 20, 20), float(level)) for level in range(2)]
    boxes = torch.tensor([[0.0, 0.0, 15.9, 15.9], [0.0, 0.0, 16.0, 16.0]])
    out = roialign.multiscale_roi_align(
        maps, [boxes], 1, [(1.0, 1.0), (1.0, 0.25)], 1, canonical_scale=8, canonical_level=0
    )
    assert out.flatten().tolist() == [0.0, 1.0]


def test_modules():
    pyramid = {"a": volume(2, 3, 8, 16, 16), "b": volume(2, 3, 4, 8, 8)}
    boxes = [boxes_of(3, 5, (32, 64, 64), seed=s) for s in (0, 1)]
    pooler = roialign.MultiScaleRoIAlign(["a", "b"], 7, 2)
    out = pooler(pyramid, boxes, [(32, 64, 64), (30, 60, 64)])
    expected = roialign.multiscale_roi_align(list(pyramid.values()), boxes, 7, [1 / 4, 1 / 8], 2)
    assert torch.equal(out, expected)
    assert out.shape == (10, 3, 7, 7, 7)
    with pytest.raises(ValueError, match="scales must be given for volumes whose strides differ by axis"):
        pooler(pyramid, boxes, [(8, 64, 64), (8, 60, 64)])
    temporal = {"a": volume(2, 3, 64), "b": volume(2, 3, 32)}
    spans = [boxes_of(1, 5, (256,), seed=s) for s in (0, 1)]
    expected = roialign.multiscale_roi_align(list(temporal.values()), spans, 7, [1 / 4, 1 / 8], 2)
    assert torch.equal(pooler(temporal, spans, [(256,), (250,)]), expected)
    one = roialign.RoIAlign((2, 3, 4), 0.25, 2)
    assert one(pyramid["a"], boxes).shape == (10, 3, 2, 3, 4)
    many = roialign.MultiScaleRoIAlign(["a"], (2, 3, 4), 2, scales=[0.25])
    assert many(pyramid, boxes).shape == (10, 3, 2, 3, 4)


@pytest.mark.parametrize("axes", [1, 3])
@pytest.mark.parametrize("ratio", [2, 0, "exact"])
def test_compiled_exported_and_in_plain_operators(axes, ratio):
    class Head(torch.nn.Module):
        def forward(self, first, second, boxes):
            return roialign.multiscale_roi_align(
                [first, second], [boxes], 3, [1.0, 0.5], ratio, canonical_scale=3, canonical_level=0
            )

    maps = [volume(1, 3, *[n // k + 1 for n in VOLUME[-axes:]]).float() for k in (1, 2)]
    boxes = boxes_of(axes, 7, VOLUME[-axes:]).float()
    expected = Head()(*maps, boxes)
    torch.testing.assert_close(torch.compile(Head(), fullgraph=True)(*maps, boxes), expected)
    dynamic = (None, None, {0: torch.export.Dim("k")})
    program = torch.export.export(Head(), (*maps, boxes), dynamic_shapes=dynamic)
    assert torch.equal(program.module()(*maps, boxes[:4]), expected[:4])
    lowered = program.run_decompositions(roialign.decompositions())
    assert not any("roialign" in str(node.target) for node in lowered.graph.nodes)
    torch.testing.assert_close(lowered.module()(*maps, boxes[:4]), expected[:4])


@pytest.mark.parametrize("axes", [1, 3])
def test_backward_in_plain_operators(axes):
    from roialign import lowering, schema

    maps = [volume(1, 3, *[n // k + 1 for n in VOLUME[-axes:]]).requires_grad_() for k in (1, 2)]
    boxes = boxes_of(axes, 7, VOLUME[-axes:])
    seen = []

    def record(grad, rois, levels, shapes, pooling):
        seen.append((grad, rois, levels, *shapes, *pooling))
        return schema.scatter(grad, rois, levels, shapes, pooling)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "scatter", record)
        out = roialign.multiscale_roi_align(
            maps, [boxes], 2, [1.0, 0.5], 2, canonical_scale=3, canonical_level=0
        )
        grads = torch.autograd.grad(out.sin().sum(), maps)
    for actual, expected in zip(lowering.backward(*seen[0]), grads, strict=True):
        torch.testing.assert_close(actual.view(expected.shape), expected)


def test_batches_of_volumes_with_their_own_boxes():
    maps, boxes = volume(4, 1, 2, *VOLUME), torch.stack([boxes_of(3, 3, VOLUME, seed=s) for s in range(4)])
    call = lambda m, b: roialign.roi_align(m, [b], 2, 1.0, 2)  # noqa: E731
    expected = torch.stack([call(m, b) for m, b in zip(maps, boxes, strict=True)])
    torch.testing.assert_close(torch.vmap(call)(maps, boxes), expected)
    torch.testing.assert_close(torch.vmap(call, (None, 0))(maps[0], boxes)[0], expected[0])


def their_points(
    low: float, high: float, bins: int, ratio: int, extent: int
) -> list[list[tuple[int, int, float]]]:
    """Of either migration: bins along an axis, each with the cells below and above its points and the shares.

    By the CUDA sources of medicaldetectiontoolkit, whose three axes are alike, and of Align1D, whose one is.
    """
    size = max(high - low, 1.0)
    bin_size = size / bins
    grid = ratio if ratio > 0 else math.ceil(size / bins)
    laid = []
    for b in range(bins):
        laid.append([])
        for i in range(grid):
            p = low + b * bin_size + (i + 0.5) * bin_size / grid
            if p < -1.0 or p > extent:
                laid[-1].append((0, 0, math.nan))
                continue
            p = max(p, 0.0)
            below = int(p)
            above, p = (below + 1, p) if below < extent - 1 else (extent - 1, float(extent - 1))
            below = min(below, extent - 1)
            laid[-1].append((below, above, p - below))
    return laid


@pytest.mark.parametrize("ratio", [2, 0])
def test_the_pooling_of_medicaldetectiontoolkit(ratio):
    feature, bins, scale = volume(1, 2, 9, 11, 6), (3, 2, 2), 0.5
    theirs = [
        [1.0, 3.0, 15.5, 20.2, 2.1, 9.0],
        [-4.0, 10.0, 7.0, 30.0, -1.0, 20.0],
        [3.0, 3.0, 3.5, 3.2, 4.0, 4.1],
    ]
    boxes = torch.tensor(theirs, dtype=torch.float64)[:, [4, 1, 0, 5, 3, 2]]
    out = roialign.roi_align(feature, [boxes], bins, scale, ratio)
    for k, (y1, x1, y2, x2, z1, z2) in enumerate(theirs):
        ends = (y1, y2), (x1, x2), (z1, z2)
        ys, xs, zs = (
            their_points(low * scale, high * scale, n, ratio, extent)
            for (low, high), n, extent in zip(ends, bins, feature.shape[2:], strict=True)
        )
        for a, b, c in itertools.product(*map(range, bins)):
            total, count = torch.zeros(2, dtype=torch.float64), 0
            for (y0, y1_, dy), (x0, x1_, dx), (z0, z1_, dz) in itertools.product(ys[a], xs[b], zs[c]):
                count += 1
                if math.isnan(dy + dx + dz):
                    continue
                for y, wy in ((y0, 1 - dy), (y1_, dy)):
                    for x, wx in ((x0, 1 - dx), (x1_, dx)):
                        for z, wz in ((z0, 1 - dz), (z1_, dz)):
                            total += wy * wx * wz * feature[0, :, y, x, z]
            torch.testing.assert_close(out[k, :, a, b, c], total / count)


@pytest.mark.parametrize("ratio", [2, 0])
def test_the_pooling_of_align1d(ratio):
    feature, bins = volume(2, 3, 30), 4
    rois = torch.tensor([[0, 3.5, 20.0], [1, -4.0, 50.0], [1, 7.0, 7.2]], dtype=torch.float64)
    out = roialign.roi_align(feature, rois, bins, 1.0, ratio)
    for k, (image, start, end) in enumerate(rois.tolist()):
        for b, points in enumerate(their_points(start, end, bins, ratio, 30)):
            total = torch.zeros(3, dtype=torch.float64)
            for below, above, share in points:
                if not math.isnan(share):
                    line = feature[int(image)]
                    total += (1 - share) * line[:, below] + share * line[:, above]
            torch.testing.assert_close(out[k, :, b], total / len(points))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: roialign.roi_align(torch.rand(2, 8), [torch.rand(1, 4)], 2),
            r"input must have shape \(N, C, H, W\), or of a volume \(N, C, D, H, W\), or of a sequence",
        ),
        (lambda: roialign.roi_align(torch.rand(1, 2, 3, 4, 5, 6), [torch.rand(1, 4)], 2), "input must have"),
        (
            lambda: roialign.roi_align(torch.rand(8, 12, 18), [torch.rand(5, 4)], 2),
            r"boxes\[0\] must have shape \(L, 2\) for an input of shape \(8, 12, 18\), got \(5, 4\)",
        ),
        (
            lambda: roialign.roi_align(torch.rand(1, 2, 4, 4, 4), torch.rand(5, 5), 2),
            r"boxes must have shape \(K, 7\) for an input of shape \(1, 2, 4, 4, 4\), got \(5, 5\)",
        ),
        (
            lambda: roialign.roi_align(torch.rand(1, 2, 4, 4, 4), [torch.rand(5, 6)], (7, 7)),
            r"output_size must be one integer or three, got \(7, 7\)",
        ),
        (
            lambda: roialign.roi_align(torch.rand(1, 2, 4), [torch.rand(5, 2)], (7, 7)),
            r"output_size must be one integer, got \(7, 7\)",
        ),
        (
            lambda: roialign.roi_align(torch.rand(1, 2, 4, 4), [torch.rand(5, 4)], 2, (1.0, 1.0, 1.0)),
            r"spatial_scale must be a number, or one for each of 2 axes, got \(1.0, 1.0, 1.0\)",
        ),
        (
            lambda: roialign.multiscale_roi_align([torch.rand(1, 2, 4, 4)], [torch.rand(5, 4)], 2, [(1, 0)]),
            "each of scales must be positive and finite, got 0",
        ),
        (
            lambda: roialign.multiscale_roi_align(
                [torch.rand(1, 2, 4, 4), torch.rand(1, 2, 4)], [torch.rand(5, 4)], 2, [1, 1]
            ),
            r"features\[1\] must have the axes of features\[0\]",
        ),
        (
            lambda: roialign.MultiScaleRoIAlign(["a"], (2, 3), 2, scales=[1])(
                {"a": torch.rand(1, 2, 4, 4, 4)}, [torch.rand(5, 6)]
            ),
            r"output_size must be one integer or three, got \(2, 3\)",
        ),
        (
            lambda: roialign.MultiScaleRoIAlign(["a"], 2, 2)(
                {"a": torch.rand(1, 2, 4, 4, 4)}, [torch.rand(5, 6)], [(8, 8)]
            ),
            r"image_shapes\[0\] must be \(depth, height, width\), at least 1, got \(8, 8\)",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (lambda: roialign.RoIAlign((2, 3, 4), 1.0, 2), "output_size must be of two axes in TorchScript"),
        (lambda: roialign.RoIAlign(2, (1.0, 0.5), 2), "spatial_scale must be a number in TorchScript"),
        (
            lambda: roialign.MultiScaleRoIAlign(["0"], 2, 2, scales=[(1.0, 0.5)]),
            "scales must be a list in TorchScript, one number per map",
        ),
        (lambda: roialign.MultiScaleRoIAlign(["0"], (2, 3, 4), 2), "output_size must be of two axes"),
    ],
)
def test_torchscript_refuses_by_name(module, message):
    pytest.importorskip("torchvision")
    with pytest.raises(TypeError, match=message):
        torch.jit.script(module())


def test_an_image_index_that_does_not_exist():
    rois = torch.tensor([[0.0, 1, 1, 1, 3, 3, 3], [3, 1, 1, 1, 3, 3, 3]], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"boxes\[1\] must have its image index in \[0, 1\), got 3"):
        roialign.roi_align(volume(1, 2, *VOLUME), rois, 2)

"""`box_gradients=True`: how pooled features change as boxes move."""

import pytest
import torch
from test_exact import weights
from torch import Tensor

import roialign
from roialign import ops, schema
from roialign.levels import staircase
from roialign.testing import LAYOUTS, pyramid, random_boxes

# Forward mode asks TorchScript for decompositions.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")

SIZE = (48, 72)
STRIDES = [4, 8]
SCALES = [1 / s for s in STRIDES]
RATIOS = [1, 2, 3, 0, "exact"]
# Inside, over the borders, around the map, beside it; with fractions that put no point on a cell.
BOXES = torch.tensor(
    [
        [3.31, 4.17, 30.23, 21.41],
        [-9.27, -5.13, 20.41, 9.37],
        [60.13, 40.29, 90.57, 70.11],
        [-30.19, -31.23, 120.37, 100.41],
        [200.3, 10.2, 230.1, 20.7],
        [10.31, 7.57, 31.71, 40.19],
    ],
    dtype=torch.float64,
)


def maps(**options) -> list[Tensor]:
    options = {"image_size": SIZE, "channels": 2, "dtype": torch.float64, **options}
    return [f.requires_grad_() for f in pyramid(STRIDES, **options)]


def pool(features, boxes, ratio, aligned=False, size=(3, 2), **options):
    return roialign.multiscale_roi_align(
        features,
        [boxes],
        size,
        SCALES,
        ratio,
        aligned=aligned,
        canonical_scale=28,
        box_gradients=True,
        **options,
    )


@pytest.mark.parametrize("reference", [False, True], ids=["engine", "reference"])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", RATIOS)
def test_gradcheck(ratio, aligned, reference):
    features, boxes = maps(), BOXES.clone().requires_grad_()

    def check():
        call = lambda boxes, *maps: pool(maps, boxes, ratio, aligned)  # noqa: E731
        assert torch.autograd.gradcheck(call, (boxes, *features), check_forward_ad=True)

    if reference:
        with ops.use_reference():
            check()
    else:
        check()


@pytest.mark.parametrize("aligned", [False, True])
def test_of_integrals_it_is_the_difference_quotient_everywhere(aligned):
    """Also where ends of bins lie on centres of cells, and where bins leave the map."""
    boxes = torch.tensor(
        [[8.0, 8, 16, 24], [0, 0, 70, 46], [-3, -2.5, 4, 4], [64, 40, 82, 61], [10.25, 7.5, 14.75, 12]],
        dtype=torch.float64,
    )
    (feature,) = pyramid([4], image_size=SIZE, channels=3, dtype=torch.float64)
    leaf = boxes.clone().requires_grad_()
    out = roialign.roi_align(feature, [leaf], (3, 2), 0.25, "exact", aligned, box_gradients=True)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (actual,) = torch.autograd.grad(out, leaf, cotangent)
    step = 1e-6
    for column in range(4):
        ends = []
        for sign in (-1, 1):
            moved = boxes.clone()
            moved[:, column] += sign * step
            pooled = roialign.roi_align(feature, [moved], (3, 2), 0.25, "exact", aligned)
            ends.append((pooled * cotangent).flatten(1).sum(1))
        torch.testing.assert_close(actual[:, column], (ends[1] - ends[0]) / (2 * step), rtol=1e-5, atol=1e-5)


def test_the_papers_formula():
    """Of Precise RoI Pooling: as an end moves, what lies there less the mean, over the length."""
    (feature,) = pyramid([1], image_size=(20, 24), channels=2, dtype=torch.float64)
    x1, y1, x2, y2 = box = 3.3, 4.1, 15.7, 12.9
    leaf = torch.tensor([box], dtype=torch.float64, requires_grad=True)
    out = roialign.roi_align(feature, [leaf], 1, 1.0, "exact", True, box_gradients=True)
    out.sum().backward()
    ys = weights(y1, y2, 1, 20, True)[0]
    mean = out.detach().sum()
    for column, end, sign in ((0, x1, -1), (2, x2, 1)):
        at = end - 0.5
        line = feature[0, :, :, int(at)] * (1 - at % 1) + feature[0, :, :, int(at) + 1] * (at % 1)
        there = (line @ ys).sum()
        torch.testing.assert_close(leaf.grad[0, column], sign * (there - mean) / (x2 - x1))


def test_a_grid_by_hand():
    """One bin of one point on a slope: the point moves by half of what either end does."""
    feature = torch.arange(10.0).expand(1, 1, 8, 10)
    leaf = torch.tensor([[2.0, 1.0, 6.0, 5.0]], requires_grad=True)
    out = roialign.roi_align(feature, [leaf], 1, 1.0, 1, box_gradients=True)
    out.sum().backward()
    assert out.item() == 4.0
    assert leaf.grad.tolist() == [[0.5, 0.0, 0.5, 0.0]]


def test_what_was_widened_does_not_grow():
    feature = torch.arange(10.0).expand(1, 1, 8, 10)
    leaf = torch.tensor([[2.25, 1.0, 2.5, 5.0]], requires_grad=True)
    roialign.roi_align(feature, [leaf], 1, 1.0, 1, box_gradients=True).sum().backward()
    assert leaf.grad.tolist() == [[1.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [3, 20, 70])
def test_engines_agree_with_the_definition(dtype, layout, channels):
    boxes = torch.cat((BOXES, *random_boxes([20], image_size=SIZE)))
    for ratio in RATIOS:
        results = []
        for double in (False, True):
            features = maps(dtype=dtype, layout=layout, channels=channels, images=2)
            leaf = boxes.to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
            if double:
                features, leaf = [f.double() for f in features], leaf.detach().double().requires_grad_()
            out = pool(features, leaf, ratio)
            grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(dtype).to(out.dtype)
            with ops.use_reference() if double else torch.enable_grad():
                results.append(torch.autograd.grad(pool(features, leaf, ratio), leaf, grad)[0])
        actual, truth = results
        tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, 3e-2)
        assert float((actual - truth).abs().max()) <= tolerance * float(truth.abs().max())


def test_repeats_to_the_last_bit():
    features, boxes = maps(dtype=torch.float32, channels=20), random_boxes([40], image_size=SIZE)[0]
    results = []
    for threads in (1, 2, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        leaf = boxes.clone().requires_grad_()
        pool(features, leaf, 2).square().sum().backward()
        results.append(leaf.grad)
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[1], results[2])


def test_the_default_is_torchvisions():
    features, boxes = maps(), BOXES.clone().requires_grad_()
    out = roialign.multiscale_roi_align(features, [boxes], 2, SCALES, 2)
    assert torch.autograd.grad(out.sum(), [boxes, *features], allow_unused=True)[0] is None


@pytest.mark.parametrize("rows", [False, True], ids=["boxes", "rois"])
def test_either_form_and_the_modules(rows):
    feature = maps()[0].detach()
    boxes = BOXES.clone().requires_grad_()
    given = torch.cat((torch.zeros(len(boxes), 1), boxes), 1) if rows else [boxes]
    for module in (roialign.RoIAlign(2, 0.25, 2, box_gradients=True), None):
        if module is None:
            if rows:
                continue
            pooler = roialign.MultiScaleRoIAlign(["0"], 2, 2, scales=[0.25], box_gradients=True)
            assert "box_gradients=True" in repr(pooler)
            out = pooler({"0": feature}, given)
        else:
            out = module(feature, given)
        (grad,) = torch.autograd.grad(out.sum(), boxes)
        expected = roialign.roi_align(feature, [boxes], 2, 0.25, 2, box_gradients=True)
        assert torch.equal(grad, torch.autograd.grad(expected.sum(), boxes)[0])
        assert grad[:4].abs().amax(1).min() > 0


def test_boxes_that_cannot_be_pooled_have_none():
    features, boxes = maps(), BOXES.clone()
    boxes[1, 2], boxes[3, 0] = torch.nan, torch.inf
    boxes.requires_grad_()
    for context in (ops.use_reference, torch.enable_grad):
        with context():
            out = pool(features, boxes, 2)
            for loss in (out.nan_to_num().sum(), out.square().sum()):  # of the second their gradient is NaN
                (grad,) = torch.autograd.grad(loss, boxes, retain_graph=True)
                assert grad[[1, 3]].count_nonzero() == 0
                assert grad.isfinite().all()
                assert grad[[0, 2, 5]].abs().amax(1).min() > 0


def test_a_nan_elsewhere_stays_elsewhere():
    feature = torch.rand(1, 2, 12, 18)
    feature[:, :, 9:] = torch.nan
    feature[:, :, :, 14:] = torch.nan
    for ratio in RATIOS:
        leaf = BOXES[:1].float().requires_grad_()
        roialign.roi_align(feature, [leaf], 2, 0.25, ratio, box_gradients=True).sum().backward()
        assert leaf.grad.isfinite().all()


def test_twice_in_the_features_but_not_in_the_boxes():
    features, boxes = maps(), BOXES.clone().requires_grad_()
    call = lambda *maps: torch.autograd.grad(  # noqa: E731
        pool(maps, boxes, "exact").square().sum(), boxes, create_graph=True
    )[0]
    assert torch.autograd.gradcheck(call, features)
    (slope,) = torch.autograd.grad(pool(features, boxes, "exact").square().sum(), boxes, create_graph=True)
    with pytest.raises(NotImplementedError, match="box_gradients have no second derivative in the boxes"):
        torch.autograd.grad(slope.sum(), boxes)


def test_the_gradient_of_a_gradient_in_the_features_moves_with_the_boxes():
    features, boxes = maps(), BOXES.clone().requires_grad_()
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(f.shape, dtype=f.dtype, generator=generator) for f in features]

    def call(boxes):
        grads = torch.autograd.grad(pool(features, boxes, 2).sin().sum(), features, create_graph=True)
        return sum((g * d).sum() for g, d in zip(grads, directions, strict=True))

    assert torch.autograd.gradcheck(call, boxes)


def test_transforms():
    feature, boxes = maps()[0].detach(), BOXES.clone()

    def one(box):
        return roialign.roi_align(feature, [box[None]], 2, 0.25, 2, box_gradients=True).sum()

    leaf = boxes.clone().requires_grad_()
    expected = torch.autograd.grad(
        roialign.roi_align(feature, [leaf], 2, 0.25, 2, box_gradients=True).sum(), leaf
    )[0]
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(one))(boxes), expected)
    torch.testing.assert_close(torch.stack([torch.func.jacfwd(one)(b) for b in boxes]), expected)
    torch.testing.assert_close(torch.stack([torch.func.jacrev(one)(b) for b in boxes]), expected)
    for twice in (torch.func.hessian, lambda f: torch.func.jacfwd(torch.func.jacfwd(f))):
        with pytest.raises(NotImplementedError, match="box_gradients have no second derivative in the boxes"):
            twice(one)(boxes[0])
    with pytest.raises(NotImplementedError, match="boxes must not carry a tangent"):
        torch.func.jvp(lambda b: roialign.roi_align(feature, [b], 2, 0.25, 2), (boxes,), (boxes,))


@pytest.mark.parametrize("ratio", [2, 0, "exact"])
def test_compiled(ratio):
    features, boxes = [f.detach() for f in maps(dtype=torch.float32)], BOXES.float()

    def loss(boxes, *features):
        return pool(features, boxes, ratio).square().sum()

    leaf = boxes.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf, *features), leaf)
    compiled = torch.compile(loss, fullgraph=True)
    (actual,) = torch.autograd.grad(compiled(leaf, *features), leaf)
    torch.testing.assert_close(actual, expected)


def test_batches_of_gradients():
    feature, leaf = maps()[0].detach(), BOXES.clone().requires_grad_()
    out = roialign.roi_align(feature, [leaf], 2, 0.25, "exact", box_gradients=True)
    cotangents = torch.randn(3, *out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(0))
    (batched,) = torch.autograd.grad(out, leaf, cotangents, is_grads_batched=True, retain_graph=True)
    for actual, cotangent in zip(batched, cotangents, strict=True):
        torch.testing.assert_close(actual, *torch.autograd.grad(out, leaf, cotangent, retain_graph=True))


def test_forward_over_reverse():
    """How the gradient of the features moves with the boxes."""
    feature, boxes = maps()[0].detach(), BOXES.clone()
    direction = torch.randn(boxes.shape, dtype=boxes.dtype, generator=torch.Generator().manual_seed(0))

    def gradient(boxes):
        def loss(feature):
            return roialign.roi_align(feature, [boxes], 3, 0.25, 2, box_gradients=True).sin().sum()

        return torch.func.grad(loss)(feature)

    _, tangent = torch.func.jvp(gradient, (boxes,), (direction,))
    step = 1e-6
    ends = [gradient(boxes + sign * step * direction) for sign in (1, -1)]
    torch.testing.assert_close(tangent, (ends[0] - ends[1]) / (2 * step), rtol=1e-5, atol=1e-6)


def test_the_number_of_boxes_does_not_compile_anew():
    feature, compiled = torch.rand(1, 3, 12, 18), 0

    def backend(graph, _inputs):
        nonlocal compiled
        compiled += 1
        return graph

    def loss(boxes):
        return roialign.roi_align(feature, [boxes], 3, 0.25, 2, box_gradients=True).square().sum()

    call = torch.compile(loss, fullgraph=True, backend=backend, dynamic=True)
    for count in (5, 7, 9, 40):
        leaf = random_boxes([count], image_size=SIZE)[0].requires_grad_()
        (actual,) = torch.autograd.grad(call(leaf), leaf)
        torch.testing.assert_close(actual, torch.autograd.grad(loss(leaf), leaf)[0])
    assert compiled == 1


def test_many_boxes_of_many_channels():
    """The gradient of so many is added up in parts."""
    feature, boxes = torch.rand(1, 64, 12, 18), random_boxes([300], image_size=SIZE)[0]
    grads = []
    for layout in (torch.contiguous_format, torch.channels_last):
        leaf = boxes.clone().requires_grad_()
        x = feature.contiguous(memory_format=layout)
        roialign.roi_align(x, [leaf], 7, 0.25, 2, box_gradients=True).square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
    one = [boxes[i : i + 1].clone().requires_grad_() for i in range(0, 300, 50)]
    for i, leaf in enumerate(one):
        roialign.roi_align(feature, [leaf], 7, 0.25, 2, box_gradients=True).square().sum().backward()
        torch.testing.assert_close(leaf.grad[0], grads[0][50 * i], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ratio", RATIOS)
def test_the_derivative_in_plain_operators(ratio):
    features, rois = [f.detach() for f in maps()], torch.cat((torch.zeros(len(BOXES), 1), BOXES), 1)
    steps = staircase(SCALES, 28, 4, torch.float64)
    points = {"exact": -1}.get(ratio, ratio)
    for column in range(5):
        pooling = schema.Pooling((3, 2), SCALES, points, False, *steps, True, column)
        expected = schema.pool(features, rois, None, pooling)
        lowered = roialign.decompositions()[schema.forward_operator()](features, rois, None, *pooling)
        torch.testing.assert_close(lowered, expected)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*quantized tensor:UserWarning")
def test_what_cannot_be_had_is_refused_by_name():
    feature, rois = torch.rand(1, 3, 12, 18), torch.rand(3, 5)
    with pytest.raises(TypeError, match="box_gradients must be True or False, got the string 'yes'"):
        roialign.roi_align(feature, rois, 2, box_gradients="yes")
    quantised = torch.quantize_per_tensor(feature, 0.1, 0, torch.quint8)
    with pytest.raises(TypeError, match="box_gradients must be False for a quantised input"):
        roialign.roi_align(quantised, rois, 2, box_gradients=True)
    pytest.importorskip("torchvision")
    modules = (
        roialign.RoIAlign(2, 1.0, 2, box_gradients=True),
        roialign.MultiScaleRoIAlign(["0"], 2, 2, box_gradients=True),
    )
    for module in modules:
        with pytest.raises(TypeError, match="box_gradients must be False in TorchScript"):
            torch.jit.script(module)
    with pytest.raises(TypeError, match="box_gradients have no form in torchvision's operator"):
        torch.jit.trace(modules[0], (feature, rois))

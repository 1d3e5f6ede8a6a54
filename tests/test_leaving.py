"""Programs that leave Python or this package: TorchScript, traces, ONNX models of either exporter."""

import copy
import io
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch

import roialign
from roialign.testing import pyramid, random_boxes

torchvision = pytest.importorskip("torchvision")
from roialign.torchvision import MultiScaleRoIAlign  # noqa: E402 - needs torchvision

SIZE, NAMES, SCALES = (96, 128), ["0", "1", "2"], [1 / 4, 1 / 8, 1 / 16]
SHAPES = [SIZE, SIZE]

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit:FutureWarning", "ignore:.*legacy:DeprecationWarning"
)


@pytest.fixture
def maps():
    return dict(zip(NAMES, pyramid([4, 8, 16], image_size=SIZE, images=2, channels=3), strict=True))


@pytest.fixture
def boxes():
    return random_boxes([9, 4], image_size=SIZE)


def saved_and_loaded(script):
    file = io.BytesIO()
    torch.jit.save(script, file)
    file.seek(0)
    return torch.jit.load(file)


@pytest.mark.parametrize("cls", [roialign.MultiScaleRoIAlign, MultiScaleRoIAlign])
@pytest.mark.parametrize(
    "options", [{}, {"scales": SCALES}, {"aligned": True}, {"canonical_scale": 40}, {"sampling_ratio": -1}]
)
def test_script(cls, options, maps, boxes):
    module = cls(NAMES, (3, 2), **{"sampling_ratio": 2} | options)
    before = dict(vars(module))
    script = saved_and_loaded(torch.jit.script(module))
    assert {name: value for name, value in vars(module).items() if name != "__overloads__"} == before
    assert type(module) is cls
    torch.testing.assert_close(script(maps, boxes, SHAPES), module(maps, boxes, SHAPES))
    some = {"2": maps["2"], "0": maps["0"]}  # one is missing, and their order is none
    torch.testing.assert_close(script(some, boxes, SHAPES), module(some, boxes, SHAPES))
    assert script(maps, [boxes[0][:0]], SHAPES).shape == (0, 3, 3, 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_script_of_other_dtypes(dtype, maps, boxes):
    maps = {name: m.to(dtype) for name, m in maps.items()}
    module = roialign.MultiScaleRoIAlign(NAMES, 3, 2)
    pooled, expected = torch.jit.script(module)(maps, boxes, SHAPES), module(maps, boxes, SHAPES)
    assert pooled.dtype == dtype
    torch.testing.assert_close(pooled, expected)


def test_script_of_functions(maps, boxes):
    @torch.jit.script
    def one(x: torch.Tensor, rois: list[torch.Tensor]):
        return roialign.roi_align(x, rois, 2, 0.25, 2, True)

    @torch.jit.script
    def many(x: list[torch.Tensor], rois: list[torch.Tensor]):
        return roialign.multiscale_roi_align(x, rois, (2, 3), [0.25, 0.125, 0.0625], 2, aligned=True)

    torch.testing.assert_close(one(maps["0"], boxes), roialign.roi_align(maps["0"], boxes, 2, 0.25, 2, True))
    expected = roialign.multiscale_roi_align(list(maps.values()), boxes, (2, 3), SCALES, 2, aligned=True)
    torch.testing.assert_close(many(list(maps.values()), boxes), expected)


def test_script_of_one_map(maps, boxes):
    module = roialign.RoIAlign((2, 3), 0.25, 2)
    script = torch.jit.script(module)
    rois = torch.cat((torch.ones(9, 1), boxes[0]), 1)
    for given in (boxes, rois):
        torch.testing.assert_close(script(maps["0"], given), module(maps["0"], given))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"map_levels": lambda boxes: boxes}, "map_levels must be None in TorchScript"),
        ({"scales": dict(zip(NAMES, SCALES, strict=True))}, "scales must be a list in TorchScript"),
    ],
)
def test_what_cannot_be_scripted_says_so(options, error):
    with pytest.raises(TypeError, match=error):
        torch.jit.script(roialign.MultiScaleRoIAlign(NAMES, 3, 2, **options))


def detector(kind, **options):
    """One of torchvision's with a small backbone, whose random head lets candidates pass."""
    torch.manual_seed(0)
    builder = getattr(torchvision.models.detection, f"{kind}_resnet50_fpn")
    options = {"min_size": 64, "max_size": 96, "box_score_thresh": 0.0, "num_classes": 3} | options
    model = builder(weights=None, weights_backbone=None, box_detections_per_img=5, **options).eval()
    return model, roialign.convert_poolers(copy.deepcopy(model))


@pytest.mark.parametrize("kind", ["fasterrcnn", "maskrcnn", "keypointrcnn"])
def test_script_of_a_detector(kind):
    theirs, ours = detector(kind)
    poolers = [m for m in ours.modules() if isinstance(m, roialign.MultiScaleRoIAlign)]
    script = saved_and_loaded(torch.jit.script(ours))
    assert [m for m in ours.modules() if isinstance(m, roialign.MultiScaleRoIAlign)] == poolers
    images = [torch.rand(3, 60, 80)]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (found,), (expected,) = script(images)[1], theirs(images)
    assert len(expected["boxes"]) > 0
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["fasterrcnn", "maskrcnn", "keypointrcnn"])
def test_script_of_a_detector_in_training(kind):
    theirs, ours = (model.train() for model in detector(kind))
    target = {
        "boxes": torch.tensor([[10.0, 10.0, 50.0, 50.0]]),
        "labels": torch.tensor([1]),
        "masks": torch.ones(1, 60, 80, dtype=torch.uint8),
        "keypoints": torch.tensor([[[20.0, 20.0, 1.0]] * 17]),
    }
    images = [torch.rand(3, 60, 80)]
    script = torch.jit.script(ours)
    torch.manual_seed(1)
    expected = theirs(images, [target])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        losses = script(images, [target])[0]
    assert losses.keys() == expected.keys()
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name], loss, rtol=1e-4, atol=1e-5)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in script.roi_heads.parameters())


def test_script_trains(maps, boxes):
    module = roialign.MultiScaleRoIAlign(NAMES, 3, 2)
    leaves = {name: m.requires_grad_() for name, m in maps.items()}
    script = torch.jit.script(module)
    for _ in range(3):  # it is optimised after some runs
        grads = torch.autograd.grad(script(leaves, boxes, SHAPES).square().sum(), list(leaves.values()))
    expected = torch.autograd.grad(module(leaves, boxes, SHAPES).square().sum(), list(leaves.values()))
    for grad, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, other)


class Pooling(torch.nn.Module):
    """Of one image: what is traced takes tensors."""

    def __init__(self, **options):
        super().__init__()
        self.pooler = roialign.MultiScaleRoIAlign(NAMES, 2, 2, **options)

    def forward(self, a, b, c, boxes):
        return self.pooler(dict(zip(NAMES, (a, b, c), strict=True)), [boxes], [SIZE])


OPTIONS = [
    {},
    {"aligned": True, "scales": SCALES},
    {"map_levels": lambda boxes: torch.cat([(b[:, 0] > 60).long() for b in boxes])},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_trace_runs_where_this_package_is_not(options, maps, boxes, tmp_path):
    inputs = [m[:1] for m in maps.values()]
    module = Pooling(**options)
    path = str(tmp_path / "trace.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numbers become constants
        torch.jit.trace(module, (*inputs, boxes[0])).save(path)
    others = [boxes[0][:n] for n in (0, 1, 7)]
    torch.save((inputs, others), tmp_path / "inputs.pt")
    program = f"""
        import sys
        sys.modules["roialign"] = None  # cannot be imported
        import torch, torchvision
        inputs, others = torch.load({str(tmp_path / "inputs.pt")!r})
        trace = torch.jit.load({path!r})
        torch.save([trace(*inputs, boxes) for boxes in others], {str(tmp_path / "pooled.pt")!r})
    """
    subprocess.run([sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)], check=True, timeout=300)
    for pooled, other in zip(torch.load(tmp_path / "pooled.pt"), others, strict=True):
        torch.testing.assert_close(pooled, module(*inputs, other))


def in_runtime(model: bytes, inputs):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    return [
        torch.from_numpy(out)
        for out in session.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})
    ]


def legacy_model(module, inputs, **options) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, inputs, file, dynamo=False, opset_version=18, **options)
    return file.getvalue()


@pytest.mark.parametrize("options", OPTIONS)
def test_legacy_onnx(options, maps, boxes):
    pytest.importorskip("onnx")
    module = Pooling(**options)
    inputs = [m[:1] for m in maps.values()]
    names = ["a", "b", "c", "boxes"]
    model = legacy_model(module, (*inputs, boxes[0]), input_names=names, dynamic_axes={"boxes": {0: "boxes"}})
    for count in (0, 1, 7):
        (pooled,) = in_runtime(model, [*inputs, boxes[0][:count]])
        torch.testing.assert_close(pooled, module(*inputs, boxes[0][:count]))


@pytest.mark.parametrize("kind", ["fasterrcnn", "maskrcnn", "keypointrcnn"])
def test_legacy_onnx_of_a_detector(kind):
    pytest.importorskip("onnx")
    _, ours = detector(kind)
    image = torch.rand(3, 60, 80)
    model = legacy_model(ours, ([image],), do_constant_folding=False)
    with torch.no_grad():
        (expected,) = ours([image])
    assert len(expected["boxes"]) > 0
    for found, name in zip(in_runtime(model, [image]), expected, strict=True):
        torch.testing.assert_close(found, expected[name], rtol=1e-3, atol=1e-3)


def test_a_trace_where_torchvision_was_not_imported(tmp_path):
    """Its import must not become part of the trace."""
    program = """
        import sys, torch, roialign
        assert "torchvision" not in sys.modules
        x, boxes = torch.rand(1, 2, 16, 16), torch.tensor([[1.0, 1, 30, 30]])
        trace = torch.jit.trace(lambda x, b: roialign.roi_align(x, [b], 2, 0.25, 2), (x, boxes))
        assert "torchvision::roi_align" in str(trace.graph)
        torch.testing.assert_close(trace(x, boxes), roialign.roi_align(x, [boxes], 2, 0.25, 2))
    """
    subprocess.run([sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)], check=True, timeout=300)

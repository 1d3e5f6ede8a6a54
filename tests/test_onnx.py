"""Through ONNX: standard operators only, and ONNX Runtime gets eager's numbers."""

import functools
import logging
from collections import Counter

import onnxruntime
import pytest
import torch
import torchvision
from conftest import needs_torch

import roialign
from roialign.onnx import translation_table
from roialign.testing import assert_within_budget, hostile_boxes, pyramid, random_boxes

SIZE = (64, 80)
STRIDES = [4, 8, 16]
SCALES = [1 / s for s in STRIDES]
NAMES = ["0", "1", "2"]

# torch.onnx.export copies attributes of torch's own that are deprecated, and says so
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


class Head(torch.nn.Module):
    """The public module, with its boxes as tensors of their own, as a graph has them."""

    def __init__(self, ratio: int = 2, **options):
        super().__init__()
        options = {"canonical_scale": 28, "scales": SCALES, **options}
        self.pool = roialign.MultiScaleRoIAlign(NAMES, (3, 2), ratio, **options)

    def forward(self, x: dict[str, torch.Tensor], first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return self.pool(x, [first, second])


def maps(**options) -> dict[str, torch.Tensor]:
    options = {"image_size": SIZE, "images": 2, "channels": 3, **options}
    return dict(zip(NAMES, pyramid(STRIDES, **options), strict=True))


def to_onnx(module: torch.nn.Module, args: tuple, **options) -> torch.onnx.ONNXProgram:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    program = torch.onnx.export(
        module.eval(),
        args,
        dynamo=True,
        custom_translation_table=translation_table(),
        verbose=False,
        **options,
    )
    assert {opset.domain for opset in program.model_proto.opset_import} == {""}
    return program


@functools.cache
def export(ratio: int = 2, aligned: bool = False) -> onnxruntime.InferenceSession:
    """Export with dynamic numbers of boxes, and dynamic sizes of maps."""
    auto = torch.export.Dim.AUTO
    sizes = {name: {2: auto, 3: auto} for name in NAMES}
    program = to_onnx(
        Head(ratio, aligned=aligned),
        (maps(), *random_boxes([5, 4], image_size=SIZE)),
        dynamic_shapes={"x": sizes, "first": {0: auto}, "second": {0: auto}},
    )
    counts = Counter(node.op_type for node in program.model_proto.graph.node)
    assert counts["RoiAlign"] == counts["NonZero"] == len(STRIDES)  # each level pools its own RoIs
    return onnxruntime.InferenceSession(program.model_proto.SerializeToString())


def run(
    session: onnxruntime.InferenceSession, x: dict[str, torch.Tensor], *boxes: torch.Tensor
) -> torch.Tensor:
    names = [i.name for i in session.get_inputs()]
    values = dict(zip(names, [f.numpy() for f in (*x.values(), *boxes)], strict=True))
    return torch.from_numpy(session.run(None, values)[0])


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [2, -1])
def test_onnx_runtime_gets_the_numbers_of_eager(ratio, aligned):
    module = Head(ratio, aligned=aligned)
    session = export(ratio, aligned)
    for counts, scale in [((5, 4), 1), ((0, 30), 1), ((1, 0), 2), ((0, 0), 1)]:
        size = (SIZE[0] * scale, SIZE[1] * scale)
        x, boxes = maps(image_size=size, seed=scale), random_boxes(counts, image_size=size, seed=7)
        exact = {name: f.double() for name, f in x.items()}
        actual, expected = run(session, x, *boxes), module(x, *boxes)
        assert_within_budget(actual, truth=module(exact, *boxes), reference=expected)


def test_boxes_on_the_boundary_between_two_levels():
    """Sides of `28 * 2^k`, and the floats around them, have the level in ONNX that they have in torch."""
    sides = torch.tensor([28.0 * 2**k for k in range(-2, 2)])
    near = [torch.nextafter(sides, torch.tensor(towards)) for towards in (0.0, torch.inf)]
    sides = torch.cat([sides, *near, sides * (1 + 2e-7), sides * (1 - 1e-6), sides * (1 - 2e-6)])
    boxes = torch.stack((torch.zeros_like(sides), torch.zeros_like(sides), sides, sides), 1)
    x = {name: torch.full_like(f, float(name)) for name, f in maps().items()}
    module = Head()
    expected = module(x, boxes, boxes)
    assert set(expected.unique().tolist()) == {0.0, 1.0, 2.0}
    assert torch.equal(run(export(), x, boxes, boxes), expected)


def test_boxes_that_cannot_be_pooled_give_nan():
    x, boxes = maps(), hostile_boxes()
    actual, expected = run(export(), x, boxes, boxes[:1]), Head()(x, boxes, boxes[:1])
    assert expected.isnan().any()
    torch.testing.assert_close(actual, expected, equal_nan=True)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [2, -1])
def test_boxes_that_are_inside_out(ratio, aligned):
    """ONNX Runtime takes the negative grid of one such box for an overflow, and fails the whole run."""
    x, boxes = maps(), random_boxes([3], image_size=SIZE)[0]
    x1, y1, x2, y2 = boxes[0].tolist()
    turned = torch.tensor([[x2, y1, x1, y2], [x1, y2, x2, y1], [x2, y2, x1, y1], [x1, y1, x1, y2]])
    boxes = torch.cat((turned, boxes))
    actual, expected = (
        run(export(ratio, aligned), x, boxes, boxes[:1]),
        Head(ratio, aligned=aligned)(x, boxes, boxes[:1]),
    )
    torch.testing.assert_close(actual, expected)


def test_half_maps_and_given_levels():
    class Given(torch.nn.Module):
        def forward(self, features, boxes, levels):
            return roialign.multiscale_roi_align(features, [boxes], 2, SCALES, 2, levels=levels)

    features = [f.half() for f in pyramid(STRIDES, image_size=SIZE, channels=3)]
    args = features, random_boxes([6], image_size=SIZE)[0], torch.arange(6) % 3
    session = onnxruntime.InferenceSession(to_onnx(Given(), args).model_proto.SerializeToString())
    actual = run(session, dict(zip(NAMES, features, strict=True)), *args[1:])
    assert actual.dtype == torch.float16
    torch.testing.assert_close(actual, Given()(*args))


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [2, 0])
def test_scales_per_axis_and_sequences(ratio, aligned):
    class Two(torch.nn.Module):
        def forward(self, features, boxes, sequences, spans):
            images = roialign.multiscale_roi_align(
                features, [boxes], 2, [(s, s / 2) for s in SCALES], ratio,
                aligned=aligned, canonical_scale=28, box_gradients=True,
            )  # fmt: skip
            temporal = roialign.multiscale_roi_align(
                sequences, [spans], 5, SCALES, ratio, aligned=aligned, canonical_scale=28
            )
            return images, temporal

    features = pyramid(STRIDES, image_size=SIZE, channels=3)
    sequences = [torch.rand(1, 4, 80 // s) for s in STRIDES]
    boxes = random_boxes([6], image_size=SIZE)[0]
    args = features, boxes, sequences, boxes[:, [0, 2]]
    session = onnxruntime.InferenceSession(to_onnx(Two(), args).model_proto.SerializeToString())
    values = [t.numpy() for t in (*features, boxes, *sequences, boxes[:, [0, 2]])]
    names = [i.name for i in session.get_inputs()]
    results = session.run(None, dict(zip(names, values, strict=True)))
    for actual, expected in zip(results, Two()(*args), strict=True):
        torch.testing.assert_close(torch.from_numpy(actual), expected, rtol=1e-4, atol=1e-5)


def test_volumes_are_refused_by_name():
    class Volume(torch.nn.Module):
        def forward(self, volume, boxes):
            return roialign.roi_align(volume, [boxes], 2)

    with pytest.raises(Exception, match="volumes have no form in ONNX"):
        to_onnx(Volume(), (torch.rand(1, 3, 4, 5, 6), torch.rand(3, 6)))


def faster_rcnn() -> torch.nn.Module:
    torch.manual_seed(0)
    model = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None,
        weights_backbone=None,
        min_size=64,
        max_size=96,
        rpn_pre_nms_top_n_test=50,
        rpn_post_nms_top_n_test=20,
        box_detections_per_img=10,
        num_classes=3,
    )
    model = roialign.convert_poolers(model.eval())

    class OneImage(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, image):
            (found,) = self.model([image])
            return found["boxes"], found["labels"], found["scores"]

    return OneImage().eval()


def photograph() -> torch.Tensor:
    return torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(1))


def test_what_stops_faster_rcnn_is_torchvisions_batched_nms():
    """`_batched_nms_coordinate_trick` asks whether there are any boxes."""
    with pytest.raises(torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode) as stopped:
        torch.export.export(faster_rcnn(), (photograph(),), strict=False)
    assert "boxes.py" in str(stopped.value)
    assert "batched_nms" in str(stopped.value)


@needs_torch("2.10", "torch.export cannot cut a tensor whose length the data decides")
def test_whole_faster_rcnn_once_batched_nms_has_no_branch_on_data(monkeypatch):
    def batched_nms(boxes, scores, idxs, iou_threshold):
        apart = boxes + idxs.to(boxes)[:, None] * 1000.0  # further than the image is wide
        return torchvision.ops.nms(apart, scores, iou_threshold)

    monkeypatch.setattr(torchvision.ops.boxes, "batched_nms", batched_nms)
    module, image = faster_rcnn(), photograph()
    program = to_onnx(module, (image,))
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    results = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    for actual, expected in zip(results, module(image), strict=True):
        torch.testing.assert_close(torch.from_numpy(actual), expected, rtol=1e-3, atol=1e-2)
    assert len(results[0])

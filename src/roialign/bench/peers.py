"""Other engines that can do the same work on a CPU, where they are installed: forward, NCHW, float32.

ONNX Runtime has RoIAlign for one map only: it is timed for the four maps, with the boxes sorted by
level beforehand, and what it would take to put the results back in order is left out. OpenVINO has one
operation for all of it.
"""

import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..doctor import first_line
from ..mapper import LevelMapper
from .workloads import STRIDES, Call, Workload


class Peer(NamedTuple):
    """An engine that is ready to run."""

    call: Call
    order: Tensor  # (K,), the box of each row of the results


def find_peers(
    workload: Workload, maps: Mapping[str, Tensor], boxes: Tensor
) -> tuple[dict[str, Peer], dict[str, str]]:
    """Engines by name; and for those that cannot be used, why.

    Args:
        workload: its bins and its sampling ratio count.
        maps: `(1, C, H_l, W_l)` by name, contiguous, of float32.
        boxes: `(K, 4)`, for levels 2 to 5.
    """
    makers = {"onnxruntime": _onnxruntime, "openvino": _openvino}
    found = {name: _attempt(make, workload, maps, boxes) for name, make in makers.items()}
    peers = {name: peer for name, peer in found.items() if isinstance(peer, Peer)}
    return peers, {name: reason for name, reason in found.items() if isinstance(reason, str)}


def _attempt(make: Callable[..., Peer], *arguments: object) -> Peer | str:
    try:
        return make(*arguments)
    except Exception as error:  # missing, broken, or of another version
        return first_line(error)


def _onnxruntime(workload: Workload, maps: Mapping[str, Tensor], boxes: Tensor) -> Peer:
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(_onnx_model(workload), options, providers=["CPUExecutionProvider"])
    levels = LevelMapper(2, 5)([boxes])
    rows = [(levels == level).nonzero()[:, 0] for level in range(len(maps))]
    inputs: dict[str, Any] = {}
    for i, (f, r) in enumerate(zip(maps.values(), rows, strict=True)):
        inputs |= {
            f"x{i}": f.numpy(),
            f"boxes{i}": boxes[r].numpy(),
            f"image{i}": torch.zeros_like(r).numpy(),
        }

    def call() -> list[Tensor]:
        return [torch.from_numpy(out) for out in session.run(None, inputs)]

    return Peer(call, torch.cat(rows))


def _onnx_model(workload: Workload) -> bytes:
    """RoiAlign of each map on boxes of its own."""
    onnx: Any = importlib.import_module("onnx")
    value, number = onnx.helper.make_tensor_value_info, onnx.TensorProto
    nodes, inputs, outputs = [], [], []
    for i, stride in enumerate(STRIDES.values()):
        nodes.append(
            onnx.helper.make_node(
                "RoiAlign",
                [f"x{i}", f"boxes{i}", f"image{i}"],
                [f"out{i}"],
                coordinate_transformation_mode="output_half_pixel",
                output_height=workload.bins,
                output_width=workload.bins,
                sampling_ratio=workload.ratio,
                spatial_scale=1 / stride,
            )
        )
        inputs.append(value(f"x{i}", number.FLOAT, [None] * 4))
        inputs.append(value(f"boxes{i}", number.FLOAT, [None, 4]))
        inputs.append(value(f"image{i}", number.INT64, [None]))
        outputs.append(value(f"out{i}", number.FLOAT, [None] * 4))
    graph = onnx.helper.make_graph(nodes, "levels", inputs, outputs)
    opset = [onnx.helper.make_opsetid("", 16)]
    model: bytes = onnx.helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString()
    return model


def _openvino(workload: Workload, maps: Mapping[str, Tensor], boxes: Tensor) -> Peer:
    openvino = importlib.import_module("openvino")
    opset = importlib.import_module("openvino.opset6")
    values = [boxes.numpy(), *(f.numpy() for f in maps.values())]
    parameters = [opset.parameter(v.shape, dtype=v.dtype) for v in values]
    # The module has no function for this operation; the factory knows it.
    factory = importlib.import_module("openvino.utils.node_factory").NodeFactory("opset6")
    pooled = factory.create(
        "ExperimentalDetectronROIFeatureExtractor",
        [parameter.output(0) for parameter in parameters],
        {
            "output_size": workload.bins,
            "sampling_ratio": workload.ratio,
            "pyramid_scales": list(STRIDES.values()),
            "aligned": False,
        },
    )
    model = openvino.Model([pooled.output(0)], parameters, "levels")
    config = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(model, "CPU", config).create_infer_request()

    def call() -> list[Tensor]:
        return [torch.from_numpy(request.infer(values, share_inputs=True, share_outputs=True)[0])]

    return Peer(call, torch.arange(len(boxes)))

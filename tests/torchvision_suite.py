"""torchvision's own tests of RoIAlign, ONNX and R-CNN models, with this package in the place of its parts.

Run: python tests/torchvision_suite.py SOURCE {theirs,classes,install} {legacy,dynamo}

SOURCE is torchvision's source, of any release, with its folder `test`. What runs is the torchvision that is
installed: as it is; with our classes and functions under its names; or with our engines behind its operators.
ONNX is exported the older way or by `torch.export`. Weights are random, not downloaded. A test that fails
with ours and not with theirs is one to explain.
"""

import functools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SELECTED = (
    "test_ops.py::TestRoIAlign",
    "test_ops.py::TestMultiScaleRoIAlign",
    "test_ops.py::TestBoxConversionToRoi",
    "test_onnx.py",
    "test_models.py",
)
NAMES = "RoIAlign or BoxConversion or roi_align or roi_heads or rcnn"


def put_classes() -> None:
    """Our classes and functions under torchvision's names, wherever its modules hold them."""
    import torchvision
    from torchvision.models.detection import faster_rcnn, keypoint_rcnn, mask_rcnn

    import roialign
    from roialign.torchvision import MultiScaleRoIAlign

    for place in (torchvision.ops, torchvision.ops.poolers, faster_rcnn, keypoint_rcnn, mask_rcnn):
        place.MultiScaleRoIAlign = MultiScaleRoIAlign
    torchvision.ops.RoIAlign = roialign.RoIAlign
    torchvision.ops.roi_align = roialign.roi_align


class NoWeights(dict[str, torch.Tensor]):
    """A state that changes nothing."""


def keep_random_weights() -> None:
    from torchvision.models import WeightsEnum

    load = torch.nn.Module.load_state_dict

    def load_state_dict(module: Any, state: Any, *args: Any, **kwargs: Any) -> Any:
        return None if isinstance(state, NoWeights) else load(module, state, *args, **kwargs)

    WeightsEnum.get_state_dict = lambda *args, **kwargs: NoWeights()
    torch.nn.Module.load_state_dict = load_state_dict


def main(source: str, mode: str, exporter: str) -> int:
    tests = Path(source).resolve() / "test"
    sys.path.insert(0, str(tests))
    keep_random_weights()
    torch.onnx.export = functools.partial(torch.onnx.export, dynamo=exporter == "dynamo")
    if mode == "classes":
        put_classes()
    elif mode == "install":
        from roialign.torchvision import install

        install()
    arguments = ["-q", "-p", "no:cacheprovider", "--tb=line", "--rootdir", str(tests), "-k", NAMES]
    return pytest.main([*arguments, *(str(tests / name) for name in SELECTED)])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

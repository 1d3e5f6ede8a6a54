"""The box head as an AOTInductor package, without Python and this package, against eager torchvision.

    python benchmarks/without_python.py

One process, by turns, medians; the workload is `box-head` of `python -m roialign bench`.
"""

import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.ops import MultiScaleRoIAlign as TorchvisionRoIAlign

import roialign
from roialign.bench.timing import Effort, ratio, spread, time_by_turns
from roialign.bench.workloads import FULL, STRIDES, WORKLOADS, make_boxes, make_maps


class BoxHead(nn.Module):
    """The box head's pooling with its scales given, so that the program holds for any size of image."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = roialign.MultiScaleRoIAlign(
            list(STRIDES), 7, 2, scales=[1 / stride for stride in STRIDES.values()]
        )

    def forward(self, maps: dict[str, Tensor], boxes: Tensor) -> Tensor:
        """Pool the boxes of one image."""
        return self.pool(maps, [boxes])


def main() -> None:
    """Build the package, compare the numbers, then the times."""
    workload = WORKLOADS["box-head"]
    maps, boxes = make_maps(workload, FULL), make_boxes(workload.boxes, FULL.image)
    dynamic = {"maps": dict.fromkeys(maps), "boxes": {0: torch.export.Dim("boxes", min=2)}}
    program = torch.export.export(BoxHead(), (maps, boxes), dynamic_shapes=dynamic)
    program = program.run_decompositions(roialign.decompositions())
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(Path(folder, "head.pt2")))
        package = torch._inductor.aoti_load_package(path)
    theirs, ours = TorchvisionRoIAlign(list(STRIDES), 7, 2), BoxHead()
    calls = {
        "torchvision, eager": lambda: theirs(maps, [boxes], [FULL.image]),
        "the package": lambda: package(maps, boxes),
        "roialign, eager": lambda: ours(maps, boxes),
    }
    torch.testing.assert_close(calls["the package"](), calls["torchvision, eager"](), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        times = {name: spread(t) for name, t in time_by_turns(calls, Effort(20.0)).items()}
    first = times["torchvision, eager"]
    for name, t in times.items():
        print(f"{name:20} {1000 * t['median']:7.1f} ms   {ratio(first, t)['median']:5.2f}x")


if __name__ == "__main__":
    main()

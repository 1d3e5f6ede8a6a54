"""Through torch.export, strict and not: dynamic sizes, gradients, another process."""

import subprocess
import sys

import pytest
import torch
from torch.export import Dim

import roialign
from roialign.testing import pyramid, random_boxes

SIZE = (64, 80)
STRIDES = [4, 8, 16]
NAMES = ["0", "1", "2"]
SCALES = [1 / s for s in STRIDES]
AUTO = Dim.AUTO


class Head(torch.nn.Module):
    """The public module in a model of its own: boxes of two images, as tensors."""

    def __init__(self, **options):
        super().__init__()
        self.pool = roialign.MultiScaleRoIAlign(NAMES, 3, 2, canonical_scale=28, **options)

    def forward(self, x: dict[str, torch.Tensor], first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return self.pool(x, [first, second], None if self.pool.scales else [SIZE] * 2)


def maps(size: tuple[int, int] = SIZE, images: int = 2, **options) -> dict[str, torch.Tensor]:
    return dict(zip(NAMES, pyramid(STRIDES, image_size=size, images=images, **options), strict=True))


@pytest.mark.parametrize("strict", [False, True])
def test_dynamic_boxes_with_inferred_scales(strict):
    module = Head()
    program = torch.export.export(
        module,
        (maps(), *random_boxes([5, 4], image_size=SIZE)),
        dynamic_shapes={"x": dict.fromkeys(NAMES), "first": {0: AUTO}, "second": {0: AUTO}},
        strict=strict,
    )
    for counts in [(2, 30), (30, 2), (7, 7)]:
        boxes = random_boxes(counts, image_size=SIZE, seed=1)
        assert torch.equal(program.module()(maps(seed=1), *boxes), module(maps(seed=1), *boxes))
    assert [node.target for node in program.graph.nodes if "roialign" in str(node.target)] == [
        torch.ops.roialign.multiscale_roi_align.default
    ]


@pytest.mark.parametrize("strict", [False, True])
def test_dynamic_images_and_map_sizes_with_explicit_scales(strict):
    module = Head(scales=SCALES)
    program = torch.export.export(
        module,
        (maps(images=3), *random_boxes([5, 4], image_size=SIZE)),
        dynamic_shapes={
            "x": {name: {0: AUTO, 2: AUTO, 3: AUTO} for name in NAMES},
            "first": {0: AUTO},
            "second": {0: AUTO},
        },
        strict=strict,
    )
    for images, size, counts in [(2, (64, 80), (2, 3)), (4, (160, 96), (30, 2)), (3, (96, 416), (7, 0))]:
        x = maps(size, images, seed=2)
        boxes = random_boxes(counts, image_size=size, seed=1)
        assert torch.equal(program.module()(x, *boxes), module(x, *boxes))


@pytest.mark.parametrize("strict", [False, True])
def test_a_number_of_boxes_that_the_graph_itself_decides(strict):
    class Filtered(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.pool = roialign.MultiScaleRoIAlign(NAMES, 3, 2, canonical_scale=28)

        def forward(self, x, boxes, scores):
            return self.pool(x, [boxes[scores > 0.5]], [SIZE])

    module = Filtered()
    boxes = random_boxes([9], image_size=SIZE)[0]
    scores = torch.linspace(0, 1, 9)
    program = torch.export.export(module, (maps(images=1), boxes, scores), strict=strict)
    for s in (scores, 0 * scores, 0 * scores + 1, scores > 0.9):
        assert torch.equal(
            program.module()(maps(images=1), boxes, s), module.pool(maps(images=1), [boxes[s > 0.5]], [SIZE])
        )


@pytest.mark.parametrize("strict", [False, True])
def test_gradients_through_the_exported_module(strict):
    module = Head(scales=SCALES)
    boxes = random_boxes([5, 4], image_size=SIZE)
    program = torch.export.export(module, (maps(), *boxes), strict=strict)
    results = []
    for function in (program.module(), module):
        leaves = {name: f.requires_grad_() for name, f in maps(seed=4).items()}
        results.append(torch.autograd.grad(function(leaves, *boxes).pow(2).sum(), leaves.values()))
    for actual, expected in zip(*results, strict=True):
        assert expected.any()
        assert torch.equal(actual, expected)


FRESH = """
import sys, torch, roialign
program = torch.export.load(sys.argv[1])
arguments, expected = torch.load(sys.argv[2])
assert torch.equal(program.module()(*arguments), expected)
print("same")
"""


def test_saved_program_runs_in_another_process(tmp_path):
    module = Head(scales=SCALES, aligned=True)
    program = torch.export.export(
        module,
        (maps(), *random_boxes([5, 4], image_size=SIZE)),
        dynamic_shapes={"x": dict.fromkeys(NAMES), "first": {0: AUTO}, "second": {0: AUTO}},
    )
    torch.export.save(program, tmp_path / "program.pt2")
    arguments = (maps(seed=9), *random_boxes([11, 0], image_size=SIZE, seed=9))
    torch.save((arguments, module(*arguments)), tmp_path / "expected.pt")
    command = [sys.executable, "-c", FRESH, str(tmp_path / "program.pt2"), str(tmp_path / "expected.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout == "same\n", done.stderr

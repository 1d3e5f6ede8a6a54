"""The operators: contracts, gradients, and what the engines must fill, read and save."""

import importlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

import roialign
from roialign import layout, ops, reference
from roialign.levels import staircase
from roialign.rois import boxes_to_rois
from roialign.schema import Pooling
from roialign.testing import LAYOUTS, pyramid, random_boxes

pytestmark = pytest.mark.usefixtures("engine")

SIZE = (64, 80)
STRIDES = [4, 8, 16]
SCALES = [1 / s for s in STRIDES]
ROIS = boxes_to_rois(random_boxes([6, 4], image_size=SIZE), torch.empty(0), torch.float32)
STEPS = staircase(SCALES, 28, 4, torch.float32)  # small images: let boxes reach every level
DOUBLE_STEPS = staircase(SCALES, 28, 4, torch.float64)
POOLING = (SCALES, 2, False, *STEPS)

forward_op = torch.ops.roialign.multiscale_roi_align
backward_op = torch.ops.roialign.multiscale_roi_align_backward


def maps(**options) -> list[torch.Tensor]:
    return pyramid(STRIDES, image_size=SIZE, images=2, **{"channels": 3, **options})


def cases() -> dict[str, tuple]:
    """Arguments of the forward operator."""
    doubles = maps(dtype=torch.float64)
    return {
        "contiguous": (maps(), ROIS, None, (3, 2), *POOLING),
        "channels_last": (maps(layout="channels_last"), ROIS, None, (3, 2), *POOLING),
        "mixed": (maps(layout=["contiguous", "channels_last", "sliced"]), ROIS, None, (3, 2), *POOLING),
        "float64, adaptive, aligned": (doubles, ROIS.double(), None, (2, 3), SCALES, 0, True, *DOUBLE_STEPS),
        "bfloat16": (maps(dtype=torch.bfloat16), ROIS, None, (2, 2), *POOLING),
        "levels": (maps(), ROIS, torch.arange(10) % 3, (2, 2), *POOLING),
        "no boxes": (maps(), ROIS[:0], None, (2, 2), *POOLING),
        "one map": (maps()[:1], ROIS, None, (1, 1), SCALES[:1], 1, False, (), (0,)),
        "gradients": ([f.requires_grad_() for f in maps()], ROIS, None, (3, 2), *POOLING),
    }


def backward_case(features, rois, levels, output_size, *pooling) -> tuple:
    """Arguments of the backward operator that belong to those of the forward."""
    grad = torch.randn(len(rois), features[0].shape[1], *output_size, dtype=features[0].dtype)
    shape = [*features[0].shape[:2], *(side for f in features for side in f.shape[2:])]
    dtypes = [ops.DTYPES.index(f.dtype) for f in features]
    channels_last = [layout.is_channels_last(f) for f in features]
    return grad, rois, levels, shape, dtypes, channels_last, output_size, *pooling


# contracts


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
@pytest.mark.parametrize("case", cases())
def test_opcheck_forward(case):
    torch.library.opcheck(forward_op.default, cases()[case])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("case", cases())
def test_opcheck_backward(case):
    arguments = list(backward_case(*cases()[case]))
    arguments[0].requires_grad_(case == "gradients")
    torch.library.opcheck(backward_op.default, tuple(arguments))


@pytest.mark.parametrize("case", cases())
def test_fake_results_have_the_shape_strides_and_dtype_of_the_real(case):
    arguments = cases()[case]
    real = [forward_op(*arguments), *backward_op(*backward_case(*arguments))]
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        fake = [forward_op(*arguments), *backward_op(*backward_case(*arguments))]
    for f, r in zip(fake, real, strict=True):
        assert (f.shape, f.stride(), f.dtype) == (r.shape, r.stride(), r.dtype)


BAD_ARGUMENTS = {
    "rois of four columns": ({1: ROIS[:, 1:]}, r"rois must have shape \(K, 5\)"),
    "flat rois": ({1: ROIS[0]}, r"rois must have shape \(K, 5\)"),
    "rois in float64": ({1: ROIS.double()}, "rois must have shape .* torch.float32"),
    "rois in half": ({1: ROIS.half()}, "rois must have shape .* torch.float32"),
    "levels of int32": ({2: torch.zeros(10, dtype=torch.int32)}, r"levels must have shape \(K,\), int64"),
    "too few levels": ({2: torch.zeros(9, dtype=torch.int64)}, r"levels must have shape \(K,\)"),
    "one bin size": ({3: (3,)}, "output_size must be a positive integer per axis"),
    "no bins": ({3: (0, 3)}, "output_size must be a positive integer per axis"),
    "too few scales": ({4: SCALES[:2]}, "scales must hold one number per map"),
    "an unknown rule": ({5: -2}, "sampling_ratio must be 0 or more"),
    "a map beyond the last": ({8: [0, 1, 3]}, "order must hold a map"),
    "a negative map": ({8: [0, -1, 2]}, "order must hold a map"),
    "too few thresholds": ({7: []}, "order must hold a map"),
    "no maps": ({0: []}, "features must hold at least one map"),
    "maps of three axes": ({0: [f[0] for f in maps()]}, "features must be non-empty maps"),
    "maps of other channels": ({0: [*maps()[:2], maps(channels=2)[2]]}, "features must be non-empty maps"),
    "maps without rows": ({0: [*maps()[:2], maps()[2][:, :, :0]]}, "features must be non-empty maps"),
    "integer maps": ({0: [f.int() for f in maps()]}, "features must be non-empty maps"),
}
BAD_BACKWARD = {
    "another number of boxes": ({0: torch.zeros(9, 3, 3, 2)}, "grad must have shape"),
    "other bins": ({0: torch.zeros(10, 3, 2, 2)}, "grad must have shape"),
    "a flat gradient": ({0: torch.zeros(180)}, "grad must have shape"),
    "an integer gradient": ({0: torch.zeros(10, 3, 3, 2, dtype=torch.int32)}, "grad must have shape"),
    "too short a shape": ({3: [2, 3, 16, 20]}, "must describe the same maps"),
    "an empty map": ({3: [2, 3, 16, 20, 8, 0, 4, 5]}, "must describe the same maps"),
    "too few dtypes": ({4: [0, 0]}, "must describe the same maps"),
    "an unknown dtype": ({4: [0, 0, 4]}, "dtypes must be indices"),
    "a negative dtype": ({4: [0, 0, -1]}, "dtypes must be indices"),
    "too few layouts": ({5: [False]}, "must describe the same maps"),
    "rois of four columns": ({1: ROIS[:, 1:]}, r"rois must have shape \(K, 5\)"),
}


def replaced(arguments, replacements) -> list:
    return [replacements.get(i, argument) for i, argument in enumerate(arguments)]


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_the_operator_trusts_no_argument(case):
    """Exported programs call it, whoever made them; what functions check may not have been checked."""
    replacements, message = BAD_ARGUMENTS[case]
    with pytest.raises(ValueError, match=message):
        forward_op(*replaced(cases()["contiguous"], replacements))


def test_boxes_on_another_device_are_refused():
    """As a CPU's are beside maps on a GPU; with "meta" for either, PyTorch itself asks for no values."""
    with pytest.raises(ValueError, match=r"rois must have shape .* and device meta, got .* 'cpu'"):
        ops._check_rois(ROIS, None, [torch.float32], 2, torch.device("meta"))
    with pytest.raises(ValueError, match=r"levels must have shape .* and device cpu, got .* 'meta'"):
        ops._check_rois(ROIS, torch.zeros(10, dtype=torch.int64).to("meta"), [torch.float32], 2, ROIS.device)


@pytest.mark.parametrize("case", BAD_BACKWARD)
def test_the_backward_operator_trusts_no_argument(case):
    replacements, message = BAD_BACKWARD[case]
    arguments = backward_case(*cases()["contiguous"][:3], (3, 2), *cases()["contiguous"][4:])
    backward_op(*arguments)
    with pytest.raises(ValueError, match=message):
        backward_op(*replaced(arguments, replacements))


# gradients


@pytest.mark.parametrize("ratio", [2, -1])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_gradcheck_and_gradgradcheck(layout, aligned, ratio):
    size, strides = (20, 24), [4, 8]
    features = pyramid(strides, image_size=size, images=2, channels=2, dtype=torch.float64, layout=layout)
    features = [f.requires_grad_() for f in features]
    boxes = random_boxes([2, 2], image_size=size, dtype=torch.float64)
    scales = [1 / s for s in strides]

    def pool(*features):
        return roialign.multiscale_roi_align(
            features, boxes, (2, 3), scales, ratio, aligned=aligned, canonical_scale=40
        )

    assert torch.autograd.gradcheck(pool, features)
    assert torch.autograd.gradgradcheck(pool, features, fast_mode=True)


def test_gradient_of_some_maps_only():
    features = maps()
    features[1].requires_grad_()
    boxes = random_boxes([6, 4], image_size=SIZE)
    out = roialign.multiscale_roi_align(features, boxes, 2, SCALES, 2, canonical_scale=28)
    (actual,) = torch.autograd.grad(out.sum(), features[1])
    every = [f.detach().requires_grad_() for f in features]
    out = roialign.multiscale_roi_align(every, boxes, 2, SCALES, 2, canonical_scale=28)
    assert torch.equal(actual, torch.autograd.grad(out.sum(), every)[1])
    assert actual.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_double_backward_is_that_of_autograd_through_a_matrix(dtype):
    """Pooling written out as a matrix, through which autograd goes on its own."""
    features = pyramid([8, 16], image_size=(32, 32), channels=1, dtype=dtype)
    boxes = random_boxes([3], image_size=(32, 32), dtype=dtype)

    def pool(a, b):
        return roialign.multiscale_roi_align([a, b], boxes, 2, [1 / 8, 1 / 16], 2, canonical_scale=10)

    cells = [f.numel() for f in features]
    units = (unit.split(cells) for unit in torch.eye(sum(cells), dtype=dtype))
    columns = [pool(*(u.view(f.shape) for u, f in zip(unit, features, strict=True))) for unit in units]
    matrix = torch.stack([column.flatten() for column in columns], 1)

    def pool_by_matrix(a, b):
        return (matrix @ torch.cat((a.flatten(), b.flatten()))).view(3, 1, 2, 2)

    def penalised(function):
        inputs = [f.clone().requires_grad_() for f in features]
        first = torch.autograd.grad(function(*inputs).pow(3).sum(), inputs, create_graph=True)
        penalty = sum(g.pow(2).sum() for g in first)
        return torch.autograd.grad(penalty, inputs)

    for actual, expected in zip(penalised(pool), penalised(pool_by_matrix), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtypes", [[torch.bfloat16, torch.float32], [torch.float32, torch.float16]], ids=str)
def test_levels_of_several_dtypes(dtypes):
    exact = [f.bfloat16().half().double() for f in pyramid([8, 16], image_size=(64, 64))]
    features = [f.to(dtype).requires_grad_() for f, dtype in zip(exact, dtypes, strict=True)]
    alike = [f.float().requires_grad_() for f in exact]
    boxes = random_boxes([12], image_size=(64, 64))
    results = [
        roialign.multiscale_roi_align(f, boxes, 3, [1 / 8, 1 / 16], 2, canonical_scale=20)
        for f in (features, alike)
    ]
    assert torch.equal(results[0], results[1].to(dtypes[0]))
    grads = [torch.autograd.grad(out.sum(), f) for out, f in zip(results, (features, alike), strict=True)]
    for actual, expected, dtype in zip(*grads, dtypes, strict=True):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual, expected.to(dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_maps_have_the_memory_format_of_their_maps(layout):
    arguments = backward_case(maps(layout=[layout, "channels_last", "contiguous"]), *cases()["mixed"][1:])
    innermost = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    for grad, memory_format in zip(
        backward_op(*arguments), (innermost, torch.channels_last, torch.contiguous_format), strict=True
    ):
        assert grad.is_contiguous(memory_format=memory_format)


def test_boxes_get_no_gradient():
    features, boxes = (
        [f.requires_grad_() for f in maps()],
        random_boxes([3], image_size=SIZE)[0].requires_grad_(),
    )
    out = roialign.multiscale_roi_align(features, [boxes], 2, SCALES)
    assert torch.autograd.grad(out.sum(), [features[0], boxes], allow_unused=True)[1] is None


def test_no_feature_map_is_saved_for_backward():
    features = [f.requires_grad_() for f in maps(channels=64)]
    saved = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = roialign.multiscale_roi_align(features, random_boxes([6, 4], image_size=SIZE), 7, SCALES, 2)
    storages = {f.untyped_storage().data_ptr() for f in [*features, out]}
    assert saved
    assert not storages & {t.untyped_storage().data_ptr() for t in saved}
    assert sum(t.numel() for t in saved) <= 6 * len(ROIS)  # boxes and levels


# engines


def pooling(ratio=2) -> Pooling:
    return Pooling((3, 2), SCALES, ratio, False, *STEPS)


def engine_case(layout, ratio, levels):
    features = maps(layout=layout, channels=18)
    return features, ROIS, levels, pooling(ratio)


@pytest.mark.parametrize("garbage", [torch.nan, 7.0])
@pytest.mark.parametrize("levels", [None, torch.arange(10) % 3], ids=["eq. 1", "given"])
@pytest.mark.parametrize("ratio", [2, 0])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_element_of_the_output_is_written(dtype, layout, ratio, levels, garbage):
    features, *rest = engine_case(layout, ratio, levels)
    features = [LAYOUTS[layout](f.to(dtype)) for f in features]
    for memory_format in (torch.contiguous_format, torch.channels_last):
        clean, dirty = (
            torch.full((len(ROIS), 18, 3, 2), value, dtype=dtype).to(memory_format=memory_format)
            for value in (0.0, garbage)
        )
        for out in (clean, dirty):
            ops.engine("cpu").forward(out, features, *rest)
        assert clean.isfinite().all()
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize("rois", [ROIS, ROIS[:1], ROIS[:0]], ids=len)
@pytest.mark.parametrize("ratio", [2, 0])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_element_of_the_gradient_is_written(dtype, memory_format, ratio, rois):
    grad = torch.randn(len(rois), 18, 3, 2).to(dtype=dtype, memory_format=memory_format)
    results = []
    for value in (0.0, torch.nan, 7.0):
        grads = [
            torch.full_like(f, value, dtype=dtype, memory_format=memory_format) for f in maps(channels=18)
        ]
        ops.engine("cpu").backward(grads, grad, rois, None, pooling(ratio))
        results.append(grads)
    for clean, *dirty in zip(*results, strict=True):
        assert all(torch.equal(clean, d) for d in dirty)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_of_the_output_may_have_any_layout(layout):
    grad = LAYOUTS[layout](torch.randn(len(ROIS), 18, 3, 2))
    results = []
    for g in (grad, grad.contiguous()):
        grads = [torch.empty_like(f) for f in maps(channels=18)]
        ops.engine("cpu").backward(grads, g, ROIS, None, pooling())
        results.append(grads)
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_every_engine_can_be_imported_by_its_name():
    for device, name in ops.ENGINES.items():
        if device == "cpu":
            module = importlib.import_module(name)
            assert callable(module.forward)
            assert callable(module.backward)
    assert ops.engine("a device that nobody knows") is reference


def test_reference_serves_within_its_context(monkeypatch):
    monkeypatch.setitem(ops.ENGINES, "cpu", "no_such_engine")
    with ops.use_reference():
        assert ops.engine("cpu") is reference
    assert ops.ENGINES["cpu"] == "no_such_engine"
    ops._load.cache_clear()
    with pytest.warns(UserWarning, match="no_such_engine cannot be used, the slow reference serves"):
        roialign.roi_align(torch.rand(1, 1, 4, 4), torch.tensor([[0.0, 0, 0, 2, 2]]), 1)


def test_several_threads_may_pool_at_once():
    features, boxes = maps(channels=40), random_boxes([30, 20], image_size=SIZE)

    def pool(_):
        leaves = [f.detach().requires_grad_() for f in features]
        out = roialign.multiscale_roi_align(leaves, boxes, 7, SCALES, 2, canonical_scale=28)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    expected = pool(0)
    with ThreadPoolExecutor(4) as executor:
        for result in executor.map(pool, range(16)):
            assert all(torch.equal(a, e) for a, e in zip(result, expected, strict=True))


def test_offsets_beyond_31_bits():
    """The far corner of a map of 2^31 cells and more; the memory in between is never touched."""
    side, corner = 33_000, 64
    feature = torch.empty(2, 1, side, side, dtype=torch.bfloat16)
    window = feature[1:, :, -corner:, -corner:]
    window.copy_(torch.randn(window.shape, generator=torch.Generator().manual_seed(0)))
    boxes = torch.tensor([[8.0, 4.0, 50.0, 40.0], [20.0, 30.0, 80.0, 90.0]])
    expected = roialign.roi_align(window.contiguous(), [boxes], 3, 1.0, 2)
    actual = roialign.roi_align(feature, [boxes[:0], boxes + side - corner], 3, 1.0, 2)
    torch.testing.assert_close(actual, expected)


MEMORY_PROGRAM = """
import sys, torch
from roialign import ops, reference
from roialign.levels import staircase
from roialign.rois import boxes_to_rois
from roialign.schema import Pooling
from roialign.testing import pyramid, random_boxes

def kilobytes(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field))

if sys.argv[1] == "reference":
    ops.ENGINES.clear()
ratio, count = map(int, sys.argv[2:])
size, strides = (800, 1024), [4, 8, 16, 32]
features = pyramid(strides, image_size=size, channels=8)
rois = boxes_to_rois(random_boxes([count], image_size=size), features[0], torch.float32)
scales = [1 / s for s in strides]
pooling = Pooling((3, 3), scales, ratio, False, *staircase(scales, 224, 4, torch.float32))
out = torch.zeros(count, 8, 3, 3)
grads = [torch.zeros_like(f) for f in features]
engine = ops.engine("cpu")

def run(rois, out):
    engine.forward(out, features, rois, None, pooling)
    engine.backward(grads, out, rois, None, pooling)

run(rois[:20], out[:20])  # compiled or read from disk
before = kilobytes("VmRSS")
with open("/proc/self/clear_refs", "w") as reset:
    reset.write("5")  # forget the peak until now
run(rois, out)
print(kilobytes("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("ratio", "count"), [(2, 20_000), (0, 500)])
def test_scratch_does_not_grow_with_the_boxes(engine, ratio, count):
    command = [sys.executable, "-c", MEMORY_PROGRAM, engine, str(ratio), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if "clear_refs" in done.stderr:
        pytest.skip("/proc/self/clear_refs cannot be written")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < (64 if engine == "default" else 256) * 1024

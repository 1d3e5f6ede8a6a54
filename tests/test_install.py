"""Our engines behind torchvision's operators: every caller is served, nothing else changes, all is undone."""

import subprocess
import sys
import threading
import warnings

import pytest
import torch
from torch.autograd import forward_ad

import roialign
import roialign.doctor
from roialign.testing import pyramid, random_boxes

torchvision = pytest.importorskip("torchvision")
from torchvision.ops import poolers, roi_align  # noqa: E402 - needs torchvision

from roialign.torchvision import install, is_installed, uninstall  # noqa: E402

SIZE, NAMES = (96, 128), ["0", "1", "2"]
THEIRS = poolers._multiscale_roi_align


@pytest.fixture
def feature():
    return pyramid([4], image_size=SIZE, images=2, channels=5)[0]


@pytest.fixture
def rois():
    first, second = random_boxes([9, 4], image_size=SIZE)
    return torch.cat((torch.constant_pad_nd(first, (1, 0)), torch.constant_pad_nd(second, (1, 0), 1.0)))


@pytest.fixture(autouse=True)
def undone():
    yield
    uninstall()
    assert poolers._multiscale_roi_align is THEIRS


def values_and_gradients(call, feature):
    leaf = feature.detach().requires_grad_()
    pooled = call(leaf)
    return pooled.detach(), *torch.autograd.grad(pooled.square().sum(), leaf)


def operators_run(call):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [2, -1, 0])
def test_values_and_gradients(aligned, ratio, feature, rois):
    def call(x):
        return roi_align(x, rois, (3, 2), 0.25, ratio, aligned)

    expected = values_and_gradients(call, feature)
    with install():
        got = values_and_gradients(call, feature)
    assert all(map(torch.equal, values_and_gradients(call, feature), expected))
    for actual, other in zip(got, expected, strict=True):
        torch.testing.assert_close(actual, other)


def test_it_is_our_engine_that_runs(feature, rois, monkeypatch):
    calls = []
    engine = roialign.ops.engine("cpu")
    forward = engine.forward
    monkeypatch.setattr(engine, "forward", lambda *args: (calls.append(args), forward(*args))[1])
    roi_align(feature, rois, 2)
    assert not calls
    with install():
        roi_align(feature, rois, 2)
        torchvision.ops.RoIAlign(2, 1.0, 2)(feature, rois)
        torch.ops.torchvision.roi_align(feature, rois, 1.0, 2, 2, 2, False)
        with torch.inference_mode():
            roi_align(feature.clone(), rois, 2)
        assert len(calls) == 4


def test_no_warning_no_trace_of_a_second_time(feature, rois):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with install():
            assert is_installed()
            with install():
                pass
            assert is_installed()  # as before the inner one
            uninstall()
            assert not is_installed()
            uninstall()
        install()
        install()
        uninstall()
    assert not is_installed()
    with pytest.raises(RuntimeError, match="type"):
        roi_align(feature.bfloat16(), rois, 2)  # theirs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_maps_and_autocast(dtype, feature, rois):
    expected, _ = values_and_gradients(lambda x: roi_align(x, rois, 3, 0.25, 2), feature)
    half = feature.to(dtype)
    with install():
        pooled, grad = values_and_gradients(lambda x: roi_align(x, rois, 3, 0.25, 2), half)
        assert pooled.dtype == grad.dtype == dtype
        with torch.autocast("cpu", dtype):
            cast = roi_align(half, rois.to(dtype).float(), 3, 0.25, 2)
            assert torch.equal(cast, roi_align(half, rois.to(dtype), 3, 0.25, 2))
            assert not {"aten::_to_copy", "aten::copy_"} & operators_run(
                lambda: roi_align(half, rois, 3, 0.25, 2)
            )
    assert cast.dtype == dtype
    torch.testing.assert_close(pooled.float(), expected, rtol=2**-7, atol=2**-7)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:Please use:FutureWarning")
def test_derivatives_of_all_kinds(feature):
    x = feature[:, :1, :6, :6].double().requires_grad_()
    few = torch.tensor([[0, 1, 1, 9, 14], [1, 0, 0, 19, 9]], dtype=torch.float64)

    def call(x):
        return roi_align(x, few, 2, 0.25, 2)

    with install():
        assert torch.autograd.gradcheck(call, x, check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(call, x)
        batch = torch.stack((x, 2 * x)).detach()
        torch.testing.assert_close(torch.func.vmap(call)(batch), torch.stack([call(b) for b in batch]))
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(call(forward_ad.make_dual(batch[0], batch[1]))).tangent
        torch.testing.assert_close(tangent, call(batch[1]))
        backward = torch.ops.torchvision._roi_align_backward
        grad = call(x).detach().requires_grad_()
        geometry = (0.25, 2, 2, *x.shape, 2, False)
        assert torch.autograd.gradcheck(lambda g: backward(g, few, *geometry), grad)
        (expected,) = torch.autograd.grad(call(x), x, grad.detach())
        torch.testing.assert_close(backward(grad, few, *geometry), expected)


def test_an_image_that_does_not_exist_is_an_error(feature):
    with install(), pytest.raises(ValueError, match=r"image index in \[0, 2\), got 5"):
        roi_align(feature, torch.tensor([[5.0, 0, 0, 1, 1]]), 2)


class Scaled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, x, rois):
        return roi_align(x * self.weight, rois, 2, 0.25, 2)


def test_compiled(feature, rois):
    torch._dynamo.reset()
    module = Scaled()
    expected = module(feature, rois)
    expected_grad = torch.autograd.grad(expected.sum(), module.weight)
    with install():
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
        for few in (13, 5):
            got = compiled(feature, rois[:few])
            torch.testing.assert_close(got, expected[:few])
        torch.testing.assert_close(
            torch.autograd.grad(compiled(feature, rois).sum(), module.weight), expected_grad
        )
        assert compiled(feature.bfloat16(), rois).dtype == torch.bfloat16


@pytest.mark.parametrize("strict", [False, True])
def test_exported_graphs_are_torchvisions(strict, feature, rois):
    with install():
        program = torch.export.export(Scaled(), (feature, rois), strict=strict)
        for p in (program, program.run_decompositions()):
            targets = {str(node.target) for node in p.graph.nodes if node.op == "call_function"}
            assert "torchvision.roi_align.default" in targets
            assert not any("roialign" in target for target in targets)
            torch.testing.assert_close(p.module()(feature, rois), Scaled()(feature, rois))


@pytest.fixture
def pooling():
    maps = dict(zip(NAMES, pyramid([4, 8, 16], image_size=SIZE, images=2, channels=3), strict=True))
    return maps, random_boxes([20, 6], image_size=SIZE), [SIZE, SIZE]


@pytest.mark.parametrize("names", [NAMES, ["0"], ["2", "0"]])
def test_the_pooler_is_one_call(names, pooling):
    expected = torchvision.ops.MultiScaleRoIAlign(NAMES, 3, 2)(*pooling)
    module = torchvision.ops.MultiScaleRoIAlign(NAMES, 3, 2)
    with install():
        assert "roialign::multiscale_roi_align" in operators_run(lambda: module(*pooling))
        torch.testing.assert_close(module(*pooling), expected)
        uninstall()
        with install(pooler=False):
            assert "torchvision::roi_align" in operators_run(lambda: module(*pooling))


def test_the_pooler_with_a_mapper_of_the_users_own(pooling):
    module = torchvision.ops.MultiScaleRoIAlign(NAMES, 3, 2)
    module(*pooling)
    module.map_levels = lambda boxes: torch.cat([(b[:, 0] > 40).long() for b in boxes])
    expected = module(*pooling)
    with install():
        torch.testing.assert_close(module(*pooling), expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore::torch.jit.TracerWarning")
def test_scripted_and_traced_poolers_are_torchvisions(pooling, feature, rois):
    module = torchvision.ops.MultiScaleRoIAlign(NAMES, 3, 2)
    expected = module(*pooling)
    with install():
        script = torch.jit.script(torchvision.ops.MultiScaleRoIAlign(NAMES, 3, 2))
        torch.testing.assert_close(script(*pooling), expected)
        trace = torch.jit.trace(
            lambda a, b, c, boxes: module(dict(zip(NAMES, (a, b, c), strict=True)), [boxes], [SIZE]),
            (*pooling[0].values(), pooling[1][0]),
        )
        assert "roialign::" not in str(trace.inlined_graph)
    torch.testing.assert_close(script(*pooling), expected)
    torch.testing.assert_close(trace(*pooling[0].values(), pooling[1][0]), expected[:20])


def test_quantised_maps_remain_torchvisions(feature, rois):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.quantize_per_tensor(feature[:1], 0.02, 3, torch.quint8)
        boxes = torch.quantize_per_tensor(rois[:9], 1.0, 0, torch.quint8)
    expected = roi_align(quantised, boxes, 2, 0.25, 2)
    with install():
        assert torch.equal(roi_align(quantised, boxes, 2, 0.25, 2).int_repr(), expected.int_repr())


def test_several_threads_install_and_undo_at_once(feature, rois):
    failures = []

    def turn():
        try:
            for _ in range(10):
                install()
                uninstall()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=turn) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert not is_installed()
    with install():
        pooled = roi_align(feature.bfloat16(), rois, 2)
    assert pooled.dtype == torch.bfloat16


PROGRAM = """
import sys
import torchvision
from roialign.torchvision import is_installed
assert __name__ == "__main__"
print(is_installed(), sys.argv[1:], sys.path[0] == sys.argv[0].rpartition("/")[0])
sys.exit(3)
"""


def test_run_somebodys_program(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    for program in ([str(tmp_path / "program.py")], ["-m", "program"]):
        done = subprocess.run(
            [sys.executable, "-m", "roialign", "run", *program, "--flag", "-m", "x"],
            capture_output=True, text=True, timeout=300, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 3, done.stderr
        assert done.stdout.startswith("True ['--flag', '-m', 'x'] True"), done.stdout


def test_run_nothing():
    done = subprocess.run(
        [sys.executable, "-m", "roialign", "run"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2
    assert "name a script, or a module after -m" in done.stderr


def test_doctor_says_so():
    rows = dict(roialign.doctor.setting_rows())
    assert "install()" in rows["torchvision's operators"]
    with install():
        assert dict(roialign.doctor.setting_rows())["torchvision's operators"] == "run by roialign"


def test_a_pooler_whose_forward_was_patched(pooling):
    """Which `convert_poolers` leaves as it is, with a warning."""
    module = torchvision.ops.MultiScaleRoIAlign(NAMES, 3, 2)
    expected, forward = module(*pooling), module.forward
    module.forward = lambda x, boxes, shapes: 2 * forward(x, boxes, shapes)
    with install():
        assert "roialign::multiscale_roi_align" in operators_run(lambda: module(*pooling))
        torch.testing.assert_close(module(*pooling), 2 * expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:RCNN always returns")
def test_a_scripted_detector_from_the_disk(tmp_path):
    torch.manual_seed(0)
    model = torchvision.models.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=96, box_score_thresh=0.0
    ).eval()
    torch.jit.script(model).save(str(tmp_path / "detector.pt"))
    detector = torch.jit.load(str(tmp_path / "detector.pt"))
    images = [torch.rand(3, 60, 80)]
    with torch.no_grad():
        (expected,) = detector(images)[1]
        with install():
            assert {"torchvision::roi_align"} <= operators_run(lambda: detector(images))
            (found,) = detector(images)[1]
    assert len(expected["boxes"]) > 0
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)

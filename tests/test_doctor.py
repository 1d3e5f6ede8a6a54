import os
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from processes import SOURCE, python_path

import roialign
from roialign import doctor, ops, reference
from roialign.__main__ import main


def test_doctor_names_packages_engines_and_passes(capsys):
    assert main(["doctor"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for word in ("roialign", torch.__version__, "numba", "triton", "torchvision", "scikit-image"):
        assert word in printed
    for device in ("cpu", "cuda", "mps", "xpu"):
        assert device in printed
    assert ops.engine("cpu").__name__ in printed
    if doctor.engine_name("cuda").startswith("roialign.gpu"):  # where there is Triton
        assert doctor.engine_name("cuda") == "roialign.gpu.engine; of volumes roialign.reference"
    for dtype in ("float32", "float64", "float16", "bfloat16"):
        assert f"cpu {dtype} with the reference in float64 passed: largest difference" in printed
    assert "Everything checked is right." in printed


def test_doctor_without_rich(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich", None)
    assert main(["doctor"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert 'rich missing tables and progress bars pip install "roialign[demo]"' in lines
    assert "device available engine" in lines


def test_a_broken_package_is_reported(monkeypatch, tmp_path):
    (tmp_path / "brokenpkg.py").write_text("raise RuntimeError('operator [x]::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    state = doctor.package_state(doctor.Package("brokenpkg", "", ""))
    assert state == ("broken: operator [x]::nms does not exist", False)
    doctor.print_table("title", ("package", "state"), [("a", "[/x] is no markup")])


def test_where_an_engine_cannot_be_imported_the_reference_serves_and_doctor_says_so(monkeypatch, capsys):
    monkeypatch.setitem(ops.ENGINES, "cpu", "roialign.no_such_engine")
    with pytest.warns(UserWarning, match="no_such_engine cannot be used, the slow reference serves"):
        assert main(["doctor"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "roialign.no_such_engine cannot be used: No module named" in printed


def wrong_engine(monkeypatch, **functions):
    wrong = ModuleType("wrong")
    wrong.__dict__.update(vars(reference), **functions)
    monkeypatch.setitem(sys.modules, "wrong", wrong)
    monkeypatch.setitem(ops.ENGINES, "cpu", "wrong")
    monkeypatch.setattr(ops, "_load", ops._load.__wrapped__)


def test_a_wrong_engine_fails_the_check(monkeypatch):
    pytest.importorskip("torchvision")

    def forward(out, *args):
        reference.forward(out, *args)
        out[0, 0, 0, 0] += 1e-3

    wrong_engine(monkeypatch, forward=forward)
    for check in (doctor.device_check("cpu"), doctor.torchvision_check()):
        assert not check.passed
        assert check.result.startswith("FAILED: largest difference 1.")


@pytest.mark.parametrize("dtype", doctor.dtypes_of("cpu"))
def test_every_dtype_is_held_to_its_own_rounding(dtype, monkeypatch):
    def forward(out, *args):
        reference.forward(out, *args)
        out += 2 * doctor.tolerance(out.dtype)

    assert doctor.device_check("cpu", dtype).passed
    wrong_engine(monkeypatch, forward=forward)
    assert not doctor.device_check("cpu", dtype).passed


def test_a_nan_in_the_last_gradient_fails_the_check(monkeypatch):
    def backward(grads, *args):
        reference.backward(grads, *args)
        grads[-1][0, 0, 0, 0] = torch.nan

    wrong_engine(monkeypatch, backward=backward)
    check = doctor.device_check("cpu")
    assert not check.passed
    assert check.result == "FAILED: largest difference nan"


# Runs when Python starts, doctor and the processes that it starts: an engine that does this in float16.
DYING = """
import os, sys, types
import torch
from roialign import ops, reference

def forward(out, *args):
    if out.dtype == torch.float16:
        {what}
    reference.forward(out, *args)

engine = types.ModuleType("dying")
engine.__dict__.update(vars(reference), forward=forward)
sys.modules["dying"] = engine
ops.ENGINES["cpu"] = "dying"
"""
posix = pytest.mark.skipif(sys.platform == "win32", reason="there are no such signals")


@posix
def test_an_engine_that_ends_the_process_is_reported_and_the_rest_is_checked(tmp_path):
    what = "print('LLVM ERROR: no symbol', file=sys.stderr, flush=True); os.abort()"
    (tmp_path / "sitecustomize.py").write_text(DYING.format(what=what))
    environment = os.environ | {"PYTHONPATH": python_path(tmp_path, SOURCE)}
    command = [sys.executable, "-m", "roialign", "doctor"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    printed = " ".join(done.stdout.split())
    assert done.returncode == 1, done.stderr
    title = "with the reference in float64"
    assert f"cpu float16 {title} FAILED: the process was ended by SIGABRT: LLVM ERROR: no symbol " in printed
    for dtype in ("float32", "float64", "bfloat16"):
        assert f"cpu {dtype} {title} passed" in printed
    assert "The self-check FAILED: do not trust results." in printed


@posix
@pytest.mark.parametrize(
    ("what", "how"),
    [("os.kill(os.getpid(), 11)", "was ended by SIGSEGV"), ("os._exit(7)", "ended with status 7")],
)
def test_how_a_process_ended_is_told(what, how, monkeypatch, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(DYING.format(what=what))
    monkeypatch.setenv("PYTHONPATH", python_path(tmp_path, SOURCE))
    (check,) = doctor.outcomes(["cpu float16"])
    assert check == ("cpu float16 with the reference in float64", f"FAILED: the process {how}", False)


def test_an_engine_that_does_not_answer_is_reported(monkeypatch):
    monkeypatch.setattr(doctor, "PATIENCE", 0.01)
    (check,) = doctor.outcomes(["cpu float64"])
    assert check == ("cpu float64 with the reference in float64", "FAILED: no answer in 0.01 s", False)


def test_no_signal_is_too_strange_to_be_told():
    assert doctor._ending(-200, "") == "the process was ended by 200"


def test_cache_folder_is_shown_where_the_engine_has_one(monkeypatch):
    class Engine:
        cache_folder = staticmethod(lambda: None)

    monkeypatch.setattr(ops, "engine", lambda device: Engine)
    assert ("kernel cache", "none: kernels are compiled anew by every process") in doctor.setting_rows()
    monkeypatch.setattr(Engine, "cache_folder", staticmethod(lambda: "/some/folder"))
    assert ("kernel cache", "/some/folder") in doctor.setting_rows()


def test_torchvision_may_be_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert doctor.torchvision_check() == ("cpu with torchvision", "skipped: torchvision is missing", True)


def test_torchvision_may_be_broken(monkeypatch):
    pytest.importorskip("torchvision")
    monkeypatch.setitem(sys.modules, "torchvision.ops", None)
    _, result, passed = doctor.torchvision_check()
    assert result.startswith("skipped: torchvision is broken: import of torchvision.ops halted")
    assert passed


def test_bare_command_prints_help_and_version():
    def run(*arguments):
        command = [sys.executable, "-m", "roialign", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    help_text = run()
    assert "demo" in help_text
    assert "doctor" in help_text
    assert run("--version") == f"roialign {roialign.__version__}\n"


def test_unknown_command(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["nonsense"])
    assert "invalid choice: 'nonsense'" in capsys.readouterr().err


def test_importing_the_package_imports_no_command():
    code = (
        "import sys, roialign; "
        "names = {'roialign.demo', 'roialign.doctor', 'roialign.plot', 'matplotlib', 'rich', 'skimage'}; "
        "assert not names & set(sys.modules), names & set(sys.modules); "
        "import roialign.__main__; "
        "assert not {'matplotlib', 'rich', 'skimage', 'PIL'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

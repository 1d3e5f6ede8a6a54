import subprocess
import sys
from types import ModuleType

import pytest
import torch

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
    assert "cpu with the reference in float64 passed: largest difference" in printed
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


def test_a_wrong_engine_fails_the_check(monkeypatch):
    pytest.importorskip("torchvision")
    wrong = ModuleType("wrong")
    wrong.empty, wrong.backward = reference.empty, reference.backward

    def forward(out, *args):
        reference.forward(out, *args)
        out[0, 0, 0, 0] += 1e-3

    wrong.forward = forward
    monkeypatch.setitem(sys.modules, "wrong", wrong)
    monkeypatch.setitem(ops.ENGINES, "cpu", "wrong")
    for check in (doctor.device_check("cpu"), doctor.torchvision_check()):
        assert not check.passed
        assert check.result.startswith("FAILED: largest difference 1.")


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

"""The GPU engine without a GPU: its kernels in Triton's interpreter, compiled for some GPUs, and run as PTX.

All need a process of their own, because Triton reads its environment when it is imported.
"""

import importlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton", minversion="3.4")

PROGRAMS = Path(__file__).parent


def run(program: str, *arguments: str, **environment: str) -> str:
    command = [sys.executable, "-W", "ignore", str(PROGRAMS / program), *arguments]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    return done.stdout


def test_kernels_in_the_interpreter_agree_with_the_reference():
    assert "all agree" in run("gpu_interpreted.py", TRITON_INTERPRET="1")


def test_kernels_compile_without_spills(tmp_path):
    """Shows registers and shared memory with `pytest -rP`."""

    def compile_for(capability: str) -> str:
        return run("gpu_compiled.py", capability, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))

    with ThreadPoolExecutor() as pool:
        assert all("no spills" in printed for printed in pool.map(compile_for, ("80", "90", "100")))


def test_compiled_kernels_agree_with_the_reference(tmp_path):
    printed = run("gpu_emulated.py", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert "all agree" in printed


def test_the_emulator_agrees_with_pytorch(tmp_path):
    assert "all agree" in run("gpu_emulator.py", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))


def test_an_old_triton_is_named(monkeypatch):
    import triton

    monkeypatch.setattr(triton, "__version__", "3.3.1")
    for name in [name for name in sys.modules if name.startswith("roialign.gpu")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"need Triton 3\.4 or newer, got 3\.3\.1"):
        importlib.import_module("roialign.gpu.engine")

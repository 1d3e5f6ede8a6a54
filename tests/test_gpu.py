"""The GPU engine without a GPU: its kernels in Triton's interpreter, and compiled for some GPUs.

Both need a process of their own, because Triton reads its environment when it is imported.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

PROGRAMS = Path(__file__).parent


def run(program: str, **environment: str) -> str:
    command = [sys.executable, "-W", "ignore", str(PROGRAMS / program)]
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
    assert "no spills" in run("gpu_compiled.py", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))

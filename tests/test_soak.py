"""Some seconds of `benchmarks/soak.py`."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba")

SOAK = Path(__file__).parent.parent / "benchmarks" / "soak.py"


@pytest.mark.skipif(sys.platform != "linux", reason="it measures by /proc")
def test_nothing_grows_and_no_bit_changes():
    command = [sys.executable, "-W", "error", str(SOAK), "--minutes", "0.5", "--round", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Nothing grows, and no bit changed." in done.stdout

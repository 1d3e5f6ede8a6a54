"""The model of what a launch costs: the figures of kernels that are known."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", minversion="3.4")
torchvision = pytest.importorskip("torchvision")

ROOT = Path(__file__).parent.parent


def model(tmp_path, workload, *options):
    written = tmp_path / "model.json"
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu_model", "--json", str(written)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *sys.path])}
    done = subprocess.run(
        [*command, "--workload", workload, *options],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    return json.loads(written.read_text()), done.stdout


@pytest.mark.skipif(torchvision.version.cuda is None, reason="this torchvision has no kernels for GPUs")
def test_torchvisions_kernels(tmp_path):
    """Counted by hand: 49 bins of 4 points and 4 corners, each a load, and each an atomic in backward."""
    row = {"workload": "backward", "dtype": "float32", "layout": "contiguous"}
    measured = tmp_path / "measured.json"
    measured.write_text(json.dumps({"rows": [{**row, "ms": {"kernels alone": 0.5, "torchvision": 0.5}}]}))
    (backward,), printed = model(tmp_path, "", "--measured", str(measured))
    assert sum(c["seconds"]["atomics"] for c in backward["torchvision"]) == pytest.approx(
        512 * 256 * 49 * 16 / (96 * 1.755e9), rel=0.02
    )
    assert 0.4 < backward["torchvision ms"] < 0.75
    assert f"ratio {backward['ours ms'] / 0.5:.2f}" in printed
    (forward,), _ = model(tmp_path, "box head, float32, contiguous")
    assert all(5 < c["lines_per_load"] < 7 for c in forward["torchvision"])
    assert 0.25 < forward["torchvision ms"] + forward["torchvision copies ms"] < 0.75


def test_our_kernels_are_no_slower_than_they_were(tmp_path):
    (nchw, nhwc), _ = model(tmp_path, "box head, float32", "--ours")
    assert nchw["ours ms"] < 0.15
    assert nhwc["ours ms"] < 0.1
    for r in (nchw, nhwc):
        assert r["floor ms"] == pytest.approx(0.04, rel=0.1)
        assert r["ours ms"] > r["floor ms"]

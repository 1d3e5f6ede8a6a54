"""What `import roialign` brings in, what it exports, and what works without the optional packages."""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import roialign

OPTIONAL = ["matplotlib", "onnx", "onnxruntime", "onnxscript", "rich", "skimage", "torchvision"]
HEAVY = [*OPTIONAL, "llvmlite", "numba", "numpy", "triton"]
PUBLIC = [
    "LevelMapper",
    "MultiScaleRoIAlign",
    "RoIAlign",
    "convert_poolers",
    "decompositions",
    "multiscale_roi_align",
    "roi_align",
]

BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
"""

POOL = """
import torch, roialign
pooler = roialign.MultiScaleRoIAlign(["0", "1"], 3, 2)
x = {"0": torch.rand(1, 2, 16, 16, requires_grad=True), "1": torch.rand(1, 2, 8, 8)}
out = pooler(x, [torch.tensor([[0.0, 0.0, 9.0, 9.0]])], [(64, 64)])
out.sum().backward()
assert out.shape == (1, 2, 3, 3)
"""


def run(program: str, *, blocked: Sequence[str] = (), tmp_path: Path) -> str:
    """Run a program in which some packages cannot be imported."""
    path = tmp_path / "program.py"
    path.write_text(BLOCKER.format(blocked=set(blocked)) + program if blocked else program)
    done = subprocess.run(
        [sys.executable, "-W", "error", str(path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def modules_after(statement: str, tmp_path: Path) -> set[str]:
    return set(
        json.loads(
            run(f"import sys, json, {statement}\nprint(json.dumps(list(sys.modules)))", tmp_path=tmp_path)
        )
    )


def test_import_loads_torch_and_nothing_heavier(tmp_path):
    added = modules_after("roialign", tmp_path) - modules_after("torch", tmp_path)
    assert {name.split(".")[0] for name in added} & set(HEAVY) == set()
    own = {name for name in added if name.split(".")[0] == "roialign"}
    assert own == {"roialign"} | {
        f"roialign.{stem}"
        for stem in [
            "apart",
            "arguments",
            "convert",
            "functional",
            "gradients",
            "layout",
            "levels",
            "mapper",
            "ops",
            "plain",
            "portable",
            "pooler",
            "reference",
            "rois",
            "schema",
            "taps",
            "tensors",
            "values",
        ]
    }


def test_public_names():
    assert sorted(roialign.__all__) == PUBLIC
    submodules = {name for name, value in vars(roialign).items() if type(value) is type(roialign)}
    assert {name for name in vars(roialign) if not name.startswith("_")} - submodules == set(PUBLIC)
    assert isinstance(roialign.__version__, str)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_have_a_docstring(name):
    assert getattr(roialign, name).__doc__


@pytest.mark.parametrize("blocked", [["torchvision"], OPTIONAL], ids=["torchvision", "all"])
def test_pools_without_the_optional_packages(blocked, tmp_path):
    run(POOL, blocked=blocked, tmp_path=tmp_path)


def test_converts_nothing_without_torchvision(tmp_path):
    program = """
import torch, roialign
model = torch.nn.Sequential(torch.nn.Linear(2, 2), roialign.RoIAlign(7, 1.0, 2))
children = list(model)
assert roialign.convert_poolers(model) is model
assert list(model) == children
"""
    run(program, blocked=["torchvision"], tmp_path=tmp_path)


def test_the_subclass_says_what_is_missing_without_torchvision(tmp_path):
    program = """
try:
    import roialign.torchvision
except ModuleNotFoundError as error:
    assert error.name == "torchvision", error
else:
    raise AssertionError("imported")
"""
    run(program, blocked=["torchvision"], tmp_path=tmp_path)


def test_the_blocker_blocks(tmp_path):
    with pytest.raises(AssertionError, match="No module named 'torchvision'"):
        run("import torchvision", blocked=["torchvision"], tmp_path=tmp_path)


TWICE = """
import sys, torch, roialign
def pool(package):
    x = torch.rand(1, 2, 8, 8, requires_grad=True)
    out = package.roi_align(x, [torch.tensor([[1.0, 1, 5, 5]])], 2, 1.0, 2)
    out.sum().backward()
    assert x.grad.sum() == 8
    def call(x):
        return package.roi_align(x, [torch.tensor([[1.0, 1, 5, 5]])], 2)
    if torch.__version__ < "2.9":
        return  # its compiler does not survive a purge
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), call(x))
"""


def test_imported_again_after_a_purge(tmp_path):
    """As notebooks and plug-in reloaders do it; what was imported before goes on working."""
    program = """
first = roialign
for again in range(3):
    for name in [n for n in sys.modules if n.split(".")[0] == "roialign"]:
        del sys.modules[name]
    import roialign
    assert roialign is not first
    pool(roialign)
    with roialign.ops.use_reference():
        pool(roialign)
pool(first)
"""
    run(TWICE + program, tmp_path=tmp_path)


def test_a_copy_inside_another_package_beside_the_installed_one(tmp_path):
    copy = tmp_path / "app" / "_vendor" / "roialign"
    shutil.copytree(Path(roialign.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    program = """
import app._vendor.roialign as mine
assert mine is not roialign
for _ in range(2):
    pool(mine)
    pool(roialign)
with mine.ops.use_reference():
    assert roialign.ops.ENGINES and not mine.ops.ENGINES
    pool(mine)
assert torch.ops.app__vendor_roialign.multiscale_roi_align is not torch.ops.roialign.multiscale_roi_align
"""
    run(TWICE + program, tmp_path=tmp_path)


def test_operators_of_the_name_that_are_another_librarys(tmp_path):
    program = """
import torch
library = torch.library.Library("roialign", "DEF")
try:
    import roialign
except ImportError as error:
    print(error)
"""
    assert "the operators of roialign are defined already, by another file" in run(program, tmp_path=tmp_path)

"""What is published: sdist and wheel, what they say of themselves, and the quick tests against the wheel."""

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

import pytest
from test_style import COMMANDS

import roialign

for tool in ("build", "hatchling", "twine"):
    pytest.importorskip(tool)

ROOT = Path(__file__).parent.parent
NAME = f"roialign-{roialign.__version__}"
OF_THE_FORGE = (".ci", ".github", ".pre-commit-config.yaml")  # of no use without the repository

# What lies about where somebody works. It has no place in what is published.
LITTER = [
    ".mypy_cache/cache.json",
    ".venv/bin/python",
    "dist/roialign-0.0.1.tar.gz",
    "runs/checkpoint.pt",
    "src/roialign.egg-info/PKG-INFO",
    "src/roialign/__pycache__/pooler.cpython-311.pyc",
    "src/roialign/cpu/__pycache__/forward.kernel-1.py311.1.nbc",
    "tests/__pycache__/conftest.cpython-311.pyc",
    "tests/.hypothesis/examples",
]


def run(*command, **options):
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)], capture_output=True, text=True, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tracked():
    """The paths of the files that git knows."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("this is no clone: what is in the repository cannot be asked")
    return {path for path in done.stdout.split("\0") if path and (ROOT / path).exists()}


@pytest.fixture(scope="module")
def dist(tracked, tmp_path_factory):
    """A folder with the sdist, and the wheel that is made of it."""
    clone, folder = (tmp_path_factory.mktemp(name) for name in ("clone", "dist"))
    for path in [*tracked, *LITTER]:
        (clone / path).parent.mkdir(parents=True, exist_ok=True)
        if path in tracked:
            shutil.copy(ROOT / path, clone / path)
        else:
            (clone / path).write_text("litter")
    run("build", "--no-isolation", "--outdir", folder, clone, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(dist):
    return dist / f"{NAME}-py3-none-any.whl"


@pytest.fixture(scope="module")
def sdist(dist):
    return dist / f"{NAME}.tar.gz"


def test_there_is_one_wheel_for_all_and_one_sdist(dist, wheel, sdist):
    assert set(dist.iterdir()) == {wheel, sdist}


def test_twine_is_content(wheel, sdist):
    assert run("twine", "check", "--strict", wheel, sdist).count("PASSED") == 2


def test_the_wheel_has_the_package_and_its_licence_alone(wheel, tracked):
    package = {path.removeprefix("src/") for path in tracked if path.startswith("src/")}
    assert "roialign/py.typed" in package
    about = {f"{NAME}.dist-info/{name}" for name in ("METADATA", "RECORD", "WHEEL", "licenses/LICENSE")}
    assert set(zipfile.ZipFile(wheel).namelist()) == package | about


def test_the_sdist_has_all_that_is_not_of_the_forge(sdist, tracked):
    wanted = {path for path in tracked if PurePosixPath(path).parts[0] not in OF_THE_FORGE}
    with tarfile.open(sdist) as files:
        names = {name.removeprefix(f"{NAME}/") for name in files.getnames()}
    assert names == wanted | {"PKG-INFO"}


def test_the_wheel_says_what_it_is(wheel):
    about = email.message_from_bytes(zipfile.ZipFile(wheel).read(f"{NAME}.dist-info/METADATA"))
    assert about["Version"] == roialign.__version__
    assert about["License-Expression"] == "BSD-3-Clause"
    assert about["Requires-Python"] == ">=3.10"
    needed = [line for line in about.get_all("Requires-Dist") if "extra ==" not in line]
    assert needed == ["numba>=0.61", "numpy", "torch>=2.6"]
    assert about.get_payload().startswith("# roialign")


def test_changelog_and_citation_are_of_this_version():
    (date,) = re.findall(r'^date-released: "(.+)"$', (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    changelog = (ROOT / "CHANGELOG.md").read_text()
    released = re.findall(r"^## \[(\d.*)\] - (.+)$", changelog, re.MULTILINE)
    assert released[0] == (roialign.__version__, date)
    assert f"\nversion: {roialign.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_hooks_run_the_commands_of_the_style_tests(tracked):
    assert ".pre-commit-config.yaml" in tracked
    assert re.findall(r"entry: (.+)", (ROOT / ".pre-commit-config.yaml").read_text()) == COMMANDS


def test_the_quick_tests_pass_against_the_wheel(wheel, sdist, tmp_path):
    """In a fresh environment that borrows what is installed here, with the tests of the sdist."""
    run("venv", "--without-pip", tmp_path / "fresh")
    run("pip", "--python", tmp_path / "fresh", "install", "--quiet", "--no-index", "--no-deps", wheel)
    python = tmp_path / "fresh" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def fresh(*command, cwd=tmp_path):
        done = subprocess.run([python, *command], cwd=cwd, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    packages = Path(fresh("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # What a .pth file names comes last, and .pth files there are not read: not that of an editable install.
    borrowed = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "borrowed.pth").write_text("\n".join(borrowed))

    with tarfile.open(sdist) as files:
        files.extractall(tmp_path, filter="data")
    shutil.rmtree(tmp_path / NAME / "src")  # the tests have nothing to run but what is installed
    printed = fresh("-m", "pytest", "-m", "quick", "-p", "no:cacheprovider", cwd=tmp_path / NAME)
    assert f"roialign {roialign.__version__} in {packages / 'roialign'}" in printed
    assert int(re.search(r"(\d+) passed", printed)[1]) > 500

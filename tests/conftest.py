from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

import roialign
from roialign import ops

collect_ignore = ["clients"]  # they have an environment and a pytest.ini of their own

# The same examples every time, or, with --hypothesis-profile=thousands or more, that many new ones.
settings.register_profile("ci", deadline=None, derandomize=True, max_examples=200)
settings.register_profile("thousands", deadline=None, max_examples=5000, print_blob=True)
settings.register_profile("twenty-thousand", deadline=None, max_examples=20_000, print_blob=True)
settings.load_profile("ci")

# The files marked `quick`: each public function, judged by torchvision. A minute, with kernels to compile.
QUICK = {
    "test_arguments",
    "test_functional",
    "test_levels",
    "test_parity",
    "test_pooler",
    "test_rois",
}


def pytest_report_header() -> str:
    return f"roialign {roialign.__version__} in {Path(roialign.__file__).parent}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem in QUICK:
            item.add_marker("quick")


def needs_torch(version: str, reason: str) -> pytest.MarkDecorator:
    """Skip a test of what PyTorch itself cannot do before `version`."""
    return pytest.mark.skipif(torch.__version__ < version, reason=f"before PyTorch {version}: {reason}")


@pytest.fixture(params=["default", "reference"])
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test on the engine that serves the CPU, and again on the reference."""
    if request.param == "reference":
        with ops.use_reference():
            yield "reference"
    elif "cpu" in ops.ENGINES:
        yield "default"
    else:
        pytest.skip("the reference is the only engine for the CPU")


@pytest.fixture
def threads() -> Iterator[None]:
    """Put the number of threads back."""
    saved = torch.get_num_threads()
    yield
    torch.set_num_threads(saved)

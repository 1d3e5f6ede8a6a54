"""The source is formatted, linted, typed, and in files that can be held in mind."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "src").glob("**/*.py"))
COMMANDS = ["ruff check .", "ruff format --check .", "mypy"]
TESTS = sorted((ROOT / "tests").glob("**/*.py"))


@pytest.mark.parametrize("command", COMMANDS)
def test_tool_is_content(command):
    tool = command.split()[0]
    if importlib.util.find_spec(tool) is None:
        pytest.skip(f"{tool} is not installed")
    done = subprocess.run([sys.executable, "-m", *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("path", "limit"),
    [*((path, 420) for path in SOURCES), *((path, 500) for path in TESTS)],
    ids=lambda value: value.name if isinstance(value, Path) else "",
)
def test_no_file_is_too_long(path, limit):
    assert len(path.read_text().splitlines()) <= limit

"""The code in the documentation runs: README, docs, docstrings, and torchvision's own example."""

import collections
import doctest
import importlib
import re
from pathlib import Path

import pytest
import torch
import torchvision.ops

import roialign

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DOCUMENTED = ["levels", "functional", "pooler", "convert", "rois", "torchvision", "testing"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    text = page.read_text()
    namespace = {"__name__": "__main__"}
    for block in BLOCK.finditer(text):
        line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block[1], str(page), "exec"), namespace)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_docstring_examples(name):
    module = importlib.import_module(f"roialign.{name}")
    result = doctest.testmod(module, extraglobs={"torch": torch})
    assert result.failed == 0


@pytest.mark.parametrize("name", ["LevelMapper", "MultiScaleRoIAlign", "multiscale_roi_align"])
def test_there_is_an_example(name):
    assert doctest.DocTestFinder(recurse=False).find(getattr(roialign, name))[0].examples


def test_example_of_torchvisions_docstring_with_only_the_import_changed():
    docstring = torchvision.ops.MultiScaleRoIAlign.__doc__
    sources = [example.source for example in doctest.DocTestParser().get_examples(docstring)]
    program = "".join(sources).replace("torchvision.ops.", "roialign.")
    assert program.count("roialign.MultiScaleRoIAlign") == 1
    namespace = {"torch": torch, "roialign": roialign, "OrderedDict": collections.OrderedDict}
    exec(program, namespace)
    assert namespace["output"].shape == (6, 5, 3, 3)
    assert namespace["output"].isfinite().all()

"""The snippets of docs/bugs.md, run with torchvision and with roialign, print what the page says."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torchvision
from processes import ON_X86, killed

PAGE = (Path(__file__).parent.parent / "docs" / "bugs.md").read_text()
OUTPUT = r"\n\n{0}:\n\n```text\n(?P<{0}>(?:(?!```).)*)```"
SNIPPET = re.compile(
    r"^```py\n(?P<code>(?:(?!```).)*)```" + OUTPUT.format("torchvision") + OUTPUT.format("roialign"),
    re.MULTILINE | re.DOTALL,
)
SNIPPETS = [match.groupdict() for match in SNIPPET.finditer(PAGE)]
CRASH, UNDEFINED = "killed by SIGSEGV\n", "undefined\n"

# Reads the code of snippets as JSON, and writes what each prints, an error by its type and first line.
RUNNER = """
import contextlib, io, json, sys
import torch
from {package} import MultiScaleRoIAlign, roi_align

def printed(code):
    torch.manual_seed(0)
    torch._dynamo.reset()
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            exec(code, dict(torch=torch, MultiScaleRoIAlign=MultiScaleRoIAlign, roi_align=roi_align))
        except Exception as error:
            print(f"{{type(error).__name__}}: {{str(error).splitlines()[0]}}")
    return out.getvalue()

json.dump([printed(code) for code in json.load(sys.stdin)], sys.stdout)
"""

torchvision_of_the_page = pytest.mark.skipif(
    torchvision.__version__.split("+")[0] != "0.29.1", reason="the page is about torchvision 0.29.1"
)


def run(package: str, snippets: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RUNNER.format(package=package)],
        input=json.dumps(snippets),
        capture_output=True,
        text=True,
        timeout=300,
    )


def named(mapping: dict[str, str]) -> str:
    """Code and output in one string, so that a difference shows both."""
    return "\n".join(f"{code}=> {output}" for code, output in mapping.items())


def test_every_snippet_has_both_outputs():
    assert len(SNIPPETS) == PAGE.count("```py\n") > 20
    assert len({snippet["code"] for snippet in SNIPPETS}) == len(SNIPPETS)


def test_what_roialign_prints():
    expected = {snippet["code"]: snippet["roialign"] for snippet in SNIPPETS}
    done = run("roialign", list(expected))
    assert done.returncode == 0, done.stderr
    assert named(dict(zip(expected, json.loads(done.stdout), strict=True))) == named(expected)


@torchvision_of_the_page
def test_what_torchvision_prints():
    expected = {s["code"]: s["torchvision"] for s in SNIPPETS if s["torchvision"] not in (CRASH, UNDEFINED)}
    done = run("torchvision.ops", list(expected))
    assert done.returncode == 0, done.stderr
    for (code, output), actual in zip(expected.items(), json.loads(done.stdout), strict=True):
        pattern = re.escape(output).replace(re.escape("..."), ".*")
        assert re.fullmatch(pattern, actual), f"{code}=> {actual}, not {output}"


@torchvision_of_the_page
@pytest.mark.parametrize("code", [s["code"] for s in SNIPPETS if s["torchvision"] == CRASH])
def test_what_kills_torchvision(code):
    if "nan" in code and not ON_X86:
        pytest.skip("NaN becomes the cell -2^31 on x86 alone; on ARM it becomes cell 0")
    assert killed(run("torchvision.ops", [code]).returncode)

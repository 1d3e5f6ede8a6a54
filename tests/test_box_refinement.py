"""examples/box_refinement.py: boxes climb to what they were taken from."""

import contextlib
import io
import re
import runpy
from pathlib import Path

import pytest

for name in ("matplotlib", "skimage"):
    pytest.importorskip(name)

EXAMPLE = Path(__file__).parent.parent / "examples" / "box_refinement.py"
LINE = re.compile(r"blur (\d), ratio (\w+) *, ([a-z ]+?) *: ([\d.]+) -> ([\d.]+); +(\d+)")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """By blur, ratio and box: the IoU before, and after; and how many of 100 came above 0.95."""
    picture, printed = tmp_path_factory.mktemp("refined") / "picture.png", io.StringIO()
    with contextlib.redirect_stdout(printed):
        runpy.run_path(str(EXAMPLE))["main"](["--out", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    return {
        (int(blur), ratio, box): (float(before), float(after), int(passed))
        for blur, ratio, box, before, after, passed in LINE.findall(printed.getvalue())
    }


@pytest.mark.parametrize("box", ["face", "mission patch"])
def test_boxes_reach_their_targets(found, box):
    assert len(found) == 12
    for blur in (0, 4):
        for ratio in ("exact", "0"):
            before, after, passed = found[blur, ratio, box]
            assert 0.4 <= before <= 0.5
            assert after > 0.97
            assert passed > 60


@pytest.mark.parametrize("box", ["face", "mission patch"])
def test_few_points_need_a_smooth_picture(found, box):
    exact, few = (found[0, ratio, box][2] for ratio in ("exact", "2"))
    assert few < 60 < exact
    exact, few = (found[4, ratio, box][2] for ratio in ("exact", "2"))
    assert abs(few - exact) < 10

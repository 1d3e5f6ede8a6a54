import argparse
import json
import sys

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("skimage")

import numpy as np
from PIL import Image

from roialign import demo, ops
from roialign.__main__ import main


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def photo():
    return demo.sample_image()


def test_demo_of_the_sample(tmp_path, capsys):
    assert main(["demo"]) == 0
    with Image.open("demo.png") as picture:
        assert picture.size == (1600, 900)
    assert (tmp_path / "demo.png").stat().st_size < 1_000_000
    printed = capsys.readouterr().out
    assert "wrote demo.png" in printed
    for name in demo.ASTRONAUT:
        assert name in printed
    assert "floor(4 + log2(106.6/224)) = 2 -> stride 4" in printed
    assert "floor(4 + log2(40.35/224)) = 1, finest is 2 -> stride 4" in printed
    assert "3 x 28 x 28" in printed


def test_pooled_values_are_those_of_the_reference(photo):
    pooled = demo.pool_regions(photo, demo.ASTRONAUT)
    with ops.use_reference():
        expected = demo.pool_regions(photo, demo.ASTRONAUT)
    assert {p.map for p in pooled} == {0, 1, 2, 3}
    for ours, theirs in zip(pooled, expected, strict=True):
        torch.testing.assert_close(ours.values, theirs.values)
        assert ours[:4] == theirs[:4]


def test_pooled_regions_look_like_the_photo(photo):
    """A bin lies near the mean of its own part of the photo, and would not near another's."""
    for region in demo.pool_regions(photo, demo.ASTRONAUT):
        x1, y1, x2, y2 = (int(c) for c in region.box)
        mean = photo[:, y1:y2, x1:x2].mean((1, 2))
        torch.testing.assert_close(region.values.mean((1, 2)), mean, rtol=0, atol=0.03)


def test_sampling_points_lie_at_the_centres_of_bins(photo):
    (region,) = demo.pool_regions(photo, {"square": [100.0, 200.0, 156.0, 228.0]})
    ys, xs = demo.sampling_points_on_image(photo, region)
    torch.testing.assert_close(xs[:, 0], 101.0 + 2 * torch.arange(28))
    torch.testing.assert_close(ys[:, 0], 200.5 + torch.arange(28))


@pytest.mark.parametrize(
    ("name", "pixels"),
    [
        ("grey.png", np.full((40, 60), 9, np.uint8)),
        ("deep.png", np.arange(2400, dtype=np.uint16).reshape(40, 60)),
        ("rgba.png", np.full((40, 60, 4), 99, np.uint8)),
        ("float.tif", np.linspace(-3, 7, 2400, dtype=np.float32).reshape(40, 60)),
        ("tiny.png", np.full((1, 1, 3), 50, np.uint8)),
    ],
)
def test_any_picture_is_read(name, pixels):
    Image.fromarray(pixels).save(name)
    image = demo.read_image(name)
    assert image.shape == (3, *pixels.shape[:2])
    assert image.min() >= 0
    assert image.max() <= 1


@pytest.mark.parametrize("size", [(1, 1), (90, 61)])
def test_demo_of_any_size(size, capsys):
    Image.new("L", size, 50).save("picture.png")
    assert main(["demo", "picture.png", "--out", "out.png"]) == 0
    assert "whole picture" in capsys.readouterr().out
    with Image.open("out.png") as picture:
        assert picture.size == (1600, 900)


def test_pyramid_of_a_picture_that_is_no_multiple_of_the_strides():
    pyramid = demo.build_pyramid(torch.full((3, 45, 70), 0.5))
    assert {name: tuple(f.shape) for name, f in pyramid.items()} == {
        "p2": (1, 3, 12, 18),
        "p3": (1, 3, 6, 9),
        "p4": (1, 3, 3, 5),
        "p5": (1, 3, 2, 3),
    }
    assert all((f == 0.5).all() for f in pyramid.values())


def test_boxes_of_ones_own(capsys):
    with open("boxes.json", "w") as file:
        json.dump({"flag": [0, 0, 90, 200], "[bold]$\\frac": [-50, -50, 900, 20]}, file)
    assert main(["demo", "--boxes", "boxes.json", "--out", "out.png"]) == 0
    printed = capsys.readouterr().out
    assert "flag" in printed
    assert "[bold]$\\frac" in printed


def test_more_boxes_than_the_picture_shows(capsys):
    with open("boxes.json", "w") as file:
        json.dump([[i, i, i + 40, i + 40] for i in range(11)], file)
    assert main(["demo", "--boxes", "boxes.json"]) == 0
    printed = capsys.readouterr().out
    assert "box 10" in printed
    assert "without the last 3 regions" in printed


EXPECTED = '--boxes must be a JSON file of [[x1, y1, x2, y2], ...] or {"name": [x1, y1, x2, y2], ...}, got '


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", EXPECTED + "[]"),
        ("7", EXPECTED + "7.0"),
        ("oh", EXPECTED + "'boxes.json', which is not JSON: Expecting value"),
        ("[[1, 2, 3]]", "'box 0' must be four numbers, [x1, y1, x2, y2], got [1.0, 2.0, 3.0]"),
        ('{"a": [1, 2, true, 4]}', "'a' must be four numbers, [x1, y1, x2, y2], got [1.0, 2.0, true, 4.0]"),
        ("[[1, 2, NaN, 4]]", "'box 0' must lie within 1000000 pixels of the origin"),
        ("[[9, 2, 3, 4]]", "'box 0' must have x1 < x2 and y1 < y2, by 0.01 at least, got [9.0, "),
    ],
)
def test_bad_boxes(content, message, capsys):
    with open("boxes.json", "w") as file:
        file.write(content)
    assert main(["demo", "--boxes", "boxes.json"]) == 2
    assert capsys.readouterr().err.startswith("python -m roialign demo: " + message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--boxes", "none.json"], EXPECTED + "'none.json': No such file or directory"),
        (["none.png"], "IMAGE must be a picture file, got 'none.png', where there is no file"),
        (["text.png"], "IMAGE must be a picture file, got 'text.png', which cannot be read: "),
        (["--out", "none/demo.png"], "--out must be a picture file that can be written, got 'none/demo.png'"),
        (["--out", "demo.nope"], "--out must be a picture file that can be written, got 'demo.nope': Format"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with open("text.png", "w") as file:
        file.write("no picture")
    assert main(["demo", *arguments]) == 2
    assert capsys.readouterr().err.startswith("python -m roialign demo: " + message)


def test_demo_without_its_extras(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich", None)
    assert demo.run(argparse.Namespace(image=None, out="demo.png", boxes=None)) == 2
    error = capsys.readouterr().err
    assert error.endswith('; pip install "roialign[demo]"\n')
    assert "rich" in error
    assert error.count("\n") == 1

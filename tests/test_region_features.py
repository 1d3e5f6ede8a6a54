"""The example that extracts region features: values, resume, sharding, and what it does about bad input."""

import functools
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision

pytest.importorskip("rich")
pytest.importorskip("safetensors")

import numpy as np
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torchvision.models.feature_extraction import create_feature_extractor

SCRIPT = Path(__file__).parent.parent / "examples" / "region_features.py"
sys.path.insert(0, str(SCRIPT.parent))  # as python and torchrun do
region_features = importlib.import_module("region_features")
boxes_of = importlib.import_module("regions.boxes")
images_of = importlib.import_module("regions.images")

SIZES = [(64, 96), (96, 64), (50, 70), (33, 93), (64, 96), (120, 100), (50, 71), (96, 96)]  # (height, width)

pytestmark = pytest.mark.usefixtures("threads")


@pytest.fixture(autouse=True)
def _one_build(monkeypatch):
    """Of resnet18 without weights; a build with its probe takes longer than the rest of a run."""
    monkeypatch.setattr(region_features, "build_backbone", build_backbone)


def build_backbone(name, weights, nodes, device):
    if weights == "none" and name == "resnet18":
        return build_once(name, weights, tuple(nodes or ()) or None, device)
    return build(name, weights, nodes, device)


build = region_features.build_backbone
build_once = functools.cache(build)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Eight photographs of noise, three regions in each, in a folder that is the current one."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    Path("photos").mkdir()
    images, annotations = [], []
    for i, (height, width) in enumerate(SIZES):
        pixels = generator.integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(f"photos/{i}.png")
        images.append({"id": 10 + i, "file_name": f"{i}.png", "height": height, "width": width})
    for i in range(3 * len(SIZES)):
        bbox = [i % 7, i % 5, 20 + i / 4, 25]
        annotations.append({"id": 1000 - 7 * i, "image_id": 10 + i % len(SIZES), "bbox": bbox})
    write_boxes(images, annotations)
    return tmp_path


def write_boxes(images, annotations):
    Path("boxes.json").write_text(json.dumps({"images": images, "annotations": annotations}))


def read_boxes():
    content = json.loads(Path("boxes.json").read_text())
    return content["images"], content["annotations"]


def command(out, *arguments):
    fixed = "--images photos --boxes boxes.json --weights none --backbone resnet18 --threads 1 --device cpu"
    return [*fixed.split(), "--out", out, "--batch-size", "2", "--part-mib", "0.01", *arguments]


def extract(out, *arguments):
    status = region_features.main(command(out, "--workers", "0", *arguments))
    assert status == 0
    return load_file(out)


def resnet18_maps(image, *nodes):
    torch.manual_seed(0)
    model = torchvision.models.get_model("resnet18", weights=None).eval()
    return create_feature_extractor(model, list(nodes), suppress_diff_warning=True)(image)


def normalised(path, height, width):
    """One image as a classifier wants it, padded with zeros."""
    pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    image = torch.zeros(1, 3, height, width)
    image[0, :, : pixels.shape[1], : pixels.shape[2]] = (pixels - mean[:, None, None]) / std[:, None, None]
    return image


def xyxy(bbox):
    x, y, width, height = bbox
    return [x, y, x + width, y + height]


def test_values_are_those_of_torchvision():
    found = extract("out.safetensors", "--nodes", "layer2", "layer4", "--aligned")
    images, annotations = read_boxes()
    assert found["annotation_ids"].tolist() == [a["id"] for a in annotations]
    assert found["image_ids"].tolist() == [a["image_id"] for a in annotations]
    assert found["boxes"].tolist() == [xyxy(a["bbox"]) for a in annotations]
    assert found["features"].shape == (24, 128 + 512, 7, 7)
    with torch.inference_mode():
        maps = resnet18_maps(normalised("photos/2.png", 64, 96), "layer2", "layer4")
        rows = (found["image_ids"] == images[2]["id"]).nonzero()[:, 0]
        pairs = (("layer2", 1 / 8), ("layer4", 1 / 32))
        expected = [
            torchvision.ops.roi_align(maps[node], [found["boxes"][rows]], 7, scale, 2, True)
            for node, scale in pairs
        ]
    torch.testing.assert_close(found["features"][rows], torch.cat(expected, 1), rtol=1e-4, atol=1e-4)


def test_values_of_a_pyramid_resized():
    name = "fasterrcnn_mobilenet_v3_large_320_fpn"
    boxes = [[0, 0, 96, 64], [3, 5, 80, 50], [10, 9, 11, 12]]
    annotations = [{"image_id": 10, "bbox": box} for box in boxes]
    Path("results.json").write_text(json.dumps(annotations))
    resized = Image.open("photos/0.png").resize((480, 320), Image.Resampling.BILINEAR)
    found = extract(
        "out.safetensors",
        "--backbone",
        name,
        "--results",
        "results.json",
        "--size",
        "320",
        "--dtype",
        "float16",
    )
    resized.save("resized.png")
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None).eval()
    with torch.inference_mode():
        maps = model.backbone(normalised("resized.png", 320, 480))
        scaled = found["boxes"] * 5
        expected = model.roi_heads.box_roi_pool(maps, [scaled], [(320, 480)])
    assert found["features"].dtype == torch.float16
    assert found["levels"].shape == (3,)
    assert found["annotation_ids"].tolist() == [0, 1, 2]
    torch.testing.assert_close(found["features"].float(), expected, rtol=2e-3, atol=1e-4)


def test_mean_and_dtype():
    full = extract("full.safetensors")["features"]
    mean = extract("mean.safetensors", "--mean", "--dtype", "bfloat16")["features"]
    torch.testing.assert_close(mean, full.mean((2, 3)).bfloat16())
    with safe_open("mean.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["nodes"] == '["layer4"]'
    assert metadata["strides"] == "[32]"
    assert metadata["dtype"] == "bfloat16"


def test_channels_last_maps_are_turned():
    extract("out.safetensors", "--backbone", "swin_t", "--nodes", "features.3", "permute", "--mean")
    features = load_file("out.safetensors")["features"]
    assert features.shape == (24, 192 + 768)
    assert features.isfinite().all()


def test_one_process_two_processes_or_interrupted_give_the_same_bytes(monkeypatch, capsys):
    extract("one.safetensors")
    expected = Path("one.safetensors").read_bytes()

    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two = subprocess.Popen(
        [*launcher, str(SCRIPT), *command("two.safetensors", "--workers", "1")],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )

    save, saved = region_features.save_file, []

    def interrupted(tensors, path, metadata):
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(tensors["annotation_ids"])
        save(tensors, path, metadata)

    monkeypatch.setattr(region_features, "save_file", interrupted)
    assert region_features.main(command("ctrl-c.safetensors", "--workers", "0")) == 130
    assert len(list(Path("ctrl-c.safetensors.parts").glob("*.safetensors"))) == 3
    assert not Path("ctrl-c.safetensors").exists()
    monkeypatch.setattr(region_features, "save_file", save)
    parts = sorted(Path("ctrl-c.safetensors.parts").glob("*.safetensors"))
    parts[0].write_bytes(parts[0].read_bytes()[:-9])
    (parts[0].parent / "left.tmp").write_text("behind by a process that was killed")
    extract("ctrl-c.safetensors")
    assert "2 of 8 parts are there already" in capsys.readouterr().err
    assert Path("ctrl-c.safetensors").read_bytes() == expected
    assert not Path("ctrl-c.safetensors.parts").exists()

    _, error = two.communicate(timeout=120)
    assert two.returncode == 0, error
    assert Path("two.safetensors").read_bytes() == expected


def test_two_runs_at_the_same_time(capsys):
    pytest.importorskip("fcntl")
    Path("out.safetensors.parts").mkdir()
    hold = "import fcntl; f = open('out.safetensors.parts/lock', 'a'); fcntl.lockf(f, fcntl.LOCK_EX); "
    other = subprocess.Popen(
        [sys.executable, "-c", hold + "print(flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with other:
        other.stdout.readline()
        assert region_features.main(command("out.safetensors", "--workers", "0")) == 2
        assert "--out must not be in use by another run, got out.safetensors" in capsys.readouterr().err
        other.kill()
    assert len(extract("out.safetensors")["annotation_ids"]) == 24


def test_a_second_run_finds_the_work_done(capsys):
    extract("out.safetensors")
    before = Path("out.safetensors").stat().st_mtime_ns
    extract("out.safetensors")
    assert Path("out.safetensors").stat().st_mtime_ns == before
    assert "out.safetensors is there already" in capsys.readouterr().err


def test_resume_with_other_arguments(monkeypatch, capsys):
    region_features.main(command("out.safetensors", "--workers", "0", "--no-merge"))
    assert region_features.main(command("out.safetensors", "--batch-size", "3", "--output-size", "5")) == 2
    error = capsys.readouterr().err
    assert "was made with output_size 7, not 5; batch_size 2, not 3: remove it, or" in error


def test_parts_without_merge():
    assert region_features.main(command("out.safetensors", "--workers", "0", "--no-merge")) == 0
    parts = [load_file(path) for path in sorted(Path("out.safetensors.parts").iterdir())]
    ids = [number for part in parts for number in part["annotation_ids"].tolist()]
    assert sorted(ids) == sorted(a["id"] for a in read_boxes()[1])
    extract("out.safetensors")  # and merged later


def test_a_disk_that_is_full_loses_no_whole_part(monkeypatch, capsys):
    save, count = region_features.save_file, iter(range(100))

    def full(*arguments):
        if next(count) == 2:
            raise SafetensorError("No space left on device")
        save(*arguments)

    monkeypatch.setattr(region_features, "save_file", full)
    assert region_features.main(command("out.safetensors", "--workers", "0")) == 1
    assert "No space left on device; whole parts are kept" in capsys.readouterr().err
    assert len(extract("out.safetensors")["annotation_ids"]) == 24


def test_bad_images_are_skipped_and_change_no_other(capsys):
    expected = extract("good.safetensors")
    data = Path("photos/1.png").read_bytes()
    Path("photos/1.png").write_bytes(data[: len(data) // 2])
    Path("photos/3.png").write_text("not a picture")
    Path("photos/4.png").unlink()
    Image.new("RGB", (31, 32)).save("photos/6.png")
    found = extract("bad.safetensors")
    bad = {
        11: "OSError: ",
        13: "UnidentifiedImageError: ",
        14: "FileNotFoundError: ",
        16: "ValueError: has (31, 32)",
    }
    kept = torch.tensor([number not in bad for number in expected["image_ids"].tolist()])
    for name, values in expected.items():
        assert torch.equal(found[name], values[kept]), name
    report = json.loads(Path("bad.skipped.json").read_text())
    assert {row["image_id"]: True for row in report["images"]} == dict.fromkeys(bad, True)
    printed = capsys.readouterr().err
    for row in report["images"]:
        assert row["reason"].startswith(bad[row["image_id"]])
        assert f"skipped image {row['image_id']}, {row['file_name']}: {row['reason']}" in printed
    lost = [number for row in report["images"] for number in row["annotation_ids"]]
    assert sorted(lost + found["annotation_ids"].tolist()) == sorted(expected["annotation_ids"].tolist())
    assert "skipped 4 images with 12 regions, and 0 annotations" in printed


def test_bad_annotations_are_left_out():
    images, annotations = read_boxes()
    bad = {
        1: ([5, 5, float("nan"), 5], "must be finite and cover some of its image"),
        2: ([5, 5, 0, 5], "must be finite and cover some of its image of 96 x 64 pixels, got [5, 5, 0, 5]"),
        3: ([96, 5, 10, 10], "cover some of its image"),
        4: ([5, 5, 10], "bbox must be four numbers, x, y, width, height, got [5, 5, 10]"),
        5: (None, "bbox must be four numbers"),
        6: ([9, 9, -3, 5], "cover some"),
    }
    wrong = [{"id": number, "image_id": 10, "bbox": bbox} for number, (bbox, _) in bad.items()]
    nowhere = {"id": 7, "image_id": 99, "bbox": [1, 1, 2, 2]}
    outward = {"id": 8, "image_id": 10, "bbox": [-10, -10, 30, 200]}
    write_boxes(images, [*wrong, outward, nowhere, *annotations])
    found = extract("out.safetensors")
    assert found["annotation_ids"].tolist() == [8, *(a["id"] for a in annotations)]
    assert found["boxes"][0].tolist() == [0, 0, 20, 64]
    report = json.loads(Path("out.skipped.json").read_text())
    assert [row["annotation_id"] for row in report["annotations"]] == [1, 2, 3, 4, 5, 6, 7]
    for row in report["annotations"][:6]:
        assert bad[row["annotation_id"]][1] in row["reason"]
    assert report["annotations"][6]["reason"] == "no image has the id 99"


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16"])
def test_pictures_of_every_mode_are_read(mode):
    level = 128 * 257 if mode == "I;16" else 128
    plain = Image.new("RGB", (40, 30), (128, 128, 128))
    image = Image.fromarray(np.full((30, 40), level, np.uint16)) if mode == "I;16" else plain.convert(mode)
    name = f"photo.{'tif' if mode == 'CMYK' else 'png'}"
    image.save(name, **({"transparency": b"\x00\x80"} if mode == "P" else {}))
    picture = boxes_of.Picture(0, name, (30, 40), (15, 20), [], [])
    pixels = images_of.read_image(Path(name), picture)
    assert pixels.shape == (15, 20, 3)
    assert abs(pixels.mean() - 128) < 2


def test_a_turned_photograph_is_read_as_its_boxes_were_measured():
    pixels = np.zeros((30, 40, 3), np.uint8)
    pixels[:, :10] = 255  # left as stored, above as shown
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save("turned.png", exif=exif)
    stored = images_of.read_image(Path("turned.png"), boxes_of.Picture(0, "", (30, 40), (30, 40), [], []))
    shown = images_of.read_image(Path("turned.png"), boxes_of.Picture(0, "", (40, 30), (40, 30), [], []))
    assert (stored == pixels).all()
    assert (shown == np.rot90(pixels, -1)).all()


def test_weights_from_a_file(capsys):
    torch.manual_seed(0)
    state = torchvision.models.get_model("resnet18", weights=None).state_dict()
    state |= {"fc.weight": torch.zeros(7, 512), "fc.bias": torch.zeros(7)}  # of a head of one's own
    torch.save({"model": {f"module.{key}": value for key, value in state.items()}}, "weights.pth")
    found = extract("out.safetensors", "--weights", "weights.pth")
    assert torch.equal(found["features"], extract("none.safetensors")["features"])
    del state["layer1.0.conv1.weight"]
    torch.save(state, "weights.pth")
    assert region_features.main(command("lacking.safetensors", "--weights", "weights.pth")) == 2
    assert "weights.pth lacks layer1.0.conv1.weight" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--images nowhere", "--images must hold some image that has regions in --boxes, got nowhere"),
        ("--boxes none.json", "--boxes must be a JSON file, got none.json: [Errno 2] No such file"),
        ("--boxes photos/0.png", "--boxes must be a JSON file, got photos/0.png: "),
        ("--backbone resnet19", "--backbone must be torchvision's, such as resnet18 or "),
        (
            "--backbone vit_b_16",
            "--backbone must take images of any size, as swin_t does: Wrong image height!",
        ),
        (
            "--weights IMAGENET",
            "--weights must be a .pth, .pt or .safetensors file, or none, IMAGENET1K_V1, ",
        ),
        ("--weights none.pth", "--weights must be a state dict of the backbone, got none.pth: [Errno 2]"),
        (
            "--nodes layer5",
            "--nodes must name maps, got ['layer5']; there are\n  conv1: stride 2, 64 channels",
        ),
        ("--nodes flatten", "--nodes must name maps, got ['flatten']"),
        ("--device nothing", "--device must be one of this machine, got nothing: "),
        ("--out photos/0.safetensors", "--out must be a new file, got photos/0.safetensors, which is not of"),
        ("--out none/out.safetensors", "No such file or directory: 'none/out.safetensors.parts'"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    Path("photos/0.safetensors").write_text("something else")
    assert region_features.main(command("out.safetensors", *arguments.split())) == (
        1 if "none/out" in message else 2
    )
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--out out.pt", "--out must end in .safetensors, got out.pt"),
        ("--batch-size 0", "--batch-size must be positive, got 0"),
        ("--part-mib nan", "--part-mib must be positive, got nan"),
        ("--autocast", "--autocast needs --dtype float16 or bfloat16, got float32"),
    ],
)
def test_bad_arguments_of_the_parser(arguments, message, capsys):
    with pytest.raises(SystemExit):
        region_features.main(command("out.safetensors", *arguments.split()))
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "must hold images, a list of objects"),
        ({"images": []}, "must hold annotations, a list of objects"),
        ({"images": [{"id": 1}], "annotations": []}, 'a height and a width, got {"id": 1}'),
        (
            {"images": [{"id": 1, "file_name": "0.png", "height": 3, "width": 0}], "annotations": []},
            "a width",
        ),
        ({"images": [], "annotations": [{"id": "a"}]}, "an integer id of its own, got 'a'"),
        ({"images": [], "annotations": [{"id": 1}, {"id": 1}]}, "an integer id of its own, got 1"),
    ],
)
def test_boxes_that_are_not_coco(content, message, capsys):
    Path("boxes.json").write_text(json.dumps(content))
    assert region_features.main(command("out.safetensors")) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is reset as Linux does")
def test_memory_does_not_grow_with_the_regions():
    first, _ = read_boxes()
    images = [first[i % 8] | {"id": i} for i in range(32)]
    many = [{"id": i, "image_id": i // 50, "bbox": [0, 0, 30, 30]} for i in range(1600)]

    def peak(out, annotations):
        write_boxes(images, annotations)
        Path("/proc/self/clear_refs").write_text("5")
        extract(out, "--nodes", "layer1", "--output-size", "28", "--part-mib", "8", "--batch-size", "1")
        return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024

    few = peak("few.safetensors", many[:400])
    assert peak("many.safetensors", many) < few + 100  # MiB; the features are 306, those of the few 77

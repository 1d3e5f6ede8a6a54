"""Pool the features of annotated regions of a folder of images into one safetensors file.

    python examples/region_features.py --images val2017 --boxes instances_val2017.json \
        --backbone resnet50 --out features.safetensors
    torchrun --nproc-per-node 8 examples/region_features.py ...  # the same, shared out

The work is cut into parts before it begins, by the boxes and the arguments alone. Processes share out
whole parts; an interruption loses the parts in hand, and the same command, run again, makes those that
are missing. Which images share a batch, and with it the last bit of every value, does not depend on how
many processes there were or how often they were stopped.

docs/region_features.md shows typical jobs, the format of the result and what is done about bad input.
"""

import argparse
import contextlib
import datetime
import difflib
import hashlib
import itertools
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import PIL
import torch
import torch.distributed as dist
import torchvision
from PIL import Image, ImageOps
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import roialign
from roialign.levels import assign_levels, map_levels_of

RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TENSORS = ("annotation_ids", "image_ids", "levels", "boxes", "features")  # wide types first: aligned
MULTIPLE = 32  # batches are padded to it, as detectors do
PROBE = (256, 384)  # an image whose maps tell their stride: 2 : 3, and whole at every stride up to 128
T = TypeVar("T")
console = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)


class BadInputError(Exception):
    """The arguments, or the files they name, cannot be used; every process finds the same."""


# Boxes -----------------------------------------------------------------------------------------------


class Picture(NamedTuple):
    """An image and its regions; sizes are (height, width)."""

    id: int
    file_name: str
    size: tuple[int, int]  # of the file
    resized: tuple[int, int]
    annotation_ids: list[int]
    boxes: list[list[float]]  # x1, y1, x2, y2 in pixels of the file


def read_pictures(args: argparse.Namespace) -> tuple[list[Picture], list[int], list[dict[str, Any]]]:
    """Read the images that have regions; the regions' ids in the order of the file; what is left out."""
    content = read_json("--boxes", args.boxes)
    content = content if isinstance(content, dict) else {}
    found = read_json("--results", args.results) if args.results else content.get("annotations")
    for name, entries in {"images": content.get("images"), "annotations": found}.items():
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise BadInputError(
                f"--boxes or --results must hold {name}, a list of objects, as COCO's files do"
            )
    pictures: dict[int, Picture] = {}
    for image in content["images"]:
        picture = picture_of(image, args)
        if pictures.setdefault(picture.id, picture) is not picture:
            raise BadInputError(f"every image must have an id of its own, got {picture.id} twice")
    reasons: dict[int, str] = {}
    rejected = []
    for position, annotation in enumerate(found):
        number = annotation.get("id", position)  # what a detector found has no ids
        if type(number) is not int or number in reasons:
            raise BadInputError(f"every annotation must have an integer id of its own, got {number!r}")
        reasons[number] = reason = add_box(pictures, annotation, number)
        if reason:
            row = {"annotation_id": number, "image_id": annotation.get("image_id"), "reason": reason}
            rejected.append(row)
    order = [number for number, reason in reasons.items() if not reason]
    return [picture for picture in pictures.values() if picture.boxes], order, rejected


def read_json(argument: str, path: Path) -> Any:
    """Read the JSON file that an argument names."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BadInputError(f"{argument} must be a JSON file, got {path}: {error}") from None


def picture_of(image: dict[str, Any], args: argparse.Namespace) -> Picture:
    """An image, as yet without regions."""
    number, name, height, width = (image.get(key) for key in ("id", "file_name", "height", "width"))
    if [type(number), type(name), type(height), type(width)] != [int, str, int, int] or min(
        height, width
    ) < 1:
        shown = json.dumps(image)[:100]
        raise BadInputError(f"every image must have an id, a file_name, a height and a width, got {shown}")
    ratio = args.size / min(height, width) if args.size else 1
    ratio = min(ratio, (args.max_size or math.inf) / max(height, width))
    resized = (max(1, round(height * ratio)), max(1, round(width * ratio)))
    return Picture(number, name, (height, width), resized, [], [])


def add_box(pictures: dict[int, Picture], annotation: dict[str, Any], number: int) -> str:
    """Add a region to its image; if that cannot be, say why."""
    image_id, bbox = annotation.get("image_id"), annotation.get("bbox")
    if type(image_id) is not int or image_id not in pictures:
        return f"no image has the id {image_id!r}"
    if not (isinstance(bbox, list) and len(bbox) == 4 and all(type(c) in (int, float) for c in bbox)):
        return f"bbox must be four numbers, x, y, width, height, got {json.dumps(bbox)[:100]}"
    picture = pictures[image_id]
    height, width = picture.size
    x, y, w, h = bbox
    # Beyond its image there is only the padding of a batch, and nothing that belongs to the region.
    box = [max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)]
    if not (all(abs(c) < 1e9 for c in bbox) and box[0] < box[2] and box[1] < box[3]):
        return f"bbox must be finite and cover some of its image of {width} x {height} pixels, got {bbox}"
    picture.annotation_ids.append(number)
    picture.boxes.append(box)
    return ""


def plan_parts(pictures: list[Picture], batch_size: int, capacity: int) -> list[list[list[Picture]]]:
    """Cut the work into parts of batches, by what it is and not by who does it.

    Images share a batch if they are padded to one size anyhow: then a value depends on its own image,
    but for rounding. The largest come first, so that memory, if too small, is so before the night.
    """
    pictures = sorted(pictures, key=lambda picture: (padded(picture), picture.id), reverse=True)
    batches = []
    for _, alike in itertools.groupby(pictures, padded):
        batches += pack(list(alike), lambda picture: len(picture.boxes), capacity, batch_size)
    return pack(batches, regions_of, capacity, len(batches))


def padded(picture: Picture) -> tuple[int, int]:
    """The size that a picture is padded to."""
    height, width = picture.resized
    return -(-height // MULTIPLE) * MULTIPLE, -(-width // MULTIPLE) * MULTIPLE


def pack(items: Sequence[T], weight: Callable[[T], int], capacity: int, most: int) -> list[list[T]]:
    """Fill groups in order, of `most` items and this capacity; one item alone may exceed it."""
    groups: list[list[T]] = []
    room = 0
    for item in items:
        if not groups or weight(item) > room or len(groups[-1]) == most:
            groups.append([])
            room = capacity
        groups[-1].append(item)
        room -= weight(item)
    return groups


def regions_of(batch: list[Picture]) -> int:
    """The number of regions of a batch."""
    return sum(len(picture.boxes) for picture in batch)


# Images ----------------------------------------------------------------------------------------------


class Batches(torch.utils.data.Dataset[list[Tensor | str]]):
    """The images of each batch, `(H, W, 3)` uint8; for one that cannot be read, the reason."""

    def __init__(self, folder: Path, batches: list[list[Picture]]) -> None:
        self.folder = folder
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> list[Tensor | str]:
        return [self.read(picture) for picture in self.batches[index]]

    def read(self, picture: Picture) -> Tensor | str:
        """Read one image."""
        try:
            return torch.from_numpy(read_image(self.folder / picture.file_name, picture))
        except MemoryError:
            raise
        except Exception as error:  # decoders of damaged files raise errors of every kind
            return f"{type(error).__name__}: {error}"


def read_image(path: Path, picture: Picture) -> np.ndarray:
    """Read a picture of any mode as RGB, in the size that it is to have."""
    height, width = picture.size
    with Image.open(path) as image:
        image.load()
        # COCO's boxes are measured on the pixels as stored. Other tools measured what they showed,
        # turned as EXIF says, and wrote down that size: the size tells which.
        if image.size == (height, width) != (width, height):
            image = ImageOps.exif_transpose(image)
        if image.size != (width, height):
            raise ValueError(f"has {image.size} pixels, (width, height), not {(width, height)} as in --boxes")
        if image.mode == "F":
            raise ValueError("has floating-point pixels, of no known range")
        if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion clips them to 8
            image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
        if "transparency" in image.info:  # of a palette, Pillow wants it so
            image = image.convert("RGBA")
        return np.array(image.convert("RGB").resize(picture.resized[::-1], Image.Resampling.BILINEAR))


def ignore_interrupts(worker: int) -> None:
    """Leave Ctrl-C to the process that the worker belongs to."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# The backbone ----------------------------------------------------------------------------------------


class MapKind(NamedTuple):
    """What the map of a node is like."""

    stride: int
    channels: int
    channels_last: bool  # (N, H, W, C), as within a Swin transformer


class Backbone(NamedTuple):
    """What makes maps, and what they are like."""

    body: nn.Module  # images -> {node: map}
    kinds: dict[str, MapKind]  # by node
    mean: list[float]  # of RGB in [0, 1], for normalisation
    std: list[float]
    is_pyramid: bool  # a region is pooled from the level that suits it; else from every map, side by side

    def channels(self) -> int:
        """Channels of what is pooled."""
        each = [kind.channels for kind in self.kinds.values()]
        return each[0] if self.is_pyramid else sum(each)


def build_backbone(args: argparse.Namespace) -> Backbone:
    """Build what leads to the maps of a torchvision model; of a detector, its feature pyramid."""
    name, weights = args.backbone, args.weights
    detectors = models.list_models(module=models.detection)
    known = [*models.list_models(module=models), *detectors]
    if name not in known:
        like = " or ".join(difflib.get_close_matches(name, known)) or "resnet50"
        raise BadInputError(f"--backbone must be torchvision's, such as {like}, got {name}")
    entries = {"none": None, **models.get_model_weights(name).__members__}
    is_file = Path(weights).suffix in (".pth", ".pt", ".safetensors")
    if weights not in entries and not is_file:
        known = ", ".join(entries)
        raise BadInputError(f"--weights must be a .pth, .pt or .safetensors file, or {known}, got {weights}")
    entry = entries.get(weights)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # ImageNet's
    torch.manual_seed(0)  # without weights, every process must still have the same
    if name in detectors:
        model = models.get_model(name, weights=entry, weights_backbone=None).eval()
        mean, std = model.transform.image_mean, model.transform.image_std
        body, kinds = pyramid_of(model, args.nodes)
    else:
        body, kinds = extractor_of(models.get_model(name, weights=entry).eval(), args.nodes)
        if entry:
            mean, std = entry.transforms().mean, entry.transforms().std
    if is_file:
        load_weights(body, Path(weights))
    return Backbone(body.eval().to(args.device), kinds, mean, std, name in detectors)


def load_weights(body: nn.Module, path: Path) -> None:
    """Load a state dict, or a checkpoint of torchvision's training scripts; heads are passed over."""
    try:
        is_pickle = path.suffix != ".safetensors"
        state = torch.load(path, "cpu", weights_only=True) if is_pickle else load_file(path)
        state = state.get("model", state)
        state = {k.removeprefix("module.").removeprefix("backbone."): v for k, v in state.items()}
        missing = body.load_state_dict(state, strict=False).missing_keys
    except Exception as error:  # what is no state dict fails in ways of its own
        raise BadInputError(f"--weights must be a state dict of the backbone, got {path}: {error}") from None
    if missing:
        raise BadInputError(f"--weights must hold all weights of the backbone, {path} lacks {missing[0]}")


def pyramid_of(detector: nn.Module, nodes: list[str] | None) -> tuple[nn.Module, dict[str, MapKind]]:
    """The feature pyramid of a detector, and the levels to pool from: by default, those that its heads do."""
    maps = probe(detector.backbone)
    pooler = getattr(getattr(detector, "roi_heads", None), "box_roi_pool", None)
    default = [name for name in getattr(pooler, "featmap_names", maps) if name in maps]
    kinds = choose(nodes or default, maps)
    if len({kind.channels for kind in kinds.values()}) > 1:
        raise BadInputError(f"--nodes must name maps with equally many channels, of{listing(maps)}")
    return detector.backbone, kinds


def extractor_of(model: nn.Module, nodes: list[str] | None) -> tuple[nn.Module, dict[str, MapKind]]:
    """The part of a classifier that leads to these nodes, by default to the last map before its head."""
    try:
        names = get_graph_node_names(model, suppress_diff_warning=True)[1]
        maps = probe(create_feature_extractor(model, names, suppress_diff_warning=True))
    except (AssertionError, RuntimeError) as error:  # a ViT, of one size
        reason = str(error).splitlines()[0]
        raise BadInputError(f"--backbone must take images of any size, as swin_t does: {reason}") from None
    ends = {}  # the last node of every module, layer4.2.relu_2 of layer4
    for name in names[1:]:
        words = name.split(".")
        ends |= {".".join(words[: i + 1]): name for i in range(len(words))}
    known = {node: maps[end] for node, end in ends.items() if end in maps}
    bodies = [end for node, end in ends.items() if end in maps and not end.startswith("classifier")]
    last = max(bodies, key=names.index, default=None)
    kinds = choose(nodes or [node for node, end in ends.items() if end == last][:1], known)
    return create_feature_extractor(model, list(kinds), suppress_diff_warning=True), kinds


@torch.inference_mode()
def probe(body: nn.Module) -> dict[str, MapKind]:
    """The maps among what a module gives, told by their shapes."""
    kinds = {}
    for node, value in body(torch.zeros(1, 3, *PROBE)).items():
        for channels_last, axes in ((True, (1, 2, 3)), (False, (2, 3, 1))):
            if isinstance(value, Tensor) and value.dim() == 4:
                height, width, channels = (value.shape[axis] for axis in axes)
                stride = 2 ** round(math.log2(PROBE[0] / height))
                misfit = abs(PROBE[0] / stride - height), abs(PROBE[1] / stride - width)
                if max(misfit) <= 1 and stride <= 128:  # poolings without padding lose a cell
                    kinds[node] = MapKind(stride, channels, channels_last)
    return kinds


def choose(nodes: list[str], kinds: dict[str, MapKind]) -> dict[str, MapKind]:
    """The maps of these nodes."""
    unknown = [node for node in nodes if node not in kinds]
    if unknown or not nodes:
        raise BadInputError(f"--nodes must name maps, got {unknown or 'none'}; there are{listing(kinds)}")
    return {node: kinds[node] for node in nodes}


def listing(kinds: dict[str, MapKind]) -> str:
    """The nodes that one might want, each on a line: modules, not what is within their blocks."""
    shown = {node: kind for node, kind in kinds.items() if node.count(".") < 2}
    return "".join(f"\n  {node}: stride {k.stride}, {k.channels} channels" for node, k in shown.items())


# From batches to parts -------------------------------------------------------------------------------


def to_pixels(
    images: list[Tensor | str], batch: list[Picture], backbone: Backbone, device: torch.device
) -> Tensor:
    """Normalise images and pad them with zeros, `(N, 3, H, W)`.

    An image that could not be read stays zero: if it left its place, the others would form another
    batch, and their features would change in the last bits once that image is mended.
    """
    pixels = torch.zeros(len(batch), 3, *padded(batch[0]), device=device)
    mean, std = (torch.tensor(values, device=device) for values in (backbone.mean, backbone.std))
    for place, image in zip(pixels, images, strict=True):
        if isinstance(image, Tensor):
            rgb = (image.to(device) / 255 - mean) / std
            place[:, : rgb.shape[0], : rgb.shape[1]] = rgb.permute(2, 0, 1)
    return pixels


@torch.inference_mode()
def pool_batch(
    images: list[Tensor | str], batch: list[Picture], backbone: Backbone, args: argparse.Namespace
) -> dict[str, Tensor]:
    """Pool the regions of the images that could be read: in every tensor a row for each region."""
    boxes, resized, ids, image_ids = [], [], [], []
    for image, picture in zip(images, batch, strict=True):
        is_read = isinstance(image, Tensor)
        boxes.append(torch.tensor(picture.boxes if is_read else [], dtype=torch.float32).view(-1, 4))
        ratios = [new / old for new, old in zip(picture.resized, picture.size, strict=True)]
        resized.append((boxes[-1] * torch.tensor(ratios[::-1] * 2)).to(args.device))
        ids += picture.annotation_ids if is_read else []
        image_ids += [picture.id] * len(boxes[-1])
    with torch.autocast(args.device.type, DTYPES[args.dtype], enabled=args.autocast):
        maps = backbone.body(to_pixels(images, batch, backbone, args.device))
    features, levels = pool(maps, resized, backbone, args)
    if args.mean:
        features = features.float().mean((2, 3))
    return levels | {
        "annotation_ids": torch.tensor(ids, dtype=torch.int64),
        "image_ids": torch.tensor(image_ids, dtype=torch.int64),
        "boxes": torch.cat(boxes),
        "features": features.to("cpu", DTYPES[args.dtype]).contiguous(),
    }


def pool(
    maps: dict[str, Tensor], boxes: list[Tensor], backbone: Backbone, args: argparse.Namespace
) -> tuple[Tensor, dict[str, Tensor]]:
    """Pool `(K, C, PH, PW)`; from a pyramid, give the level of each region, too."""
    kinds = backbone.kinds.items()
    features = [maps[n].permute(0, 3, 1, 2) if kind.channels_last else maps[n] for n, kind in kinds]
    scales = [1 / kind.stride for kind in backbone.kinds.values()]
    size, ratio, aligned = args.output_size, args.sampling_ratio, args.aligned
    if backbone.is_pyramid:
        levels = assign_levels(torch.cat(boxes), map_levels_of(scales), 224, 4)  # as the detectors' heads
        how = {"sampling_ratio": ratio, "aligned": aligned, "levels": levels}
        return roialign.multiscale_roi_align(features, boxes, size, scales, **how), {"levels": levels.cpu()}
    pairs = zip(features, scales, strict=True)
    return torch.cat([roialign.roi_align(f, boxes, size, s, ratio, aligned) for f, s in pairs], 1), {}


def make_parts(
    parts: list[list[list[Picture]]], backbone: Backbone, args: argparse.Namespace, settings: dict[str, str]
) -> None:
    """Make those parts of this process's share that are not there."""
    mine = range(RANK, len(parts), WORLD_SIZE)
    pending = [number for number in mine if not is_made(part_path(args, number), settings)]
    batches = Batches(args.images, [batch for number in pending for batch in parts[number]])
    how = {"batch_size": None, "num_workers": args.workers, "worker_init_fn": ignore_interrupts}
    decoded = iter(torch.utils.data.DataLoader(batches, **how))
    speed = "{task.fields[speed]:.1f} regions/s"
    columns = (BarColumn(), MofNCompleteColumn(), speed, TimeRemainingColumn())
    with Progress(*columns, console=console, disable=RANK > 0) as progress:
        total = sum(regions_of(batch) for number in mine for batch in parts[number])
        new, start = 0, time.monotonic()
        done = total - sum(map(regions_of, batches.batches))
        task = progress.add_task("", total=total, completed=done, speed=0.0)
        for number in pending:
            rows, skipped = [], []
            for batch in parts[number]:
                images = next(decoded)
                rows.append(pool_batch(images, batch, backbone, args))
                skipped += [skip(*pair) for pair in zip(images, batch, strict=True) if type(pair[0]) is str]
                new += regions_of(batch)
                progress.update(task, completed=done + new, speed=new / (time.monotonic() - start))
            tensors = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
            with replacing(path := part_path(args, number), path.parent) as temporary:
                save_file(tensors, temporary, settings | {"skipped": json.dumps(skipped)})


def skip(reason: str, picture: Picture) -> dict[str, Any]:
    """Say that an image could not be read, at once and for the record."""
    console.print(f"skipped image {picture.id}, {picture.file_name}: {reason}")
    row = {"image_id": picture.id, "file_name": picture.file_name, "reason": reason}
    return row | {"annotation_ids": picture.annotation_ids}


# Files -----------------------------------------------------------------------------------------------


def part_path(args: argparse.Namespace, number: int) -> Path:
    """Where a part lies."""
    return Path(f"{args.out}.parts", f"{number:06d}.safetensors")


@contextlib.contextmanager
def replacing(path: Path, folder: Path) -> Iterator[Path]:
    """Write a file elsewhere, and give it its place once it is whole and on the disk."""
    temporary = folder / f"{path.name}.{os.getpid()}.tmp"
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def is_made(path: Path, settings: dict[str, str]) -> bool:
    """Whether a whole file is there; if so, it must be one of this run."""
    try:
        with safe_open(path, "pt") as file:
            found = file.metadata() or {}
    except (FileNotFoundError, SafetensorError):
        return False
    changed = [
        f"{name} {found.get(name)}, not {now}" for name, now in settings.items() if found.get(name) != now
    ]
    if changed:
        was = "; ".join(changed)
        raise BadInputError(f"--out {path} was made with {was}: remove it, or give another --out")
    return True


def merge(paths: list[Path], out: Path, order: list[int], settings: dict[str, str]) -> None:
    """Merge the parts, one at a time in memory, into rows in the order of the annotations.

    The writer of safetensors wants all in memory, so the file is written here: the length of a header
    in JSON, the header, the rows (https://github.com/huggingface/safetensors#format).
    """
    kept = set()
    for path in paths:
        with safe_open(path, "pt") as part:
            kept.update(part.get_tensor("annotation_ids").tolist())
    row_of = {number: row for row, number in enumerate(number for number in order if number in kept)}
    header: dict[str, Any] = {"__metadata__": settings}
    size = 0
    with safe_open(paths[0], "pt") as part:
        for name in [name for name in TENSORS if name in list(part.keys())]:
            tensor, dtype = part.get_tensor(name), part.get_slice(name).get_dtype()
            shape = [len(row_of), *tensor.shape[1:]]
            start, size = size, size + math.prod(shape) * tensor.element_size()
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, size]}
    text = json.dumps(header, sort_keys=True).encode()
    text += b" " * (-len(text) % 8)
    with replacing(out, paths[0].parent) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for path in paths:
            part = load_file(path)
            rows = [row_of[number] for number in part["annotation_ids"].tolist()]
            for name, tensor in part.items():
                start = 8 + len(text) + header[name]["data_offsets"][0]
                flat = tensor.reshape(len(rows), math.prod(tensor.shape[1:]))
                for row, raw in zip(rows, flat.view(torch.uint8).numpy(), strict=True):  # bfloat16, too
                    file.seek(start + row * raw.nbytes)
                    file.write(raw)


def finish(
    paths: list[Path],
    args: argparse.Namespace,
    order: list[int],
    rejected: list[Any],
    settings: dict[str, str],
) -> None:
    """Write down what was skipped, then the result; the parts are removed when both are there."""
    skipped = []
    for path in paths:
        with safe_open(path, "pt") as part:
            skipped += json.loads(part.metadata()["skipped"])
    report = args.out.with_suffix(".skipped.json")
    for stale in paths[0].parent.glob("*.tmp"):  # of processes that were killed
        stale.unlink()
    with replacing(report, paths[0].parent) as temporary:
        temporary.write_text(json.dumps({"images": skipped, "annotations": rejected}, indent=1) + "\n")
    if not args.no_merge:
        merge(paths, args.out, order, settings)
        shutil.rmtree(paths[0].parent)
    lost = sum(len(row["annotation_ids"]) for row in skipped)
    console.print(f"{len(order) - lost} regions in {paths[0].parent if args.no_merge else args.out}")
    if skipped or rejected:
        left_out = f"{len(skipped)} images with {lost} regions, and {len(rejected)} annotations"
        console.print(f"skipped {left_out}: {report} says why")


# The command -----------------------------------------------------------------------------------------


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--images", type=Path, required=True, metavar="DIR", help="where the file_names of --boxes begin")
    add("--boxes", type=Path, required=True, metavar="FILE.json", help="images and annotations, as COCO's")
    add("--results", type=Path, metavar="FILE.json", help="a detector's results, instead of annotations")
    add("--out", type=Path, required=True, metavar="FILE.safetensors", help="the file to write")
    add("--backbone", default="resnet50", help="a classifier of torchvision, or a detector for its FPN")
    add("--weights", default="DEFAULT", help="torchvision's name for them, a state-dict FILE.pth, or none")
    add("--nodes", nargs="+", metavar="NODE", help="maps to pool from; default: the last, or all of an FPN")
    add("--size", type=int, help="resize images to this short side; default: as they are")
    add("--max-size", type=int, help="but make no side longer than this")
    add("--output-size", type=int, default=7, help="bins per side (default: %(default)s)")
    add("--sampling-ratio", type=int, default=2, help="points per bin and side; 0: adaptive (default: 2)")
    add("--aligned", action="store_true", help="shift boxes by half a cell, as Detectron2 does")
    add("--mean", action="store_true", help="average over the bins: features are (K, C)")
    add("--dtype", choices=DTYPES, default="float32", help="of the features (default: %(default)s)")
    add("--autocast", action="store_true", help="run the backbone in --dtype, too")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    add("--batch-size", type=int, default=8, help="images (default: %(default)s)")
    add("--workers", type=int, default=2, help="processes that decode images (default: %(default)s)")
    add("--threads", type=int, help="of each process on the CPU; default: PyTorch's choice")
    add("--part-mib", type=float, default=64.0, help="size of a part: what an interruption may lose")
    add("--no-merge", action="store_true", help="leave the parts as the result")
    args = parser.parse_args(argv)
    for name in ("size", "max_size", "output_size", "batch_size", "threads", "part_mib"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {value}")
    if args.out.suffix != ".safetensors":
        parser.error(f"--out must end in .safetensors, got {args.out}")
    if args.autocast and args.dtype == "float32":
        parser.error("--autocast needs --dtype float16 or bfloat16, got float32")
    return args


def set_device(args: argparse.Namespace) -> None:
    """Give the process its device and its threads; the same sums in the same order, every time."""
    try:
        args.device = torch.empty(0, device=args.device).device
    except (AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise BadInputError(f"--device must be one of this machine, got {args.device}: {reason}") from None
    if args.device.type == "cuda" and WORLD_SIZE > 1:
        args.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(args.device)
    torch.backends.cudnn.deterministic = True
    torch.set_num_threads(args.threads or torch.get_num_threads())


def settings_of(args: argparse.Namespace, backbone: Backbone) -> dict[str, str]:
    """All that the result depends on: the metadata of every file."""
    here = ("images", "out", "workers", "no_merge", "device", "threads")
    settings = {name: value for name, value in vars(args).items() if name not in here}
    for name in ("boxes", "results", "weights"):
        if settings[name] and Path(settings[name]).is_file():  # the hash stays when the file is moved
            settings[name] = "sha256:" + hashlib.sha256(Path(settings[name]).read_bytes()).hexdigest()
    columns = zip(*backbone.kinds.values(), strict=True)
    settings |= {"nodes": list(backbone.kinds), "strides": next(columns), "channels": next(columns)}
    settings |= {module.__name__: module.__version__ for module in (torch, torchvision, roialign, PIL)}
    settings["device"] = args.device.type
    if args.device.type == "cpu":  # its convolutions add in an order that depends on them
        settings["threads"] = torch.get_num_threads()
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in settings.items()}


def extract(args: argparse.Namespace) -> None:
    """Do what the arguments say."""
    set_device(args)
    pictures, order, rejected = read_pictures(args)
    if not any((args.images / picture.file_name).is_file() for picture in pictures):
        raise BadInputError(f"--images must hold some image that has regions in --boxes, got {args.images}")
    backbone = build_backbone(args)
    settings = settings_of(args, backbone)
    if is_made(args.out, settings):
        console.print(f"{args.out} is there already, made with the same arguments")
        return
    if args.out.exists():
        raise BadInputError(
            f"--out must be a new file, got {args.out}, which is not of this program's making"
        )
    bytes_each = backbone.channels() * (1 if args.mean else args.output_size**2) * DTYPES[args.dtype].itemsize
    parts = plan_parts(pictures, args.batch_size, max(1, int(args.part_mib * 2**20 / bytes_each)))
    folder = part_path(args, 0).parent
    folder.mkdir(exist_ok=True)
    for path in folder.glob("*.safetensors"):  # every process looks at all, so that the first can say it
        is_made(path, settings)
    make_parts(parts, backbone, args, settings)
    if WORLD_SIZE > 1:
        dist.barrier()
    if RANK == 0:
        finish([part_path(args, number) for number in range(len(parts))], args, order, rejected, settings)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command: 0 if the result is whole, whatever was skipped; 2 if the arguments cannot be used."""
    args = parse_arguments(argv)
    if WORLD_SIZE > 1:  # to wait for each other at the end, however long that takes
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=30))
    try:
        extract(args)
    except BadInputError as error:
        if RANK == 0:
            console.print(f"{Path(__file__).name}: {error}")
        return 2
    except (OSError, SafetensorError, KeyboardInterrupt) as error:  # a full disk, for one
        reason = "interrupted" if isinstance(error, KeyboardInterrupt) else error
        console.print(f"{Path(__file__).name}: {reason}; whole parts are kept, the same command goes on")
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())

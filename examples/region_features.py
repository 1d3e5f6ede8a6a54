"""Pool the features of annotated regions of a folder of images into one safetensors file.

    python examples/region_features.py --images val2017 --boxes instances_val2017.json \
        --backbone resnet50 --out features.safetensors
    torchrun --nproc-per-node 8 examples/region_features.py ...  # the same, shared out

The work is cut into parts before it begins, by the boxes and the arguments alone. Processes share out
whole parts; an interruption loses the parts in hand, and the same command, run again, makes those that
are missing. Which images share a batch, and with it the last bit of every value, does not depend on how
many processes there were or how often they were stopped.

regions/ beside this file holds the steps, to be copied where they are of use by themselves.
docs/region_features.md shows typical jobs, the format of the result and what is done about bad input.
"""

import argparse
import contextlib
import datetime
import hashlib
import json
import math
import os
import shutil
import sys
import time
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import torch.distributed as dist
import torchvision
from regions import BadInputError
from regions.backbones import Backbone, build_backbone
from regions.boxes import Picture, plan_parts, read_pictures, regions_of
from regions.files import is_made, locked, merge, part_path, replacing
from regions.images import Batches, ignore_interrupts, to_pixels
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import roialign
from roialign.levels import staircase

RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
console = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)


@torch.inference_mode()
def pool_batch(
    images: list[Tensor | str], batch: list[Picture], backbone: Backbone, args: argparse.Namespace
) -> dict[str, Tensor]:
    """Pool the regions of the images that could be read: in every tensor a row for each region."""
    boxes, resized, ids, image_ids = [], [], [], []
    for image, picture in zip(images, batch, strict=True):
        is_read = isinstance(image, Tensor)
        boxes.append(torch.from_numpy(np.array(picture.boxes if is_read else [], np.float32)).view(-1, 4))
        ratios = [new / old for new, old in zip(picture.resized, picture.size, strict=True)]
        resized.append((boxes[-1] * torch.tensor(ratios[::-1] * 2)).to(args.device))
        ids += picture.annotation_ids if is_read else []
        image_ids += [picture.id] * len(boxes[-1])
    with torch.autocast(args.device.type, DTYPES[args.dtype], enabled=args.autocast):
        maps = backbone.body(to_pixels(images, batch, backbone.mean, backbone.std))
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
        every = torch.cat(boxes)
        levels = staircase(scales, 224, 4, every.dtype).levels(every)  # as the detectors' heads
        how = {"sampling_ratio": ratio, "aligned": aligned, "levels": levels}
        return roialign.multiscale_roi_align(features, boxes, size, scales, **how), {"levels": levels.cpu()}
    pairs = zip(features, scales, strict=True)
    return torch.cat([roialign.roi_align(f, boxes, size, s, ratio, aligned) for f, s in pairs], 1), {}


def make_parts(
    parts: list[list[list[Picture]]], backbone: Backbone, args: argparse.Namespace, settings: dict[str, str]
) -> None:
    """Make those parts of this process's share that are not there."""
    mine = range(RANK, len(parts), WORLD_SIZE)
    # Every process looks at all that are there, so that the first can say what is wrong with them.
    made = {path for path in part_path(args.out, 0).parent.glob("*.safetensors") if is_made(path, settings)}
    pending = [number for number in mine if part_path(args.out, number) not in made]
    if made and RANK == 0:
        console.print(f"{len(made)} of {len(parts)} parts are there already")
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
            with replacing(path := part_path(args.out, number), path.parent) as temporary:
                save_file(tensors, temporary, settings | {"skipped": json.dumps(skipped)})


def skip(reason: str, picture: Picture) -> dict[str, Any]:
    """Say that an image could not be read, at once and for the record."""
    console.print(f"skipped image {picture.id}, {picture.file_name}: {reason}")
    row = {"image_id": picture.id, "file_name": picture.file_name, "reason": reason}
    return row | {"annotation_ids": picture.annotation_ids.tolist()}


def finish(
    paths: list[Path],
    args: argparse.Namespace,
    order: array,
    rejected: list[Any],
    settings: dict[str, str],
) -> None:
    """Write down what was skipped, then the result."""
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
        console.print(f"merging {len(paths)} parts")
        merge(paths, args.out, order, settings)
    lost = sum(len(row["annotation_ids"]) for row in skipped)
    console.print(f"{len(order) - lost} regions in {paths[0].parent if args.no_merge else args.out}")
    if skipped or rejected:
        left_out = f"{len(skipped)} images with {lost} regions, and {len(rejected)} annotations"
        console.print(f"skipped {left_out}: {report} says why")


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
            settings[name] = sha256_of(Path(settings[name]))
    columns = zip(*backbone.kinds.values(), strict=True)
    settings |= {"nodes": list(backbone.kinds), "strides": next(columns), "channels": next(columns)}
    settings |= {module.__name__: module.__version__ for module in (torch, torchvision, roialign, PIL)}
    settings["device"] = args.device.type
    if args.device.type == "cpu":  # its convolutions add in an order that depends on them
        settings["threads"] = torch.get_num_threads()
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in settings.items()}


def sha256_of(path: Path) -> str:
    """The hash of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def extract(args: argparse.Namespace) -> None:
    """Do what the arguments say."""
    set_device(args)
    pictures, order, rejected = read_pictures(args.boxes, args.results, args.size, args.max_size)
    if not any((args.images / picture.file_name).is_file() for picture in pictures):
        raise BadInputError(f"--images must hold some image that has regions in --boxes, got {args.images}")
    backbone = build_backbone(args.backbone, args.weights, args.nodes, args.device)
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
    folder = part_path(args.out, 0).parent
    folder.mkdir(exist_ok=True)
    with locked(folder / "lock") if RANK == 0 else contextlib.nullcontext(True) as is_alone:
        answer = [is_alone]
        if WORLD_SIZE > 1:  # the first process asks for all
            dist.broadcast_object_list(answer)
        if not answer[0]:
            raise BadInputError(f"--out must not be in use by another run, got {args.out}")
        make_parts(parts, backbone, args, settings)
        if WORLD_SIZE > 1:
            dist.barrier()
        if RANK == 0:
            paths = [part_path(args.out, number) for number in range(len(parts))]
            finish(paths, args, order, rejected, settings)
    if RANK == 0 and not args.no_merge:
        shutil.rmtree(folder)


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

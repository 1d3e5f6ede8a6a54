"""Which regions of which images, and how they are cut into batches and parts."""

import gc
import itertools
import json
import math
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from regions import BadInputError

MULTIPLE = 32  # batches are padded to it, as detectors do
USED = {"images", "annotations", "id", "image_id", "file_name", "height", "width", "bbox"}
T = TypeVar("T")


class Picture(NamedTuple):
    """An image and its regions; sizes are (height, width)."""

    id: int
    file_name: str
    size: tuple[int, int]  # of the file
    resized: tuple[int, int]
    annotation_ids: array  # of int64
    boxes: array  # of float32: x1, y1, x2, y2 of each region in turn, in pixels of the file


def read_pictures(
    boxes: Path, results: Path | None, size: int | None, max_size: int | None
) -> tuple[list[Picture], array, list[dict[str, Any]]]:
    """Read the images that have regions; the regions' ids in the order of the file; what is left out."""
    content = read_json("--boxes", boxes)
    content = content if isinstance(content, dict) else {}
    found = read_json("--results", results) if results else content.get("annotations")
    for name, entries in {"images": content.get("images"), "annotations": found}.items():
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise BadInputError(
                f"--boxes or --results must hold {name}, a list of objects, as COCO's files do"
            )
    pictures: dict[int, Picture] = {}
    for image in content["images"]:
        picture = picture_of(image, size, max_size)
        if pictures.setdefault(picture.id, picture) is not picture:
            raise BadInputError(f"every image must have an id of its own, got {picture.id} twice")
    seen: set[int] = set()
    order, rejected = array("q"), []
    for position, annotation in enumerate(found):
        number = annotation.get("id", position)  # what a detector found has no ids
        if type(number) is not int or number.bit_length() > 63 or number in seen:
            raise BadInputError(f"every annotation must have an integer id of its own, got {number!r}")
        seen.add(number)
        if reason := add_box(pictures, annotation, number):
            row = {"annotation_id": number, "image_id": annotation.get("image_id"), "reason": reason}
            rejected.append(row)
        else:
            order.append(number)
    return [picture for picture in pictures.values() if picture.boxes], order, rejected


def read_json(argument: str, path: Path) -> Any:
    """Read the JSON file that an argument names; of its objects what is used here, for there are millions."""
    is_enabled = gc.isenabled()
    gc.disable()  # looking for cycles, of which there are none, takes longer than reading
    try:
        return json.loads(
            path.read_bytes(), object_hook=lambda entry: {k: entry[k] for k in USED & entry.keys()}
        )
    except (OSError, ValueError) as error:
        raise BadInputError(f"{argument} must be a JSON file, got {path}: {error}") from None
    finally:
        if is_enabled:
            gc.enable()


def picture_of(image: dict[str, Any], size: int | None, max_size: int | None) -> Picture:
    """An image, as yet without regions."""
    number, name, height, width = (image.get(key) for key in ("id", "file_name", "height", "width"))
    if [type(number), type(name), type(height), type(width)] != [int, str, int, int] or min(
        height, width
    ) < 1:
        shown = json.dumps(image)[:100]
        raise BadInputError(f"every image must have an id, a file_name, a height and a width, got {shown}")
    ratio = size / min(height, width) if size else 1
    ratio = min(ratio, (max_size or math.inf) / max(height, width))
    resized = (max(1, round(height * ratio)), max(1, round(width * ratio)))
    return Picture(number, name, (height, width), resized, array("q"), array("f"))


def add_box(pictures: dict[int, Picture], annotation: dict[str, Any], number: int) -> str:
    """Add a region to its image; if that cannot be, say why."""
    image_id, bbox = annotation.get("image_id"), annotation.get("bbox")
    if type(image_id) is not int or image_id not in pictures:
        return f"no image has the id {image_id!r}"
    if not (isinstance(bbox, list) and len(bbox) == 4 and {int, float}.issuperset(map(type, bbox))):
        return f"bbox must be four numbers, x, y, width, height, got {json.dumps(bbox)[:100]}"
    picture = pictures[image_id]
    height, width = picture.size
    x, y, w, h = bbox
    # Beyond its image there is only the padding of a batch, and nothing that belongs to the region.
    box = [max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)]
    if not (all(abs(c) < 1e9 for c in bbox) and box[0] < box[2] and box[1] < box[3]):
        return f"bbox must be finite and cover some of its image of {width} x {height} pixels, got {bbox}"
    picture.annotation_ids.append(number)
    picture.boxes.extend(box)
    return ""


def plan_parts(pictures: list[Picture], batch_size: int, capacity: int) -> list[list[list[Picture]]]:
    """Cut the work into parts of batches, by what it is and not by who does it.

    Images share a batch if they are padded to one size anyhow: then a value depends on its own image,
    but for rounding. The largest come first, so that memory, if too small, is so before the night.
    """
    pictures = sorted(pictures, key=lambda picture: (padded(picture), picture.id), reverse=True)
    batches = []
    for _, alike in itertools.groupby(pictures, padded):
        batches += pack(list(alike), lambda picture: len(picture.annotation_ids), capacity, batch_size)
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
    return sum(len(picture.annotation_ids) for picture in batch)

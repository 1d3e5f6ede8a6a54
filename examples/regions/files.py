"""Parts that are whole or not there, and merged into one file."""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from regions import BadInputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

TENSORS = ("annotation_ids", "image_ids", "levels", "boxes", "features")  # wide types first: aligned


def part_path(out: Path, number: int) -> Path:
    """Where a part of a file lies until all are merged."""
    return Path(f"{out}.parts", f"{number:06d}.safetensors")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold a lock and say whether it could be had; the system frees it when the process dies, however."""
    with open(path, "a") as file:
        try:
            if fcntl:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by workers, as flock's are
        except (BlockingIOError, PermissionError):
            yield False
            return
        except OSError:  # a file system without locks
            pass
        yield True
    path.unlink(missing_ok=True)


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


def merge(paths: list[Path], out: Path, order: Sequence[int], settings: dict[str, str]) -> None:
    """Merge the parts into rows in the order of the annotations, with the features of one part in memory.

    The writer of safetensors wants all in memory, so the file is written here: the length of a header
    in JSON, the header, the rows (https://github.com/huggingface/safetensors#format).
    """
    pieces: dict[str, list[Tensor]] = {}
    for path in paths:
        with safe_open(path, "pt") as part:
            for name in set(part.keys()) - {"features"}:
                pieces.setdefault(name, []).append(part.get_tensor(name))
    columns = {name: torch.cat(pieces[name]).numpy() for name in TENSORS if name in pieces}
    numbers, by_number = np.array(order), np.argsort(order)
    places = by_number[np.searchsorted(numbers, columns["annotation_ids"], sorter=by_number)]
    source = np.argsort(places)  # where a row comes from, counted through the parts
    rows = iter(np.argsort(source).tolist())  # where it goes to
    header: dict[str, Any] = {"__metadata__": settings}
    size = 0
    with safe_open(paths[0], "pt") as part:
        for name in [*columns, "features"]:
            tensor, dtype = part.get_tensor(name), part.get_slice(name).get_dtype()
            shape = [len(source), *tensor.shape[1:]]
            start, size = size, size + math.prod(shape) * tensor.element_size()
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, size]}
    text = json.dumps(header, sort_keys=True).encode()
    text += b" " * (-len(text) % 8)
    with replacing(out, paths[0].parent) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for column in columns.values():
            file.write(column[source].tobytes())
        start = file.tell()
        for path in paths:
            with safe_open(path, "pt") as part:
                features = part.get_tensor("features")
            flat = features.reshape(len(features), math.prod(features.shape[1:]))
            for raw in flat.view(torch.uint8).numpy():  # bfloat16, too
                file.seek(start + next(rows) * raw.nbytes)
                file.write(raw)

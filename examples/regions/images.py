"""Pictures of any kind as RGB, and batches of them as a tensor."""

import signal
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from regions.boxes import Picture, padded


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


def to_pixels(images: list[Tensor | str], batch: list[Picture], mean: Tensor, std: Tensor) -> Tensor:
    """Normalise images and pad them with zeros, `(N, 3, H, W)`.

    An image that could not be read stays zero: if it left its place, the others would form another
    batch, and their features would change in the last bits once that image is mended.
    """
    pixels = torch.zeros(len(batch), 3, *padded(batch[0]), device=mean.device)
    for place, image in zip(pixels, images, strict=True):
        if isinstance(image, Tensor):
            rgb = (image.to(mean.device) / 255 - mean) / std
            place[:, : rgb.shape[0], : rgb.shape[1]] = rgb.permute(2, 0, 1)
    return pixels

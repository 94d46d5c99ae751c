"""Images as they are kept: the content of image files. Reading them imports no torch.

A data set holds each image encoded, as its file does, so that its fingerprint is of the file's content
and memory holds no more than the files do; pixels are made batch by batch.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from crisp_attention.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".webp")


def digits() -> tuple[list[bytes], list[str]]:
    """The 1,797 handwritten digits that scikit-learn ships, 8 x 8 pixels in 17 shades of grey.

    Source: Alpaydin & Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository.

    Returns:
        Images as PGM files, which any version of any library writes alike, and their labels, "0" to "9".
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = np.rint(found.images * (255 / 16)).astype(np.uint8)
    return [b"P5\n8 8\n255\n" + image.tobytes() for image in pixels], [str(label) for label in found.target]


def classes_of(folder: Path) -> list[Path]:
    """The subfolders of a folder of images, one a class, by name."""
    return sorted(item for item in folder.iterdir() if item.is_dir() and not item.name.startswith("."))


def read_folder(folder: Path) -> tuple[list[bytes], list[str], tuple[str, ...]]:
    """All images of a folder with a subfolder for each class.

    Args:
        folder: Holds CLASS/FILE; files are images by their suffix. Hidden files and folders count for nothing.

    Returns:
        Images and their labels, sorted by class and name, and what was left out, in sentences.

    Raises:
        DataError: If there is no subfolder, or a file is not what its suffix says.
    """
    classes = classes_of(folder)
    if not classes:
        raise DataError(f"{folder}: a folder of images needs a subfolder for each class; it has none.")
    images, labels, others, deeper = [], [], 0, 0
    for place in classes:
        visible = [item for item in place.rglob("*") if item.is_file() and not _hidden(item.relative_to(place))]
        deeper += sum(item.parent != place and item.suffix.lower() in SUFFIXES for item in visible)
        for file in sorted(item for item in visible if item.parent == place):
            if file.suffix.lower() not in SUFFIXES:
                others += 1
                continue
            content = file.read_bytes()
            require_image(content, str(file))
            images.append(content)
            labels.append(place.name)
    left_out = {"no images by their suffix": others, "they lie deeper than CLASS/FILE": deeper}
    notes = (f"{count} files of {folder.name} were left out: {why}." for why, count in left_out.items() if count)
    return images, labels, tuple(notes)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def require_image(content: bytes, origin: str) -> None:
    """Make sure that some bytes are a whole image of 8 bits a colour.

    Args:
        content: The image file's bytes.
        origin: What to call it in errors.

    Raises:
        DataError: If they are none, or one of deeper colours, which would be cut off.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:
            mode, checked = image.mode, image.format == "PNG"
            image.verify()
        if not checked:  # by checksums, which other formats lack
            with Image.open(io.BytesIO(content)) as image:
                image.draft("L", (1, 1))  # an eighth of a JPEG's size shows as well where it ends too soon
                image.load()
    # Pillow's decoders raise nearly anything.
    except Exception as error:
        raise DataError(f"{origin} is no image that Pillow can read: {error}") from None
    if mode[0] in "IF":
        raise DataError(f"{origin} has more than 8 bits a colour (mode {mode}); save it with 8.")


def decode(content: bytes, channels: int) -> Image:
    """An image in the colours that a model takes.

    Args:
        content: The image file's bytes.
        channels: 1 for grey, 3 for red, green and blue.
    """
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        return image.convert("L" if channels == 1 else "RGB")

"""Photos as people have them: whatever Pillow reads, in the colours a model takes, huge ones made smaller."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from .errors import DataError

LONGEST_SIDE = 2048
"""In pixels; a larger photo is made smaller as it is read, no model here looks that closely."""


def read_photo(path: str | os.PathLike[str], mode: str = "RGB") -> Image.Image:
    """Read a photo, upright, its longer side at most `LONGEST_SIDE`.

    Args:
        path: The file.
        mode: ``"RGB"``, ``"L"`` (grey) or ``"RGBA"``.

    Raises:
        DataError: There is no such file, it is no image, or it is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no such photo: {path}" if not path.exists() else f"{path} is a folder; give image files")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # it is about to be made smaller
            with Image.open(path) as file:
                file.draft(None, (LONGEST_SIDE, LONGEST_SIDE))  # lets JPEG decode at a half, a quarter, an eighth
                image = ImageOps.exif_transpose(file)
                image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
                return in_mode(image, mode)
    except Image.DecompressionBombError as reason:
        raise DataError(f"{path} has too many pixels to be read safely ({reason}); make it smaller first") from reason
    except Exception as reason:  # a decoder that is given damaged bytes raises anything
        raise DataError(f"{path} is no image that can be read: {type(reason).__name__}: {reason}") from reason


def in_mode(image: Image.Image, mode: str) -> Image.Image:
    """An image in another mode, decoded whole; of more than 8 bits a pixel, scaled and not cut off at 255."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image, dtype=np.float64)
        top = 65535.0 if image.mode.startswith("I;16") else _full_scale(float(values.max()))
        image = Image.fromarray((values.clip(0, top) * (255 / top)).round().astype(np.uint8))
    return image.convert(mode)


def _full_scale(highest: float) -> float:
    """White in an image of wide values: the usual scale that its brightest pixel fits into."""
    return next((top for top in (1.0, 255.0, 65535.0) if highest <= top), highest)

"""Reading an image file of any kind as 8-bit colour, and finding those that cannot be read.

Needs Pillow and numpy only.
"""

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dn_detr.data.categories import DatasetError
from dn_detr.data.findings import Finding, show, show_path

_ORIENTATION = 274  # the EXIF tag
_SIXTEEN_TO_EIGHT = 257  # 65535 / 255: a byte b is stored as b * 257 in 16 bits

READ_ERROR = "images that cannot be read"
SIZE_ERROR = "images of another size than 'width' and 'height' say (as seen, after EXIF)"


class ImageError(ValueError):
    """An image file that cannot be read; the message says why, and not which."""


def read_image(path: str) -> tuple[np.ndarray, int]:
    """Reads an image, turned as its EXIF orientation says.

    Grayscale, palette, CMYK and other modes become RGB, transparency is left out. 16-bit grayscale
    is scaled to 8 bits, ``v // 257``, by the full range of 0..65535 and not that of the image, so
    that equal values look equal in all images; Pillow's own conversion would cut at 255.

    Args:
        path: a file of any kind that Pillow knows; of several frames, the first.

    Returns:
        uint8 [H, W, 3], RGB, writable; and the EXIF orientation, 1 (upright) to 8.

    Raises:
        ImageError: the file is missing, empty, no image, truncated, larger than
            ``PIL.Image.MAX_IMAGE_PIXELS`` allows, or of numbers without a known range.
    """
    try:
        if os.path.getsize(path) == 0:
            raise ImageError("the file is empty (0 bytes)")
        with Image.open(path) as image:
            orientation = _orientation(image)
            if orientation != 1:
                image = ImageOps.exif_transpose(image)
            return _to_rgb(image), orientation
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"it is not an image ({_beginning(path)})") from error
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"{error} Scale it down, or raise PIL.Image.MAX_IMAGE_PIXELS if it is sound."
        ) from error
    except (OSError, SyntaxError, ValueError, EOFError, OverflowError) as error:
        # Pillow raises SyntaxError and ValueError for some broken files.
        raise ImageError(str(error)) from error


def _beginning(path: str) -> str:
    with open(path, "rb") as file:
        return f"it begins with {file.read(16)!r}"


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # broken EXIF of a sound image, whatever Pillow makes of it
        return 1
    return orientation if orientation in range(1, 9) else 1


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode == "F":
        raise ImageError(
            "it holds floating-point numbers, whose range nobody states: save it with 8 or 16 bits"
        )
    if image.mode.startswith("I"):  # I;16 in several byte orders; I: 32 bits, with 16 used
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(
                f"it holds integers of {values.min()} to {values.max()}, and 0 to 65535 can be "
                "scaled: save it with 8 or 16 bits"
            )
        gray = (values // _SIXTEEN_TO_EIGHT).astype(np.uint8)
        return np.repeat(gray[:, :, None], 3, axis=2)
    if image.mode == "P":  # by way of RGBA: Pillow warns where a palette has transparency
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))  # a copy: Pillow's own memory cannot be written to


def size_error(size: tuple[int, int], expected: tuple[int, int], orientation: int) -> str | None:
    """Says how an image differs from its entry, None if it does not.

    Args:
        size: (width, height) as seen, after ``orientation`` was applied.
        expected: (width, height) of the annotation file.
        orientation: of EXIF.
    """
    if tuple(size) == tuple(expected):
        return None
    turned = f"after its EXIF orientation {orientation}" if orientation != 1 else "no EXIF rotation"
    return (
        f"{size[0]}x{size[1]} (width x height, {turned}), but the annotation file says "
        f"{expected[0]}x{expected[1]}"
    )


def open_images(entries: Sequence[dict[str, Any]], root: str, workers: int = 0) -> list[Finding]:
    """Opens and decodes every image, with a progress bar on stderr.

    Args:
        entries: ``id``, ``file_name``, ``width`` and ``height`` of each image.
        root: the folder that the file names are relative to.
        workers: number of processes; 0: this one.

    Returns:
        What is wrong with them: images that cannot be read, that are not of the size that their
        entry says, or that Pillow takes for a decompression bomb (a warning between once and twice
        its limit).

    Raises:
        DatasetError: a worker process was ended from outside.
    """
    root = os.path.expanduser(root)
    unreadable, resized, huge = [], [], []
    for (error, difference, warning), entry in zip(_opened(entries, root, workers), entries):
        name = f"{show_path(entry['file_name'])} (id {show(entry['id'])})"
        if error:
            unreadable.append(f"{name}: {error}")
        if difference:
            resized.append(f"{name} is {difference}")
        if warning:
            huge.append(f"{name}: {warning}")
    findings = [
        Finding(READ_ERROR, unreadable),
        Finding(SIZE_ERROR, resized),
        Finding("very large images, which cost much memory", huge, "warning"),
    ]
    return [finding for finding in findings if finding.culprits]


def _opened(
    entries: Sequence[dict[str, Any]], root: str, workers: int
) -> Iterator[tuple[str | None, str | None, str | None]]:
    from tqdm import tqdm  # needed here only

    def progress(results: Iterable[Any]) -> Iterator[Any]:
        yield from tqdm(results, total=len(entries), desc="opening images", unit="image")

    look = partial(_look_at, root)
    if workers == 0:
        yield from progress(map(look, entries))
        return
    small = [{k: e[k] for k in ("file_name", "width", "height")} for e in entries]
    try:
        with ProcessPoolExecutor(workers) as pool:
            yield from progress(pool.map(look, small, chunksize=16))
    except BrokenProcessPool as error:
        raise DatasetError(
            "A process that opens images was ended from outside, likely for want of memory: "
            f"try fewer than --workers {workers}"
        ) from error


def _look_at(root: str, entry: dict[str, Any]) -> tuple[str | None, str | None, str | None]:
    """Why an image cannot be read, how its size differs, and what Pillow warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", Image.DecompressionBombWarning)
        try:
            image, orientation = read_image(os.path.join(root, entry["file_name"]))
        except ImageError as error:
            return str(error), None, None
    size = image.shape[1], image.shape[0]
    warning = str(caught[0].message) if caught else None
    return None, size_error(size, (entry["width"], entry["height"]), orientation), warning

"""Somebody's picture, read as the training images were. Bounded in bytes, pixels and kinds."""

import contextlib
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile

from tinylab.exceptions import UserError
from tinylab.files import printable
from tinylab.recipe import SIZE

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # Pillow's other readers have more faults
SMALLEST = 8  # pixels on the shorter side below which there is nothing to see
MOST_BYTES = 256 * 1024 * 1024
MOST_PIXELS = 128_000_000  # of any picture: phones make JPEGs of 108 million
MOST_HELD = 64_000_000  # pixels decoded into memory; a plain JPEG is shrunk in decoding

KNOWN = {
    "a HEIC picture": (b"ftypheic", b"ftypheix", b"ftyphevc", b"ftypmif1", b"ftypmsf1"),
    "an AVIF picture": (b"ftypavif", b"ftypavis"),
    "a TIFF picture": (b"II*\0", b"MM\0*"),
    "a PDF document": (b"%PDF",),
    "a drawing or a text (SVG, XML), not pixels": (b"<svg", b"<?xml", b"<!DOCTYPE svg"),
    "a web page": (b"<!DOCTYPE html", b"<!doctype html", b"<html"),
}
"""How files begin that people take for pictures that can be read; ftyp after four bytes of size."""


def read_image(path: Path) -> np.ndarray:
    """Return the picture in a file as uint8 (64, 64, 3) RGB.

    * It is turned upright as its EXIF orientation says.
    * Its middle square is scaled to 64 x 64 by area, so that nothing aliases; smaller pictures are
      enlarged bilinearly. How Tiny ImageNet's makers did it is not documented, but its boxes touch
      the left edge more often (39 %) than the upper one (22 %): wide pictures were cut.
    * Transparent parts become white; what colour lies under them is chance.
    * Grey, palette and CMYK become RGB, 16 bits become 8; colour profiles are ignored, as they were
      in the training images. Of an animation the first picture is taken.

    One of the data set's own files gives the very pixels that were trained on. A large JPEG is
    shrunk while it is decoded, to no less than 512 pixels on its shorter side. Of a JPEG that is
    cut short the rest is grey, as browsers show it; that is a `UserWarning`.
    """
    name = printable(path)
    if not path.is_file():
        problem = "is a folder: name the pictures in it" if path.is_dir() else "does not exist"
        raise UserError(f"{name} {problem}")
    if (size := path.stat().st_size) == 0:
        raise UserError(f"{name} is empty: get a whole copy")
    if size > MOST_BYTES:
        raise UserError(f"{name} has more than {MOST_BYTES:,} bytes: make it smaller")
    most = f"more than {MOST_HELD // 10**6} million pixels"
    too_large = f"{name} is too large: {most}; make it smaller"
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as image:
            if min(image.size) < SMALLEST:
                size = f"{image.width:,} x {image.height:,} pixels"
                raise UserError(f"{name} has {size}: at least {SMALLEST} on each side are needed")
            every = image.width * image.height
            if image.format in ("JPEG", "MPO"):
                image.draft(None, (8 * SIZE, 8 * SIZE))
            # All of a progressive JPEG is held until its last byte, whatever size is asked for.
            held = every if image.info.get("progressive") else image.width * image.height
            if every > MOST_PIXELS or held > MOST_HELD:
                raise UserError(too_large)
            try:
                return upright_square(image)
            except OSError as error:
                if image.format not in ("JPEG", "MPO") or "truncated" not in str(error):
                    raise
        with Image.open(path, formats=FORMATS) as image, completed():
            whole = upright_square(image)
        warnings.warn(f"{name} is cut short: what is missing is grey", stacklevel=2)
        return whole
    except UserError:
        raise
    except (Image.DecompressionBombError, MemoryError) as error:
        raise UserError(too_large) from error
    except Image.UnidentifiedImageError as error:
        raise UserError(f"{name} {what_it_is(path)}: save it as JPEG, PNG or WebP") from error
    except Exception as error:  # Pillow raises many kinds for broken files, SyntaxError among them
        if getattr(error, "errno", None) is not None:
            raise UserError(f"{name} cannot be read: {error.strerror}") from error
        raise UserError(f"{name} is a damaged picture, or cut short: get a whole copy") from error


@contextlib.contextmanager
def completed() -> Iterator[None]:
    """Have Pillow fill what a file lacks at its end."""
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, True
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def upright_square(image: Image.Image) -> np.ndarray:
    """Return the opened picture upright, its middle square, uint8 (64, 64, 3) RGB."""
    hidden = image.info.get("transparency")  # a PNG's transparent colour, or a palette's opacities
    coded = re.search(r";(\d+)", str(image.tile[0][3])) if image.format == "PNG" else None
    bits = int(coded[1]) if coded else 8
    image.load()
    orientation = 1
    with contextlib.suppress(Exception):  # the EXIF is damaged; the picture may be sound
        orientation = image.getexif().get(0x0112, 1)
    mirrored, upside_down = orientation in (2, 3, 7, 8), orientation in (3, 4, 6, 7)
    transposed = orientation in (5, 6, 7, 8)

    # Of an odd rest the larger half is cut off at the right or below once the picture is upright,
    # so that equal pictures stay equal whichever way they are stored.
    width, height = image.size
    side = min(width, height)
    left, upper = (width - side + mirrored) // 2, (height - side + upside_down) // 2
    square = (left, upper, left + side, upper + side)

    # Pillow compares that colour, as the file has it, with pixels that it has made 8 bits of.
    if image.mode == "RGB" and bits == 16 and hidden is not None:
        image.info["transparency"] = tuple(value >> 8 for value in hidden)
    elif image.mode == "L" and bits < 8 and hidden is not None:
        image.info["transparency"] = hidden * 255 // (2**bits - 1)
    if image.mode.startswith("I"):  # 16 bits of grey
        values = np.asarray(image)
        grey = np.where(values == hidden, 255, values >> 8)
        image = Image.fromarray(grey.astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
    elif image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    if image.size != (SIZE, SIZE):
        way = Image.Resampling.BOX if side > SIZE else Image.Resampling.BILINEAR
        image = image.resize((SIZE, SIZE), way, square)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)

    pixels = np.asarray(image.convert("RGB"))
    pixels = pixels[:: -1 if upside_down else 1, :: -1 if mirrored else 1]
    return np.ascontiguousarray(pixels.swapaxes(0, 1) if transposed else pixels)


def what_it_is(path: Path) -> str:
    """Return what the first bytes of a file say that Pillow does not know."""
    with open(path, "rb") as file:
        head = file.read(64).removeprefix(b"\xef\xbb\xbf")
    for kind, beginnings in KNOWN.items():
        if head.lstrip().startswith(beginnings) or head[4:].startswith(beginnings):
            return f"is {kind}, which cannot be read"
    return "is not a picture, or of a kind that cannot be read, or damaged"

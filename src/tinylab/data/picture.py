"""A picture as the network sees it, in training and after. Bounded in bytes, pixels and kinds."""

import contextlib
import io
import re
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile

from tinylab.exceptions import UserError
from tinylab.files import printable
from tinylab.recipe import SIZE

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # Pillow's other readers have more faults
MOST_BYTES = 256 * 1024 * 1024
MOST_HELD = 64_000_000  # pixels decoded into memory; a plain JPEG is shrunk in decoding

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # by EXIF orientation  # fmt: skip
KNOWN = {
    "a HEIC or AVIF picture": rb"....ftyp(he[iv]|mif1|msf1|avi)",
    "a TIFF picture": rb"II\*\0|MM\0\*", "a PDF document": b"%PDF",
    "a web page or a drawing (SVG), not pixels": rb"(\xef\xbb\xbf)?\s*<",
}  # how files begin that people take for pictures  # fmt: skip


def read_image(path: Path) -> np.ndarray:
    """Return the picture in a file as uint8 (64, 64, 3) RGB.

    As `decode` has it, but of a JPEG that is cut short the rest is grey, as browsers show it; that
    is a `UserWarning`.
    """
    name = printable(path)
    try:
        with open(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}") from error
    with warnings.catch_warnings(action="ignore"):
        try:
            return decode(content, name)
        except UserError as error:
            if not (content[:2] == b"\xff\xd8" and "truncated" in str(error.__cause__)):
                raise
        ImageFile.LOAD_TRUNCATED_IMAGES = True
        try:
            whole = decode(content, name)
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = False
    warnings.warn(f"{name} is cut short: what is missing is grey", stacklevel=2)
    return whole


def decode(content: bytes, name: str) -> np.ndarray:
    """Return the picture that a file's bytes hold as uint8 (64, 64, 3) RGB.

    * It is turned upright as its EXIF orientation says.
    * Its middle square is scaled to 64 x 64 by area, so that nothing aliases; smaller pictures are
      enlarged bilinearly. How Tiny ImageNet's makers did it is not documented, but its boxes touch
      the left edge more often (39 %) than the upper one (22 %): wide pictures were cut.
    * Transparent parts become white; what colour lies under them is chance.
    * Grey, palette and CMYK become RGB, 16 bits become 8; colour profiles are ignored. Of an
      animation the first picture is taken.

    The data set's own files go through unchanged. A large JPEG is shrunk while it is decoded, to no
    less than 512 pixels on its shorter side. Raise `UserError` with `name` for all else.
    """
    if len(content) > MOST_BYTES:
        raise UserError(f"{name} has more than {MOST_BYTES:,} bytes: make it smaller")
    too_large = f"{name} is too large: more than 64 million pixels; make it smaller"
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        every = image.width * image.height
        if image.format in ("JPEG", "MPO"):
            image.draft(None, (8 * SIZE, 8 * SIZE))
        # All of a progressive JPEG is held until its last byte, whatever size is asked for.
        held = every if image.info.get("progressive") else image.width * image.height
        if held > MOST_HELD:
            raise UserError(too_large)

        # ---- upright ----
        hidden = image.info.get("transparency")  # a PNG's transparent colour, a palette's opacities
        coded = re.search(r";(\d+)", str(image.tile[0][3])) if image.format == "PNG" else None
        bits = int(coded[1]) if coded else 8
        image.load()
        with contextlib.suppress(Exception):  # it has no EXIF, or a damaged one
            image = image.transpose(UPRIGHT[image.getexif()[0x0112]])

        # ---- RGB: Pillow compares `hidden`, as the file has it, with pixels made 8 bits ----
        if image.mode == "RGB" and bits == 16 and hidden is not None:
            image.info["transparency"] = tuple(value >> 8 for value in hidden)
        elif image.mode == "L" and bits < 8 and hidden is not None:
            image.info["transparency"] = hidden * 255 // (2**bits - 1)
        if image.mode.startswith("I"):  # 16 bits of grey
            values = np.asarray(image)
            image = Image.fromarray(np.where(values == hidden, 255, values >> 8).astype(np.uint8))
        elif image.has_transparency_data:
            image = image.convert("RGBA")
        elif image.mode not in ("L", "RGB"):
            image = image.convert("RGB")

        # ---- 64 x 64 ----
        if image.size != (SIZE, SIZE):
            side = min(image.size)
            left, upper = (image.width - side) // 2, (image.height - side) // 2
            way = Image.Resampling.BOX if side > SIZE else Image.Resampling.BILINEAR
            image = image.resize((SIZE, SIZE), way, (left, upper, left + side, upper + side))
        if image.mode == "RGBA":
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.asarray(image.convert("RGB"))
    except UserError:
        raise
    except (Image.DecompressionBombError, MemoryError) as error:
        raise UserError(too_large) from error
    except Image.UnidentifiedImageError as error:
        found = (kind for kind, start in KNOWN.items() if re.match(start, content, re.S))
        what = f"{next(found, 'not a picture, or damaged, or of a kind')}, which cannot be read"
        raise UserError(f"{name} is {what}: save it as JPEG, PNG or WebP") from error
    except Exception as error:  # Pillow raises many kinds for broken files, SyntaxError among them
        raise UserError(f"{name} is a damaged picture, or cut short: get a whole copy") from error

"""Pictures of every kind are read as the data set was, or refused in one line."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from reliability.archives import real_archive

from tinylab.data import picture
from tinylab.data.archive import Archive
from tinylab.data.picture import read_image
from tinylab.exceptions import UserError

TILES = np.array([[[200, 30, 10], [20, 180, 40]], [[15, 25, 210], [240, 230, 60]]], np.uint8)
"""Four colours: what was turned, mirrored or cropped shows."""


def tiles(width: int = 64, height: int = 64) -> Image.Image:
    return Image.fromarray(TILES).resize((width, height), Image.Resampling.NEAREST)


def saved(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


def corners(pixels: np.ndarray) -> np.ndarray:
    """Return the colours in the middle of the four quarters, as `TILES` has them."""
    return pixels[np.ix_([16, 48], [16, 48])].astype(int)


@pytest.mark.parametrize("size", [(64, 64), (640, 640), (200, 128), (128, 200), (20, 20)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_every_kind_and_size_gives_the_middle_square(
    tmp_path: Path, kind: str, size: tuple[int, int]
) -> None:
    side = min(size)
    canvas = Image.new("RGB", size, "black")
    canvas.paste(tiles(side, side), ((size[0] - side) // 2, (size[1] - side) // 2))
    pixels = read_image(saved(tmp_path / "x", canvas, format=kind))
    assert (pixels.shape, pixels.dtype) == ((64, 64, 3), np.uint8)
    assert np.abs(corners(pixels) - TILES).max() < 60  # GIF has a palette, JPEG and WebP lose some


def test_a_picture_of_64_pixels_goes_through_unchanged(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = saved(tmp_path / "x.png", Image.fromarray(noise))
    np.testing.assert_array_equal(read_image(path), noise)


def test_scaling_is_by_area(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    means = noise.reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
    pixels = read_image(saved(tmp_path / "x.png", Image.fromarray(noise)))
    assert np.abs(pixels - means).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_upright(tmp_path: Path, orientation: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (100, 131, 3), dtype=np.uint8)
    upright = Image.fromarray(noise)
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / "x.png", stored, exif=exif)
    expected = read_image(saved(tmp_path / "upright.png", upright))
    np.testing.assert_array_equal(read_image(path), expected)


def test_other_modes_become_rgb(tmp_path: Path) -> None:
    grey = Image.fromarray((np.arange(64 * 64).reshape(64, 64) % 256).astype(np.uint8))
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    expected = np.repeat(np.asarray(grey)[:, :, None], 3, axis=2)
    for name, image in {"grey.png": grey, "deep.png": deep}.items():
        np.testing.assert_array_equal(read_image(saved(tmp_path / name, image)), expected)
    clear = Image.new("RGBA", (64, 64), (10, 20, 30, 0))
    assert (read_image(saved(tmp_path / "clear.png", clear)) == 255).all()
    half = Image.new("RGBA", (64, 64), (0, 0, 0, 128))
    assert abs(int(read_image(saved(tmp_path / "half.png", half))[0, 0, 0]) - 127) <= 1
    cmyk = saved(tmp_path / "cmyk.jpg", tiles().convert("CMYK"), quality=100)
    assert np.abs(corners(read_image(cmyk)) - TILES).max() < 20
    palette = saved(tmp_path / "palette.png", tiles().quantize(4))
    np.testing.assert_array_equal(corners(read_image(palette)), TILES)


def png(width: int, height: int, depth: int, kind: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """Return a PNG file of a bit depth and a colour type, with these chunks."""
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for name, data in ((b"IHDR", header), *chunks, (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + name + data
        content += struct.pack(">I", zlib.crc32(name + data))
    return content


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("kind", [0, 2])
def test_a_transparent_colour_is_white_whatever_the_depth(
    tmp_path: Path, depth: int, kind: int
) -> None:
    """Kind 0 is grey, 2 is RGB, which has 8 or 16 bits. The left half has the colour."""
    if kind == 2 and depth < 8:
        return
    highest, channels = 2**depth - 1, 3 if kind == 2 else 1
    for hidden in {0, highest // 3, highest // 2, highest}:
        other = 0 if hidden > highest // 2 else highest
        row = [hidden] * 32 * channels + [other] * 32 * channels
        bits = "".join(f"{value:0{depth}b}" for value in row)
        line = b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big")
        transparent = (b"tRNS", struct.pack(">H", hidden) * channels)
        data = (b"IDAT", zlib.compress(line * 64))
        (tmp_path / "x.png").write_bytes(png(64, 64, depth, kind, transparent, data))
        image = read_image(tmp_path / "x.png")
        assert (image[:, :32] == 255).all(), hidden
        assert (image[:, 32:] == (255 if other else 0)).all(), hidden


def test_of_a_jpeg_that_is_cut_short_the_rest_is_read(tmp_path: Path) -> None:
    whole = encoded(tiles(200, 200))
    (tmp_path / "whole.jpg").write_bytes(whole)
    (tmp_path / "cut.jpg").write_bytes(whole[:-2])  # the mark of its end
    with pytest.warns(UserWarning, match=r"cut\.jpg is cut short: what is missing is grey"):
        image = read_image(tmp_path / "cut.jpg")
    assert np.array_equal(image, read_image(tmp_path / "whole.jpg"))


def encoded(image: Image.Image, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


REFUSED = {
    "empty": (b"", "is not a picture, or damaged"),
    "text": (b"hello", "is not a picture"),
    "page": (b"\xef\xbb\xbf <!DOCTYPE html><p>", "is a web page"),
    "heic": (b"\0\0\0\x18ftypheic", "is a HEIC or AVIF picture"),
    "tiff": (encoded(tiles(), "TIFF"), "is a TIFF picture"),
    "cut": (encoded(tiles(400, 400), "PNG")[:-60], "is a damaged picture, or cut short"),
    "bomb": (png(60_000, 60_000, 8, 2, (b"IDAT", b"")), "is too large"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_picture_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    content, expected = REFUSED[case]
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(UserError, match=expected) as caught:
        read_image(tmp_path / "x")
    assert len(str(caught.value).splitlines()) == 1


def test_folders_missing_files_and_large_ones_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="Is a directory"):
        read_image(tmp_path)
    with pytest.raises(UserError, match="No such file"):
        read_image(tmp_path / "nothing.png")
    monkeypatch.setattr(picture, "MOST_BYTES", 10)
    with pytest.raises(UserError, match="more than 10 bytes"):
        read_image(saved(tmp_path / "x.png", tiles()))


@pytest.mark.archive
@pytest.mark.skipif(real_archive() is None, reason="needs the real archive")
def test_the_data_sets_own_files_give_the_pixels_that_were_trained_on(
    tmp_path: Path, real_dataset
) -> None:
    archive = Archive(real_archive())
    for row in range(0, len(archive.files), 997):
        (tmp_path / "x.jpg").write_bytes(archive.read(archive.files[row].path))
        pixels = read_image(tmp_path / "x.jpg")
        np.testing.assert_array_equal(pixels, real_dataset.images[row])

"""Pictures of every kind are read as the data set was, or refused in one line; exports answer as the network does."""

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import struct
import warnings
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from PIL import Image, ImageCms, PngImagePlugin
from torch import nn

from tinylab.data.archive import open_archive
from tinylab.data.augment import normalise, resize
from tinylab.data.dataset import Dataset
from tinylab.exceptions import UserError
from tinylab.model import ResNet18
from tinylab.recipe import Recipe
from tinylab.recipes import published, smoke
from tinylab.run.folder import Run
from tinylab.run.weights import weights_file
from tinylab.share import predict as module
from tinylab.share.predict import export_onnx, load, normalised, predict, read_image

WNIDS, NAMES = tuple(f"n{i:08d}" for i in range(6)), ("one", "two", "three", "four", "five", "six")
TILES = np.array([[[200, 30, 10], [20, 180, 40]], [[15, 25, 210], [240, 230, 60]]], np.uint8)
"""Four colours: what was turned, mirrored or cropped shows."""


def tiles(width: int = 64, height: int = 64) -> Image.Image:
    """Four tiles of one colour each."""
    return Image.fromarray(TILES).resize((width, height), Image.Resampling.NEAREST)


def noise(width: int = 64, height: int = 64, seed: int = 0) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


def saved(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


def corners(pixels: np.ndarray) -> np.ndarray:
    """The colours in the middle of the four quarters, as `TILES` has them."""
    return pixels[np.ix_([16, 48], [16, 48])].astype(int)


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_image(path)
    line = str(caught.value)
    assert len(line.splitlines()) == 1
    assert path.name in line or str(path) in line
    return line


# --- Pictures that are read -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "bmp", "webp"])
def test_pictures_of_64_pixels_go_through_unchanged(tmp_path: Path, suffix: str) -> None:
    path = saved(
        tmp_path / f"a.{suffix}", noise(), **({"lossless": True} if suffix == "webp" else {})
    )
    pixels = read_image(path)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, np.asarray(noise()))


@pytest.mark.archive
def test_the_data_set_s_own_files_give_the_pixels_that_were_trained_on(
    real_dataset: Dataset, repository: Path, tmp_path: Path
) -> None:
    source = Path(os.environ.get("TINY_IMAGENET") or repository / "data" / "tiny-imagenet-200.zip")
    if not source.exists():
        pytest.skip("the prepared arrays are here, their archive is not")
    grey = 0
    with open_archive(source) as archive:
        for row in np.random.default_rng(0).choice(len(real_dataset), 300, replace=False):
            jpeg = archive.members.read(archive.files[row].path)
            (tmp_path / "a.JPEG").write_bytes(jpeg)
            grey += Image.open(io.BytesIO(jpeg)).mode == "L"
            np.testing.assert_array_equal(read_image(tmp_path / "a.JPEG"), real_dataset.images[row])
    assert grey  # they are among them


def test_every_new_pixel_is_the_mean_of_those_that_it_covers(tmp_path: Path) -> None:
    pixels = read_image(saved(tmp_path / "a.png", noise(640, 640))).astype(int)
    means = np.asarray(noise(640, 640)).reshape(64, 10, 64, 10, 3).mean(axis=(1, 3))
    assert np.abs(pixels - means).max() <= 1


@pytest.mark.parametrize(
    "size", [(192, 128), (128, 192), (4001, 100), (100, 4001), (20_000, 64), (65, 64)]
)
def test_the_middle_square_is_kept(tmp_path: Path, size: tuple[int, int]) -> None:
    side, image = min(size), Image.new("RGB", size, (255, 0, 0))
    image.paste(tiles(side, side), ((size[0] - side) // 2, (size[1] - side) // 2))
    pixels = read_image(saved(tmp_path / "a.png", image))
    np.testing.assert_array_equal(corners(pixels), TILES)
    expected = tiles(side, side).resize((64, 64), Image.Resampling.BOX)
    np.testing.assert_array_equal(pixels, np.asarray(expected))


def test_small_pictures_are_enlarged(tmp_path: Path) -> None:
    pixels = read_image(saved(tmp_path / "a.png", tiles(8, 8)))
    assert pixels.shape == (64, 64, 3)
    np.testing.assert_array_equal(corners(pixels), TILES)


@pytest.mark.parametrize(
    "size", [(64, 64), (97, 64), (64, 97), (193, 128), (131, 200), (1200, 1601)]
)
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_pictures_are_turned_upright(tmp_path: Path, size: tuple[int, int], suffix: str) -> None:
    image = tiles(*size)
    stored = {
        1: image,
        2: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: image.transpose(Image.Transpose.ROTATE_180),
        4: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: image.transpose(Image.Transpose.TRANSPOSE),
        6: image.transpose(Image.Transpose.ROTATE_90),
        7: image.transpose(Image.Transpose.TRANSVERSE),
        8: image.transpose(Image.Transpose.ROTATE_270),
    }
    # A JPEG's blocks lie differently in a turned picture; of a side that is no multiple of 64 pixels are shared out.
    exact = suffix != "jpg" and min(size) % 64 == 0
    upright = read_image(
        saved(tmp_path / f"a.{suffix}", image, **({"lossless": True} if suffix == "webp" else {}))
    )
    for orientation, turned in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = {"exif": exif, "quality": 95} | ({"lossless": True} if suffix == "webp" else {})
        pixels = read_image(saved(tmp_path / f"{orientation}.{suffix}", turned, **options))
        difference = np.abs(pixels.astype(int) - upright)
        assert difference.max() == 0 if exact else difference.mean() < 2, orientation
        assert np.abs(corners(pixels) - TILES).max() < 12, orientation


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_an_orientation_that_does_not_exist_is_none(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(
        read_image(saved(tmp_path / "a.png", noise(), exif=exif)), np.asarray(noise())
    )


def test_damaged_exif_is_none(tmp_path: Path) -> None:
    for exif in (
        b"Exif\0\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12",
        b"x" * 50,
    ):
        path = saved(tmp_path / "a.jpg", tiles(), exif=exif, quality=95)
        assert np.abs(corners(read_image(path)) - TILES).max() < 12


def test_transparent_parts_are_white(tmp_path: Path) -> None:
    image = tiles().convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 32, 32))  # black, but nothing of it is seen
    image.paste((20, 180, 40, 128), (32, 0, 64, 32))
    expected = TILES.astype(float)
    expected[0, 0] = 255
    expected[0, 1] = (expected[0, 1] * 128 + 255 * 127) / 255
    for name, options in (("a.png", {}), ("a.webp", {"lossless": True, "exact": True})):
        found = corners(read_image(saved(tmp_path / name, image, **options)))
        assert np.abs(found - expected).max() <= 1
    large = image.resize((640, 640), Image.Resampling.NEAREST)
    assert np.abs(corners(read_image(saved(tmp_path / "b.png", large))) - expected).max() <= 1


def test_the_colour_under_transparent_pixels_is_not_mixed_in(tmp_path: Path) -> None:
    stripes = np.zeros((128, 128, 4), np.uint8)
    stripes[:, ::2] = (
        0,
        200,
        0,
        255,
    )  # every other column opaque green, the others black and not there
    pixels = read_image(saved(tmp_path / "a.png", Image.fromarray(stripes)))
    assert np.abs(pixels[32, 32].astype(int) - [127, 227, 127]).max() <= 1  # half green, half white


def test_opaque_pictures_with_alpha_are_unchanged(tmp_path: Path) -> None:
    image = noise()
    image.putalpha(255)
    np.testing.assert_array_equal(read_image(saved(tmp_path / "a.png", image)), np.asarray(noise()))


def test_grey_with_alpha(tmp_path: Path) -> None:
    values = np.zeros((64, 64, 2), np.uint8)
    values[:, 32:] = 90, 255
    pixels = read_image(saved(tmp_path / "a.png", Image.fromarray(values, "LA")))
    assert pixels[10, 10].tolist() == [255] * 3
    assert pixels[10, 50].tolist() == [90] * 3


def test_palettes_with_and_without_transparency(tmp_path: Path) -> None:
    image = tiles().quantize(4)
    index = image.getpixel((16, 16))
    for name in ("a.png", "a.gif"):
        np.testing.assert_array_equal(corners(read_image(saved(tmp_path / name, image))), TILES)
        found = corners(read_image(saved(tmp_path / f"b{name}", image, transparency=index)))
        assert found[0, 0].tolist() == [255, 255, 255]
        np.testing.assert_array_equal(found[1], TILES[1])


def test_a_colour_that_stands_for_transparent(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", tiles(), transparency=tuple(TILES[0, 0].tolist()))
    assert corners(read_image(path))[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("mode", ["1", "L"])
def test_grey_and_black_and_white(tmp_path: Path, mode: str) -> None:
    image = tiles().convert(mode)
    pixels = read_image(saved(tmp_path / "a.png", image))
    np.testing.assert_array_equal(pixels, np.asarray(image.convert("RGB")))
    assert len(np.unique(pixels)) > 1


def test_16_bits_of_grey_are_scaled_not_clipped(tmp_path: Path) -> None:
    ramp = np.repeat(np.linspace(0, 65535, 64).astype(np.uint16)[None], 64, axis=0)
    pixels = read_image(saved(tmp_path / "a.png", Image.fromarray(ramp)))
    np.testing.assert_array_equal(pixels, np.repeat((ramp >> 8)[..., None], 3, axis=2))
    large = read_image(saved(tmp_path / "b.png", Image.fromarray(ramp.repeat(4, 0).repeat(4, 1))))
    np.testing.assert_array_equal(large, pixels)


@pytest.mark.parametrize(("channels", "kind"), [(3, 2), (4, 6)])
def test_16_bits_of_colour_are_scaled_not_clipped(tmp_path: Path, channels: int, kind: int) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (64, 64, channels))
    values[..., 3:] = 65535
    path = tmp_path / "a.png"
    path.write_bytes(
        png(
            64,
            64,
            b"".join(b"\0" + row.astype(">u2").tobytes() for row in values),
            depth=16,
            kind=kind,
        )
    )
    np.testing.assert_array_equal(read_image(path), values[..., :3] >> 8)


def test_cmyk_is_read_as_the_data_set_would_be(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.jpg", tiles().convert("CMYK"), quality=95)
    pixels = read_image(path)
    np.testing.assert_array_equal(pixels, np.asarray(Image.open(path).convert("RGB")))
    assert np.abs(corners(pixels) - TILES).max() < 15


def test_progressive_jpegs_and_profiles_change_nothing(tmp_path: Path) -> None:
    plain = read_image(saved(tmp_path / "a.jpg", tiles(), quality=90))
    np.testing.assert_array_equal(
        read_image(saved(tmp_path / "b.jpg", tiles(), quality=90, progressive=True)), plain
    )
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for icc in (profile, b"no profile at all"):
        path = saved(tmp_path / "c.jpg", tiles(), quality=90, icc_profile=icc)
        np.testing.assert_array_equal(read_image(path), plain)


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_of_an_animation_the_first_picture_is_taken(tmp_path: Path, name: str) -> None:
    others = [Image.new("RGB", (128, 128), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if name == "a.webp" else {}
    path = saved(
        tmp_path / name,
        tiles(128, 128),
        save_all=True,
        append_images=others,
        duration=50,
        **options,
    )
    assert Image.open(path).n_frames == 3
    np.testing.assert_array_equal(corners(read_image(path)), TILES)


def test_a_telephone_s_file_of_several_pictures(tmp_path: Path) -> None:
    path = saved(
        tmp_path / "a.jpg",
        tiles(1024, 1024),
        format="MPO",
        save_all=True,
        append_images=[noise(64, 64)],
    )
    assert Image.open(path).format == "MPO"
    assert np.abs(corners(read_image(path)) - TILES).max() < 12


def test_the_name_does_not_matter(tmp_path: Path) -> None:
    path = saved(tmp_path / "ünïcode picture.txt", noise(), format="PNG")
    np.testing.assert_array_equal(read_image(str(path)), np.asarray(noise()))


@pytest.mark.parametrize("progressive", [False, True])
def test_large_jpegs_are_shrunk_while_they_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, progressive: bool
) -> None:
    # Smooth, as photographs are at this size: white noise would lose its highest frequencies twice.
    image = noise(60, 40).resize((3000, 2000), Image.Resampling.BICUBIC)
    path = saved(tmp_path / "a.jpg", image, quality=90, progressive=progressive)
    decoded = []
    real = module._prepared
    monkeypatch.setattr(
        module, "_prepared", lambda opened: (decoded.append(opened.size), real(opened))[1]
    )
    pixels = read_image(path).astype(int)
    assert decoded == [(1500, 1000)]
    whole = Image.open(path).resize((64, 64), Image.Resampling.BOX, box=(500, 0, 2500, 2000))
    difference = np.abs(pixels - np.asarray(whole))
    assert difference.max() <= 6
    assert difference.mean() <= 1


# --- Pictures that are refused ----------------------------------------------------------------------------------------


def png(width: int, height: int, raw: bytes, depth: int = 8, kind: int = 2) -> bytes:
    """A PNG file of any size and content, made by hand."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(raw))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"hello, I am a picture", "is not a picture"),
        (os.urandom(5000), "is not a picture"),
        (b"\0" * 5000, "is not a picture"),
        (b"\xff\xd8\xff", "damaged"),
        (b"\x89PNG\r\n\x1a\n", "damaged"),
        (b"GIF89a", "damaged"),
        (b"RIFF\x10\0\0\0WEBPVP8 ", "damaged"),
        (b'<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"/>', "drawing"),
        (b'\xef\xbb\xbf  <?xml version="1.0"?><svg/>', "drawing"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 100, "HEIC"),
        (b"\0\0\0\x1cftypavif\0\0\0\0avifmif1" + b"\0" * 100, "AVIF"),
        (b"%PDF-1.7\n", "PDF"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n", "is not a picture"),
    ],
)
def test_what_is_no_picture_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    assert reason in refusal(path)


def test_kinds_that_are_not_read_are_named(tmp_path: Path) -> None:
    assert "TIFF" in refusal(saved(tmp_path / "a.tif", noise()))
    for suffix in ("ppm", "ico", "tga", "pcx", "sgi", "dds", "eps", "jp2"):
        assert "is not a picture, or of a kind that cannot be read" in refusal(
            saved(tmp_path / f"a.{suffix}", noise())
        )


@pytest.mark.parametrize("side", [100_000, 12_000, 2**31 - 1, 0])
def test_bombs_are_not_decoded(tmp_path: Path, side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_prepared", lambda _: pytest.fail("decoded"))
    path = tmp_path / "a.png"
    path.write_bytes(png(side, side, b"\0" * 1000))
    assert re.search("too large|damaged", refusal(path))


def test_bombs_of_other_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_prepared", lambda _: pytest.fail("decoded"))
    gif = bytearray(saved(tmp_path / "a.gif", tiles().quantize(4)).read_bytes())
    gif[6:10] = struct.pack("<HH", 65535, 65535)
    (tmp_path / "a.gif").write_bytes(gif)
    bmp = bytearray(saved(tmp_path / "a.bmp", tiles()).read_bytes())
    bmp[18:26] = struct.pack("<ii", 100_000, 100_000)
    (tmp_path / "a.bmp").write_bytes(bmp)
    for name, progressive in (("a.jpg", False), ("b.jpg", True)):
        jpg = bytearray(saved(tmp_path / name, tiles(), progressive=progressive).read_bytes())
        at = jpg.index(b"\xff\xc2" if progressive else b"\xff\xc0")
        # Held whole 81 million pixels are too many; a plain JPEG may have 128, and not the 170 million here.
        jpg[at + 5 : at + 9] = (
            struct.pack(">HH", 9000, 9000) if progressive else struct.pack(">HH", 13_000, 13_100)
        )
        (tmp_path / name).write_bytes(jpg)
    for name in ("a.gif", "a.bmp", "a.jpg", "b.jpg"):
        assert "too large" in refusal(tmp_path / name)


def test_a_plain_jpeg_may_have_more_pixels_than_are_held(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.jpg", Image.new("L", (10_000, 8_000), 90), quality=50)
    assert module.MOST_HELD < 80_000_000
    np.testing.assert_array_equal(read_image(path), 90)


def test_texts_that_unfold_without_end_are_refused(tmp_path: Path) -> None:
    texts = PngImagePlugin.PngInfo()
    texts.add_text("bomb", "a" * 50_000_000, zip=True)
    assert "damaged" in refusal(saved(tmp_path / "a.png", noise(), pnginfo=texts))


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 7)])
def test_pictures_of_hardly_any_pixel_are_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    assert "at least 8 on each side" in refusal(saved(tmp_path / "a.png", noise(*size)))


@pytest.mark.parametrize("options", [{"suffix": "jpg"}, {"suffix": "jpg", "progressive": True}, {"suffix": "png"},
                                     {"suffix": "webp"}, {"suffix": "gif"}, {"suffix": "bmp"}])  # fmt: skip
@pytest.mark.parametrize("side", [64, 700])
def test_what_was_cut_short_is_refused(tmp_path: Path, options: dict, side: int) -> None:
    suffix, others = (
        options["suffix"],
        {name: value for name, value in options.items() if name != "suffix"},
    )
    whole = saved(tmp_path / f"whole.{suffix}", noise(side, side), **others).read_bytes()
    path = tmp_path / f"a.{suffix}"
    for share in (0.02, 0.3, 0.6, 0.9):
        path.write_bytes(whole[: int(share * len(whole))])
        assert re.search("damaged|cut short", refusal(path)), share


def test_flipped_bits_give_a_picture_or_one_line(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for suffix in ("jpg", "png", "webp", "gif", "bmp"):
        whole = saved(tmp_path / f"whole.{suffix}", noise(80, 72)).read_bytes()
        for _ in range(60):
            content = bytearray(whole)
            # Half of the damage is in the head, where it tells of the form.
            end = len(content) if rng.random() < 0.5 else 200
            for compute in rng.integers(0, end, 3):
                content[compute] ^= 1 << int(rng.integers(8))
            path = tmp_path / f"a.{suffix}"
            path.write_bytes(content)
            try:
                assert read_image(path).shape == (64, 64, 3)
            except UserError as error:
                lines = str(error).splitlines()
                assert len(lines) == 1  # either outcome is right


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    assert "there is no file" in refusal(tmp_path / "missing.png")
    assert "is a folder" in refusal(tmp_path)
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    assert "cannot be read" in refusal(tmp_path / "loop.png")
    with pytest.raises(UserError, match="cannot be read: File name too long"):
        read_image(tmp_path / ("a" * 300))
    noise().save(tmp_path / "a.png")
    assert "cannot be read" in refusal(tmp_path / "a.png" / "b.png")
    with pytest.raises(UserError, match="not a name"):
        read_image("a\0.png")


@pytest.mark.timeout(20)
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_pipes_and_devices_do_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    assert "no regular file" in refusal(tmp_path / "pipe.png")
    for device in ("/dev/zero", "/dev/null", "/dev/stdin"):
        if Path(device).exists() and not Path(device).is_file():
            assert "no regular file" in refusal(Path(device))


def test_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "a.png", noise())
    path.chmod(0)
    if os.geteuid() == 0:  # may read everything: the refusal has to be made up

        def refuse(*_: object) -> None:
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(module, "open", refuse, raising=False)
    assert "cannot be read: Permission denied" in refusal(path)


def test_files_of_too_many_bytes(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", noise())
    with open(path, "r+b") as file:
        file.truncate(module.MOST_BYTES + 1)  # sparse: it takes no space
    assert "more than 268,435,456 bytes" in refusal(path)


def test_names_with_line_ends_stay_on_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_image(tmp_path / "a\nb\x1b[31m.png")
    assert str(caught.value).isprintable()


# --- Loading ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def network() -> ResNet18:
    return random_network(16)


def random_network(width: int) -> ResNet18:
    """Made-up weights and batch-norm statistics that do something, as after training."""
    torch.manual_seed(0)
    model = ResNet18(len(WNIDS), width)
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.uniform_(-0.2, 0.2)
                part.running_var.uniform_(0.5, 1.5)
                part.weight.uniform_(0.5, 1.5)
                part.bias.uniform_(-0.3, 0.3)
    return model.eval()


@pytest.fixture
def coloured() -> Recipe:
    """Another mean and std for every channel, so that none may be exchanged."""
    return replace(smoke(), width=16, mean=(0.48, 0.45, 0.4), std=(0.28, 0.27, 0.29))


def written(path: Path, model: ResNet18, recipe: Recipe, wnids: tuple[str, ...] = WNIDS) -> Path:
    path.write_bytes(
        weights_file(model, recipe, wnids, NAMES[: len(wnids)], {"test_top1": 50.0}, "c0" * 32)
    )
    return path


@pytest.fixture
def weights(tmp_path: Path, network: ResNet18, coloured: Recipe) -> Path:
    return written(tmp_path / "model.safetensors", network, coloured)


def altered(path: Path, **metadata: object) -> Path:
    """The weights file at `path`, other metadata in it."""
    with safetensors.safe_open(path, "pt") as file:
        tensors, said = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    said |= {name: json.dumps(value) for name, value in metadata.items()}
    safetensors.torch.save_file(tensors, path, said)
    return path


@pytest.fixture
def run(finished_run: Run, tmp_path: Path) -> Run:
    """A copy of a finished run, to be damaged."""
    return Run(Path(shutil.copytree(finished_run.folder, tmp_path / "run")))


def put(run: Run, weights: Path) -> None:
    """Gives the run other weights, and a summary that names them."""
    content = weights.read_bytes()
    run.weights.write_bytes(content)
    run.write("summary.json", run.summary | {"model_sha256": hashlib.sha256(content).hexdigest()})


@pytest.mark.numerical
def test_a_finished_run_answers_as_it_was_tested(finished_run: Run, tiny_dataset: Dataset) -> None:
    model, about = load(finished_run.folder)
    assert not model.training
    assert about["wnids"] == list(tiny_dataset.wnids)
    assert about["content_sha256"] == tiny_dataset.content_sha256
    stored = finished_run.predictions
    answers = predict(model, about, tiny_dataset.images[stored["rows"]], top=3)
    shares = [{each["wnid"]: each["probability"] for each in answer} for answer in answers]
    found = [[each[wnid] for wnid in tiny_dataset.wnids] for each in shares]
    # Stored logits are float16: what is nearly equal may rank the other way.
    expected = torch.softmax(torch.from_numpy(stored["logits"]).float(), dim=1).numpy()
    np.testing.assert_allclose(found, expected, atol=2e-4)
    assert np.ptp(expected, axis=1).min() > 0.01, "to mix up classes would not show"
    assert answers[0][0].keys() == {"wnid", "name", "probability"}


def test_a_file_and_a_folder_that_was_handed_over(weights: Path, network: ResNet18) -> None:
    for path in (weights, str(weights), weights.parent):
        model, about = load(path)
        assert about["names"] == list(NAMES)
        assert all(
            torch.equal(value, network.state_dict()[name])
            for name, value in model.state_dict().items()
        )


def test_runs_that_are_not_finished_are_refused(run: Run) -> None:
    (run.folder / "summary.json").unlink()
    with pytest.raises(UserError, match="not finished"):
        load(run.folder)


def test_runs_without_weights_or_with_damaged_ones_are_refused(run: Run) -> None:
    content = bytearray(run.weights.read_bytes())
    content[-3] ^= 1
    run.weights.write_bytes(content)
    with pytest.raises(
        UserError, match=r"missing or damaged: it is not the file that the run's summary names"
    ):
        load(run.folder)
    run.weights.unlink()
    with pytest.raises(UserError, match="missing or damaged"):
        load(run.folder)
    run.weights.mkdir()
    with pytest.raises(UserError, match="missing or damaged"):
        load(run.folder)


def test_what_is_neither_a_run_nor_weights_is_refused(tmp_path: Path, run: Run) -> None:
    with pytest.raises(UserError, match="there is no"):
        load(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no run"):
        load(tmp_path / "empty")
    (tmp_path / "a.safetensors").write_bytes(b"hello")
    with pytest.raises(UserError, match="does not hold weights that tinylab wrote"):
        load(tmp_path / "a.safetensors")
    (run.folder / "run.json").unlink()  # what is left of a run is no folder that was handed over
    with pytest.raises(UserError, match=r"run\.json is missing"):
        load(run.folder)


@pytest.mark.parametrize("known", [True, False])
def test_other_classes_and_another_order_are_refused(
    run: Run, tmp_path: Path, narrow: Recipe, known: bool
) -> None:
    wnids = tuple(load(run.folder)[1]["wnids"])
    if not known:  # as in runs of before there was this field
        run.write(
            "run.json",
            {key: value for key, value in run.identity.items() if key != "class_order_sha256"},
        )
    one_more = ResNet18(4, 16)
    put(run, written(tmp_path / "a", one_more, narrow, (*wnids, "n99999999")))
    with pytest.raises(UserError, match="other classes, or another order") as caught:
        load(run.folder)
    assert len(str(caught.value).splitlines()) == 1
    put(run, written(tmp_path / "b", ResNet18(3, 16), narrow, wnids[::-1]))
    if known:
        with pytest.raises(UserError, match="other classes, or another order"):
            load(run.folder)
    put(run, written(tmp_path / "c", ResNet18(3, 16), narrow, wnids))
    assert load(run.folder)


@pytest.mark.parametrize("change", [{"width": 8}, {"mean": (0.1, 0.2, 0.3)}, {"std": (1.0, 1.0, 1.0)},
                                    {"test_resolution": 32}])  # fmt: skip
def test_another_network_or_normalisation_is_refused(
    run: Run, tmp_path: Path, narrow: Recipe, change: dict
) -> None:
    wnids = tuple(load(run.folder)[1]["wnids"])
    recipe = replace(narrow, **change)
    put(run, written(tmp_path / "a", ResNet18(3, recipe.width), recipe, wnids))
    with pytest.raises(UserError, match="another network or normalisation"):
        load(run.folder)


@pytest.mark.parametrize("metadata", [{"mean": [0.4]}, {"mean": "abc"}, {"mean": 5}, {"std": [0, 1, 1]},
                                      {"std": None}, {"mean": [1e999, 0, 0]}, {"wnids": ["n1"]}, {"names": 3},
                                      {"recipe": {"width": 16, "test_resolution": 7}}, {"recipe": {"width": 64}},
                                      {"recipe": [16]}, {"content_sha256": 5}])  # fmt: skip
def test_files_that_lie_of_themselves_are_refused(weights: Path, metadata: dict) -> None:
    with pytest.raises(UserError, match="does not hold weights that tinylab wrote") as caught:
        load(altered(weights, **metadata))
    assert len(str(caught.value).splitlines()) == 1


def test_recipes_of_other_versions_are_understood(weights: Path, coloured: Recipe) -> None:
    model, about = load(altered(weights, recipe={"width": 16, "a field of tomorrow": [1]}))
    assert normalised(about)(torch.zeros(1, 64, 64, 3, dtype=torch.uint8)).shape == (1, 3, 64, 64)
    assert predict(model, about, np.zeros((1, 64, 64, 3), np.uint8))


# --- Predicting -------------------------------------------------------------------------------------------------------


def pictures(count: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)


def test_the_network_sees_what_it_was_tested_on(weights: Path, coloured: Recipe) -> None:
    for resolution in (64, 32):
        recipe = replace(coloured, test_resolution=resolution)
        about = load(written(weights, random_network(16), recipe))[1]
        images = torch.from_numpy(pictures(3))
        expected = normalise(resize(images, resolution), recipe)
        assert torch.equal(normalised(about)(images), expected)
        assert expected.shape == (3, 3, resolution, resolution)


@pytest.mark.numerical
def test_answers_come_best_first_and_add_up(weights: Path) -> None:
    model, about = load(weights)
    answers = predict(model, about, pictures(70), top=100)
    assert len(answers) == 70
    for answer in answers:
        found = [each["probability"] for each in answer]
        assert len(found) == 6
        assert found == sorted(found, reverse=True)
        assert sum(found) == pytest.approx(1, abs=1e-12)
    with torch.inference_mode():
        expected = torch.softmax(
            model(normalised(about)(torch.from_numpy(pictures(70)))).double(), 1
        ).numpy()
    for answer, each in zip(answers, expected, strict=True):
        assert {one["wnid"]: pytest.approx(one["probability"], abs=1e-6) for one in answer} == dict(
            zip(WNIDS, each, strict=True)
        )
        assert all(NAMES[WNIDS.index(one["wnid"])] == one["name"] for one in answer)
    assert [len(answer) for answer in predict(model, about, pictures(2), top=1)] == [1, 1]
    assert predict(model, about, pictures(0)) == []


def test_equal_logits_rank_by_class(weights: Path) -> None:
    model, about = load(weights)
    nn.init.zeros_(model.fc.weight)
    nn.init.zeros_(model.fc.bias)
    assert [each["wnid"] for each in predict(model, about, pictures(1), top=6)[0]] == list(WNIDS)


def test_the_caller_s_state_changes_nothing_and_stays(weights: Path) -> None:
    model, about = load(weights)
    expected = predict(model, about, pictures(3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    read_only = pictures(3)
    read_only.flags.writeable = False
    with torch.autocast("cpu", torch.bfloat16):
        assert predict(model, about, read_only) == expected
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_arrays_of_another_form_are_errors(weights: Path) -> None:
    model, about = load(weights)
    for images in (
        pictures(1)[0],
        pictures(1).astype(np.float32),
        pictures(1).transpose(0, 3, 1, 2),
    ):
        with pytest.raises(ValueError, match="uint8"):
            predict(model, about, images)
    with pytest.raises(ValueError, match="top"):
        predict(model, about, pictures(1), top=0)


# --- Other people's programs ------------------------------------------------------------------------------------------


def narrow_torchvision(width: int, classes: int) -> torchvision.models.ResNet:
    """torchvision's ResNet-18, all its stages thinner: the library has no parameter for that."""

    class Thin(torchvision.models.ResNet):
        def _make_layer(
            self, block: type, planes: int, *rest: object, **options: object
        ) -> nn.Sequential:
            if planes == 64:
                self.inplanes = width
            return super()._make_layer(block, planes * width // 64, *rest, **options)

    model = Thin(torchvision.models.resnet.BasicBlock, [2, 2, 2, 2])
    model.bn1, model.fc = nn.BatchNorm2d(width), nn.Linear(8 * width, classes)
    model.conv1, model.maxpool = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.Identity()
    return model.eval()


@pytest.mark.numerical
@pytest.mark.parametrize("size", [1, 2, 7])
def test_the_weights_answer_alike_in_a_narrow_torchvision(weights: Path, size: int) -> None:
    model, about = load(weights)
    theirs = narrow_torchvision(16, len(WNIDS))
    theirs.load_state_dict(safetensors.torch.load_file(weights))
    with safetensors.safe_open(weights, "pt") as file:
        said = {name: torch.tensor(json.loads(file.metadata()[name])) for name in ("mean", "std")}
    images = torch.from_numpy(pictures(size))
    scaled = (images.permute(0, 3, 1, 2) / 255 - said["mean"].view(3, 1, 1)) / said["std"].view(
        3, 1, 1
    )
    with torch.inference_mode():
        torch.testing.assert_close(
            theirs(scaled), model(normalised(about)(images)), atol=1e-5, rtol=1e-5
        )


@pytest.mark.slow
def test_the_readme_s_lines_load_the_weights_into_torchvision(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (repository / "README.md").read_text()
    (lines,) = re.findall(r"```python\n(import json, safetensors.*?)```", page, re.DOTALL)
    (path,) = re.findall(r'safe_open\("(.*?)"', lines)
    monkeypatch.chdir(tmp_path)
    Path(path).parent.mkdir(parents=True)
    model, about = load(written(Path(path), random_network(64), published()))
    found: dict = {}
    exec(lines, found)
    inputs = normalised(about)(torch.from_numpy(pictures(3)))
    with torch.inference_mode():
        torch.testing.assert_close(
            found["model"].eval()(inputs), model(inputs), atol=1e-4, rtol=1e-5
        )
    assert found["names"] == list(NAMES)


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, ResNet18, dict]:
    """An exported network: its file, what was said of it, the network and its metadata. Quietly exported."""
    for package in module.NEEDED:
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("onnx")
    recipe = replace(smoke(), width=16, mean=(0.48, 0.45, 0.4), std=(0.28, 0.27, 0.29))
    model, about = load(written(folder / "model.safetensors", random_network(16), recipe))
    model.train()
    printed = io.StringIO()
    with (
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("error")
        said = export_onnx(model, about, folder / "new" / "model.onnx")
    assert printed.getvalue() == ""
    assert model.training  # as the caller had it
    return folder / "new" / "model.onnx", said, model.eval(), about


def onnx_logits(path: Path, inputs: torch.Tensor) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"images": inputs.contiguous().numpy()})[0]


@pytest.mark.numerical
@pytest.mark.parametrize("size", [1, 2, 7])
def test_onnx_answers_as_torch_does(onnx_file: tuple, size: int) -> None:
    path, _, model, about = onnx_file
    inputs = normalised(about)(torch.from_numpy(pictures(size)))
    with torch.inference_mode():
        expected = model(inputs).numpy()
    found = onnx_logits(path, inputs)
    assert found.shape == (size, 6)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_the_onnx_file_says_what_it_is(onnx_file: tuple) -> None:
    import onnx

    path, said, _, about = onnx_file
    program = onnx.load(path)
    onnx.checker.check_model(program, full_check=True)
    assert {each.key: json.loads(each.value) for each in program.metadata_props} == about
    assert [each.domain for each in program.opset_import if each.version == said["opset"]] == [""]
    ((images,), (logits,)) = program.graph.input, program.graph.output
    assert (images.name, logits.name) == ("images", "logits")
    sizes = [each.dim_value or each.dim_param for each in images.type.tensor_type.shape.dim]
    assert sizes[1:] == [3, 64, 64]
    assert isinstance(sizes[0], str)
    assert said["file"] == str(path)
    assert said["bytes"] == path.stat().st_size
    assert said["batches"] == [1, 2, 7]
    assert said["largest_difference"] <= 1e-5 * said["largest_logit"]
    assert said["same_top1"] is True
    json.dumps(said)
    assert [each.name for each in path.parent.iterdir()] == [
        path.name
    ]  # one file, and nothing half-written


def test_the_onnx_file_names_no_folder_and_no_source(onnx_file: tuple) -> None:
    import onnx

    program = onnx.load(onnx_file[0])
    for tensor in program.graph.initializer:
        tensor.ClearField("raw_data")  # numbers may spell anything
    text = program.SerializeToString()
    for word in (
        b"site-packages",
        b"stack_trace",
        b'.py"',
        b"/src/",
        str(Path.home()).encode() + b"/",
    ):
        assert word not in text


@pytest.mark.slow
def test_onnx_of_the_full_width_and_of_another_resolution(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    recipe = replace(published(), test_resolution=72)
    model, about = load(written(tmp_path / "model.safetensors", random_network(64), recipe))
    said = export_onnx(model, about, tmp_path / "a.onnx")
    assert said["largest_difference"] <= module.TOLERANCE * said["largest_logit"]
    export_onnx(model, about, tmp_path / "b.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    for size in (1, 2, 7):
        inputs = normalised(about)(torch.from_numpy(pictures(size)))
        assert inputs.shape == (size, 3, 72, 72)
        with torch.inference_mode():
            expected = model(inputs).numpy()
        found = onnx_logits(tmp_path / "a.onnx", inputs)
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == missing else real(name, *rest),
    )
    with pytest.raises(UserError, match=rf'needs {missing}\b.*pip install "tinylab\[export\]"'):
        export_onnx(*load(weights), tmp_path / "a.onnx")
    assert not (tmp_path / "a.onnx").exists()


@pytest.mark.parametrize("wrong", [1e-3, float("nan")])
def test_an_export_that_answers_otherwise_is_not_written(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, onnx_file: tuple, wrong: float
) -> None:
    import onnx

    def bent(*_: object) -> "onnx.ModelProto":
        program = onnx.load(onnx_file[0])
        del program.metadata_props[:]
        (bias,) = [each for each in program.graph.initializer if each.name == "fc.bias"]
        values = onnx.numpy_helper.to_array(bias) + np.float32(10 * wrong)
        bias.CopyFrom(onnx.numpy_helper.from_array(values, "fc.bias"))
        return program

    monkeypatch.setattr(module, "_onnx_program", bent)
    (tmp_path / "a.onnx").write_bytes(b"of before")
    with pytest.raises(UserError, match="is not written: in onnxruntime its logits differ"):
        export_onnx(*load(weights), tmp_path / "a.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == b"of before"
    assert not list(tmp_path.glob("*.tmp"))


def test_places_that_cannot_be_written(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, onnx_file: tuple
) -> None:
    import onnx

    def ready(*_: object) -> "onnx.ModelProto":
        program = onnx.load(onnx_file[0])
        del program.metadata_props[:]
        return program

    monkeypatch.setattr(module, "_onnx_program", ready)
    with pytest.raises(UserError, match="is a folder"):
        export_onnx(*load(weights), tmp_path)
    with pytest.raises(UserError, match="cannot write"):
        export_onnx(*load(weights), weights / "a.onnx")

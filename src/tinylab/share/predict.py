"""A finished run on anybody's picture: read it as the training images were, name its classes, hand the network on.

Pictures come from strangers' cameras and from the web: what is read here is bounded in bytes, pixels and kinds, and
what cannot be read is one line.
"""

import contextlib
import copy
import hashlib
import importlib.util
import io
import json
import logging
import stat
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import safetensors
import torch
from PIL import Image
from torch import Tensor, nn

from tinylab.data.archive import class_order_sha256
from tinylab.data.augment import network_input
from tinylab.exceptions import UserError
from tinylab.explain.mistakes import softmax
from tinylab.files import printable, write_atomically
from tinylab.model import ResNet18
from tinylab.recipe import SIZE, Recipe
from tinylab.recipes import published
from tinylab.run.folder import Run
from tinylab.run.weights import load_weights

if TYPE_CHECKING:
    import onnx

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""What is read, by Pillow's names: what browsers show, decoded inside Pillow or by the libraries that browsers use. Its
other readers (TIFF, EPS, PSD, ...) see less use and more faults."""

SMALLEST = 8
"""Pixels on the shorter side below which a picture is refused: there is nothing to see."""
MOST_BYTES = 256 * 1024 * 1024
MOST_PIXELS = 128_000_000
"""Of any picture: phones make JPEGs of 108 million."""
MOST_HELD = 64_000_000
"""Pixels that are decoded into memory, up to a gigabyte. (A JPEG that is not progressive is shrunk in decoding.)"""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns a picture upright, by its EXIF orientation."""
_ORIENTATION = 0x0112

_KNOWN = (
    (4, (b"ftypheic", b"ftypheix", b"ftyphevc", b"ftypmif1", b"ftypmsf1"), "a HEIC picture"),
    (4, (b"ftypavif", b"ftypavis"), "an AVIF picture"),
    (0, (b"II*\0", b"MM\0*"), "a TIFF picture"),
    (0, (b"%PDF",), "a PDF document"),
    (0, (b"<svg", b"<?xml", b"<!DOCTYPE svg"), "a drawing or a text (SVG, XML), not pixels"),
    (0, (b"<!DOCTYPE html", b"<!doctype html", b"<html"), "a web page"),
)
"""Where, and with what, files begin that people take for pictures that can be read."""


# --- Somebody's picture -----------------------------------------------------------------------------------------------


def read_image(path: Path) -> np.ndarray:
    """The picture in a JPEG, PNG, WebP, GIF or BMP file, uint8 (64, 64, 3) RGB, as the network's training images are.

    * It is turned upright as its EXIF orientation says.
    * Its middle square is kept and scaled to 64 x 64: by area, each new pixel the mean of those whose middle it covers,
      so that nothing aliases; smaller pictures are enlarged bilinearly. How Tiny ImageNet's makers did it is not
      documented, but its images are square and not distorted, and their boxes touch the left edge more often (39 %)
      than the upper one (22 %), as is to be expected where the sides of wide pictures were cut off.
    * Transparent parts become white, the paper on which such pictures are meant to be seen; what colour lies under them
      is chance, often black.
    * Grey, palette and CMYK become RGB by Pillow, as when the data set is prepared. Of 16 bits the upper 8 are kept, so
      the range is scaled and not clipped. Colour profiles are ignored, as they were in the training images.
    * Of an animation the first picture is taken.

    A 64 x 64 RGB file goes through unchanged: one of the data set's own gives the very pixels that were trained on. A
    large JPEG is first shrunk by up to 8 while it is decoded, to no less than 512 pixels on its shorter side.

    Raises `UserError` if there is no such file or it cannot be read, is no picture of these kinds, is damaged or cut
    short, has fewer than 8 pixels on a side, more than 128 million in all or more than 64 million to be held in memory,
    or more than 256 MB.
    """
    path = Path(path)
    try:
        with (
            _opened(path) as file,
            warnings.catch_warnings(action="ignore"),
            Image.open(file, formats=FORMATS) as image,
        ):
            _bound(path, image)
            return np.asarray(_prepared(image))
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise _too_large(path) from error
    except Image.UnidentifiedImageError as error:
        raise UserError(
            f"{printable(path)} {_what_it_is(path)}: save it as JPEG, PNG or WebP"
        ) from error
    except MemoryError as error:
        raise UserError(
            f"{printable(path)} is too large for this machine's memory: make it smaller"
        ) from error
    except Exception as error:  # Pillow raises many kinds for broken files, SyntaxError among them
        if getattr(error, "errno", None) is not None:
            raise UserError(f"{printable(path)} cannot be read: {error.strerror}") from error
        raise UserError(
            f"{printable(path)} is a damaged picture, or cut short: get a whole copy of it"
        ) from error


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[io.BufferedReader]:
    """The file, which is a regular one of a size that can be a picture's."""
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise UserError(f"there is no file {printable(path)}") from error
    except ValueError as error:
        raise UserError(f"{printable(path)} is not a name that a file can have") from error
    if stat.S_ISDIR(status.st_mode):
        raise UserError(f"{printable(path)} is a folder: name the pictures in it")
    if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for, a device might never end
        raise UserError(f"{printable(path)} is no regular file: name a picture")
    if not 0 < status.st_size <= MOST_BYTES:
        problem = (
            f"has more than {MOST_BYTES:,} bytes: make it smaller"
            if status.st_size
            else "is empty: get a whole copy"
        )
        raise UserError(f"{printable(path)} {problem}")
    with open(path, "rb") as file:
        yield file


def _bound(path: Path, image: Image.Image) -> None:
    """Refuses what is too large or too small before anything is decoded, and has a large JPEG decoded smaller."""
    if min(image.size) < SMALLEST:
        size = f"{image.width:,} x {image.height:,}"
        raise UserError(
            f"{printable(path)} has {size} pixels: at least {SMALLEST} on each side are needed"
        )
    all_pixels = image.width * image.height
    if image.format in ("JPEG", "MPO"):
        image.draft(None, (8 * SIZE, 8 * SIZE))
    # All coefficients of a progressive JPEG are kept until its last byte, whatever size is asked for.
    held = all_pixels if image.info.get("progressive") else image.width * image.height
    if all_pixels > MOST_PIXELS or held > MOST_HELD:
        raise _too_large(path)


def _prepared(image: Image.Image) -> Image.Image:
    """The opened picture upright, its middle square, 64 x 64, RGB."""
    image.load()
    orientation = _orientation(image)
    square = _middle_square(*image.size, orientation)
    image = _averageable(image)
    if image.size != (SIZE, SIZE):
        shrinks = square[2] - square[0] > SIZE
        image = image.resize(
            (SIZE, SIZE), Image.Resampling.BOX if shrinks else Image.Resampling.BILINEAR, square
        )
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _middle_square(width: int, height: int, orientation: int) -> tuple[int, int, int, int]:
    """Left, upper, right, lower. Of an odd rest the larger half is cut off at the right or below once the picture is
    upright, so that equal pictures stay equal whichever way they are stored."""
    side = min(width, height)
    left, upper = (width - side) // 2, (height - side) // 2
    if orientation in (2, 3, 7, 8):  # stored with its left and right exchanged
        left = width - side - left
    if orientation in (3, 4, 6, 7):
        upper = height - side - upper
    return left, upper, left + side, upper + side


def _averageable(image: Image.Image) -> Image.Image:
    """The picture in a mode whose values may be averaged: L, RGB or RGBA, of 8 bits."""
    if image.mode.startswith("I"):  # 16 bits of grey
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        return image.convert("RGBA")
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    """1 to 8; 1, upright, where there is no EXIF, or it is damaged."""
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # as for pictures, many kinds; the picture itself may be sound
        return 1
    return found if found in _UPRIGHT else 1


def _what_it_is(path: Path) -> str:
    """For a file that Pillow does not know: what its first bytes tell."""
    with open(path, "rb") as file:
        head = file.read(64).removeprefix(b"\xef\xbb\xbf")
    for offset, beginnings, kind in _KNOWN:
        if head[offset:].lstrip().startswith(beginnings):
            return f"is {kind}, which cannot be read"
    return "is not a picture, or of a kind that cannot be read, or damaged"


def _too_large(path: Path) -> UserError:
    limits = f"{MOST_HELD // 10**6} million pixels ({MOST_PIXELS // 10**6} if it is a plain JPEG)"
    return UserError(f"{printable(path)} is too large: more than {limits}; make it smaller")


# --- The network ------------------------------------------------------------------------------------------------------


def load(path: Path) -> tuple[ResNet18, dict]:
    """The network of a finished run, on the CPU in eval mode, and what its file's metadata say, JSON decoded: wnids and
    names in the order of the logits, mean, std, recipe, metrics, content_sha256 (of the data set).

    path: the run's folder, or a model.safetensors that tinylab wrote, or the folder that `tinylab export` made of it. A
    run must be whole: the weights are the file that its summary names, of the classes, in the order and number, and of
    the network that its records tell of. Raises `UserError` otherwise.
    """
    path = Path(path)
    records = ("run.json", "recipe.json", "summary.json")
    if path.is_dir() and any((path / name).exists() for name in records):
        return _load_run(Run(path))
    if path.is_dir() and not (path / "model.safetensors").exists():
        raise UserError(
            f"{printable(path)} holds no run and no model.safetensors: name the folder of a finished run"
        )
    if not path.exists():
        raise UserError(
            f"there is no {printable(path)}: name a finished run's folder, or a model.safetensors"
        )
    return _load_file(path / "model.safetensors" if path.is_dir() else path)


def _load_run(run: Run) -> tuple[ResNet18, dict]:
    identity, recipe, summary = run.identity, run.recipe, run.summary
    try:
        found = (
            hashlib.sha256(run.weights.read_bytes()).hexdigest() if run.weights.is_file() else None
        )
    except OSError as error:
        raise UserError(f"{run.weights} cannot be read: {error.strerror or error}") from error
    if found != summary["model_sha256"]:
        raise UserError(
            f"{run.weights} is missing or damaged: it is not the file that the run's summary names"
        )
    model, about = _load_file(run.weights)
    order = class_order_sha256(about["wnids"])
    # Runs that began before there was such a field are held to their number of classes.
    if len(about["wnids"]) != identity["classes"] or order != identity.get(
        "class_order_sha256", order
    ):
        raise UserError(
            f"{run.weights} has other classes, or another order of them, than {run.folder}/run.json tells"
        )
    tested = tested_as(about)
    told = [(each.mean, each.std, each.test_resolution) for each in (tested, recipe)]
    if about["recipe"]["width"] != recipe.width or told[0] != told[1]:
        raise UserError(
            f"{run.weights} is of another network or normalisation than {run.folder}/recipe.json tells"
        )
    return model, about


def _load_file(path: Path) -> tuple[ResNet18, dict]:
    model, about = load_weights(path)
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            about["content_sha256"] = json.loads((file.metadata() or {})["content_sha256"])
        tested_as(about)
        if not isinstance(about["content_sha256"], str):
            raise ValueError("content_sha256 is no text")
    except (
        OSError,
        safetensors.SafetensorError,
        KeyError,
        ValueError,
        TypeError,
        UserError,
    ) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} does not hold weights that tinylab wrote: {reason}") from error
    return model, about


def tested_as(about: dict) -> Recipe:
    """A recipe with the mean, std and test_resolution of the network that `about` tells of; its other fields mean
    nothing. So may be read, too, what a version of tinylab wrote that had other fields.

    Raises `UserError`, `TypeError` or `AttributeError` if they are not what they should be.
    """
    resolution = about["recipe"].get("test_resolution", SIZE)
    return replace(
        published(), mean=tuple(about["mean"]), std=tuple(about["std"]), test_resolution=resolution
    )


def normalised(about: dict) -> Callable[[Tensor], Tensor]:
    """The function that turns images, uint8 (n, 64, 64, 3) on any device, into what the network was tested on: float32
    (n, 3, R, R), R being its recipe's test_resolution, 64 as a rule. `about` as `load` gives it."""
    return network_input(tested_as(about))


def predict(model: nn.Module, about: dict, images: np.ndarray, top: int = 5) -> list[list[dict]]:
    """For each of the images, uint8 (n, 64, 64, 3) RGB, its `top` most probable classes (or all, if there are fewer),
    the most probable first: wnid, name, probability (the softmax of all logits, not calibrated).

    In fp32, on the model's device, in evaluation mode, whatever the caller has set; equal logits rank by class number,
    as in `evaluate`. Raises `ValueError` for arrays of another shape or type, or for a `top` below 1.
    """
    if images.dtype != np.uint8 or images.shape[1:] != (SIZE, SIZE, 3):
        raise ValueError(
            f"images must be uint8 (n, {SIZE}, {SIZE}, 3), not {images.dtype} {images.shape}"
        )
    if top < 1:
        raise ValueError(f"top must be at least 1, not {top}")
    device, to_input = next(model.parameters()).device, normalised(about)
    logits = [np.empty((0, len(about["wnids"])), np.float32)]
    training = model.training
    model.eval()
    try:
        with torch.inference_mode(), torch.autocast(device.type, enabled=False):
            for first in range(0, len(images), 64):
                batch = torch.from_numpy(np.array(images[first : first + 64]))
                logits.append(model(to_input(batch.to(device))).float().cpu().numpy())
    finally:
        model.train(training)
    scores = np.concatenate(logits)
    best = np.argsort(-scores, axis=1, kind="stable")[:, :top]
    return [
        [
            {
                "wnid": about["wnids"][index],
                "name": about["names"][index],
                "probability": float(each[index]),
            }
            for index in order
        ]
        for order, each in zip(
            best.tolist(), softmax(scores) if len(scores) else scores, strict=True
        )
    ]


# --- ONNX -------------------------------------------------------------------------------------------------------------

NEEDED = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4
"""By how much a logit may differ between onnxruntime and torch, as a share of the largest logit: both compute in fp32
and differ in the order of sums."""
CHECKED_BATCHES = (1, 2, 7)
"""Sizes of the batches of made-up images that are compared."""


def export_onnx(model: nn.Module, about: dict, path: Path, opset: int = 18) -> dict:
    """Writes the network as one ONNX file, after a comparison of its logits in onnxruntime with torch's.

    Its input "images" is float32 (batch, 3, R, R), normalised: RGB scaled to 0..1, less `mean`, divided by `std`, of
    any number of images (R as in `normalised`); its output "logits" is float32 (batch, classes). The file's
    metadata_props hold, as JSON, wnids and names in the order of the logits, mean, std, recipe, metrics and
    content_sha256.

    Returns file, bytes, opset, batches (sizes compared), largest_difference and largest_logit over all of them, and
    same_top1. Raises `UserError` if one of onnx, onnxscript and onnxruntime is missing, if the file cannot be written,
    or if a logit differs by more than `TOLERANCE`; then no file is written, and one that was there stays.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f'the export needs {", ".join(missing)}: pip install "tinylab[export]"')
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{printable(path)} is a folder: name the ONNX file to write in it")
    network = copy.deepcopy(model).cpu().float().eval()
    program = _onnx_program(network, tested_as(about).test_resolution, opset)
    for key in ("wnids", "names", "mean", "std", "recipe", "metrics", "content_sha256"):
        program.metadata_props.add(key=key, value=json.dumps(about.get(key)))
    content = program.SerializeToString()
    compared = _compare(content, network, about)
    if not compared["largest_difference"] <= TOLERANCE * compared["largest_logit"]:
        difference = f"{compared['largest_difference']:.2g}"
        raise UserError(
            f"{printable(path)} is not written: in onnxruntime its logits differ by up to {difference}"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {printable(path)}: {error.strerror or error}") from error
    write_atomically(path, content)
    return {"file": str(path), "bytes": len(content), "opset": opset, **compared}


def _onnx_program(network: nn.Module, resolution: int, opset: int) -> "onnx.ModelProto":
    """The network in ONNX, its batch size left open; without what the exporter notes of the machine it ran on."""
    example = torch.zeros(
        2, 3, resolution, resolution
    )  # of one image alone the size would become a constant
    with _quiet():
        program = torch.onnx.export(
            network,
            (example,),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes={"x": {0: torch.export.Dim("batch")}},
            opset_version=opset,
            dynamo=True,
            verbose=False,
        ).model_proto
    # Every node tells the source lines that it comes from, with the folders of whoever exports.
    for part in (
        program.graph,
        *program.graph.node,
        *program.graph.value_info,
        *program.graph.initializer,
    ):
        part.doc_string = ""
        del part.metadata_props[:]
    for part in (*program.graph.input, *program.graph.output):
        del part.metadata_props[:]
    del program.metadata_props[:]
    return program


def _compare(content: bytes, network: nn.Module, about: dict) -> dict:
    """Logits of made-up images in onnxruntime and in torch: the largest difference, and whether all answers agree."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    differences, largest, same = [], [], True
    for size in CHECKED_BATCHES:
        images = torch.from_numpy(rng.integers(0, 256, (size, SIZE, SIZE, 3), dtype=np.uint8))
        inputs = normalised(about)(images).contiguous()
        with torch.inference_mode():
            expected = network(inputs).numpy()
        (found,) = session.run(["logits"], {"images": inputs.numpy()})
        differences.append(np.abs(found - expected).max())
        largest.append(np.abs(expected).max())
        same &= bool((found.argmax(axis=1) == expected.argmax(axis=1)).all())
    return {
        "batches": list(CHECKED_BATCHES),
        "largest_difference": float(np.max(differences)),
        "largest_logit": float(np.max(largest)),
        "same_top1": same,
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints its progress, and warns of versions that nobody here can choose."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    silent = io.StringIO()
    try:
        with (
            contextlib.redirect_stdout(silent),
            contextlib.redirect_stderr(silent),
            warnings.catch_warnings(action="ignore"),
        ):
            yield
    finally:
        logging.disable(disabled)

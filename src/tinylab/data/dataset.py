"""The data set as training reads it: decoded once into arrays on disk, then memory-mapped.

A data set folder holds

    images.npy    uint8 (N, 64, 64, 3), RGB
    labels.npy    int16 (N,), indices into the sorted wnids
    boxes.npy     uint8 (N, 4), x0 y0 x1 y1 in pixels, corners included
    meta.json     classes, counts, the content's sha256, and the sha256 of these files and of itself

in canonical order (see `archive.Archive`). It is built under another name and renamed: a folder
that exists is complete.
"""

import errno
import hashlib
import io
import json
import math
import os
import shutil
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from tinylab.data.archive import (
    CONTENT_SHA256,
    SAMPLE_SHA256,
    WNIDS_SHA256,
    Archive,
    class_order_sha256,
    content_sha256,
    file_sha256,
)  # fmt: skip
from tinylab.data.download import URLS, find
from tinylab.exceptions import UserError
from tinylab.files import interactive, lock, printable
from tinylab.recipe import SIZE

FORMAT_VERSION = 1
FOLDER = Path("data/tiny-imagenet")
ARRAYS = ("images.npy", "labels.npy", "boxes.npy")
CHUNK = 500  # images that are decoded and written at once: 6 MB


@dataclass(frozen=True)
class Dataset:
    """An opened data set folder: N images in canonical order, all arrays read-only."""

    folder: Path
    images: np.ndarray  # uint8 (N, 64, 64, 3), RGB, memory-mapped
    labels: np.ndarray  # int16 (N,), indices into `wnids`
    boxes: np.ndarray  # uint8 (N, 4): x0, y0, x1, y1 in pixels, corners included
    wnids: tuple[str, ...]  # sorted
    names: tuple[str, ...]  # of the classes, for people
    train_count: int  # rows below it were the official training images, the others validation
    content_sha256: str

    @property
    def is_tiny_imagenet(self) -> bool:
        """Whether it was decoded from exactly the published files."""
        return self.content_sha256 == CONTENT_SHA256

    @property
    def made_up(self) -> bool:
        """Whether it is tinylab's own sample of made-up shapes."""
        return self.content_sha256 == SAMPLE_SHA256

    def __len__(self) -> int:
        return len(self.labels)

    def __reduce__(self) -> tuple:
        return open_dataset, (self.folder,)  # another process maps the files, too


def open_dataset(folder: Path = FOLDER) -> Dataset:
    """Return the data set in `folder`, images memory-mapped.

    Raise `UserError` if there is none, of another version, or not as meta.json describes it. The
    pixels themselves are not checked: that is `verify`.
    """
    folder = Path(folder)
    meta = read_meta(folder)
    try:
        wnids, train_count = tuple(meta["wnids"]), meta["train_count"]
        names = (printable(n) or wnid for n, wnid in zip(meta["names"], wnids, strict=True))
        rows, arrays = train_count + meta["val_count"], []
        shapes, types = ((rows, SIZE, SIZE, 3), (rows,), (rows, 4)), ("u1", "i2", "u1")
        for name, shape, dtype in zip(ARRAYS, shapes, types, strict=True):
            array = np.load(folder / name, mmap_mode="r", allow_pickle=False)
            if array.shape != shape or array.dtype != dtype:
                raise ValueError(f"{name} is {array.dtype}{array.shape}")
            arrays.append(array)
        _, labels, boxes = arrays
        in_range = labels.min() >= 0 and labels.max() < len(wnids) and boxes.max() < SIZE
        if not in_range or list(wnids) != sorted(set(wnids)):
            raise ValueError("labels, classes and boxes do not fit")
        return Dataset(folder, *arrays, wnids, tuple(names), train_count, meta["content_sha256"])
    except Exception as error:  # np.load passes on what its parsers raise for a damaged header
        raise damaged(folder, printable(error, 100)) from error


def refuse_inside(dataset: Dataset, folder: Path, what: str) -> None:
    """Raise `UserError` if `folder` lies in the data folder."""
    if folder.resolve().is_relative_to(dataset.folder.resolve()):
        inside = f"{folder} is inside the data folder {dataset.folder}"
        raise UserError(f"{inside}: choose another place for the {what}")


def verify(dataset: Dataset) -> None:
    """Read all of the data set and compare it with the sha256 in its meta.json."""
    hashes = read_meta(dataset.folder).get("sha256") or {}
    for name in ARRAYS:
        if file_sha256(dataset.folder / name) != hashes.get(name):
            raise damaged(dataset.folder, f"{name} has changed since it was prepared")


def read_meta(folder: Path) -> dict:
    """Return the contents of meta.json."""
    try:
        raw = (folder / "meta.json").read_bytes()
        meta = json.loads(raw)
    except NotADirectoryError as error:
        way = f"`tinylab prepare --source {folder}` makes {FOLDER} of an archive"
        raise UserError(f"{folder} is a file, not a data folder: {way}") from error
    except FileNotFoundError as error:
        way = f"run `tinylab prepare --data {folder}`"
        if folder.suffix == ".zip":
            way = "there is no such archive either"
        raise UserError(f"no data set in {folder}: {way}") from error
    except OSError as error:
        raise UserError(f"cannot read {folder / 'meta.json'}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise damaged(folder, "meta.json is not JSON") from error
    if not isinstance(meta, dict) or meta.get("format_version") != FORMAT_VERSION:
        other = f"{folder} has another format than this tinylab reads (version {FORMAT_VERSION})"
        raise UserError(f"{other}: delete it and run `tinylab prepare --data {folder}`")
    hashes = meta.get("sha256") or {}
    own = hashes.get("meta.json")  # folders prepared before it had one lack it
    unknown = hashes.keys() - {*ARRAYS, "meta.json"}
    if unknown or (own and (own != meta_sha256(meta) or raw != meta_bytes(meta))):
        raise damaged(folder, "meta.json has changed since it was prepared")
    return meta


def meta_bytes(meta: dict) -> bytes:
    """Return meta.json in the one way in which it is written, so that every changed byte shows."""
    return (json.dumps(meta, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def meta_sha256(meta: dict) -> str:
    """Return the sha256 of meta.json without the entry that holds this hash."""
    others = {name: digest for name, digest in meta["sha256"].items() if name != "meta.json"}
    return hashlib.sha256(meta_bytes(meta | {"sha256": others})).hexdigest()


def damaged(folder: Path, problem: str) -> UserError:
    """Return the error of a damaged data set."""
    again = f"delete it and run `tinylab prepare --data {folder}`"
    return UserError(f"{folder} is damaged: {problem}; {again}")


def prepare(
    source: str | Path = "auto",
    folder: Path = FOLDER,
    workers: int | None = None,
    progress: bool = True,
) -> Dataset:
    """Return the data set in `folder`, decoded from `source` first if it is not there yet.

    source: see `download.find`; downloads go beside `folder`. workers: threads that decode. Of
    several processes one builds, the others wait. Raise `UserError`, naming the file at fault; then
    nothing is left behind.
    """
    folder, elsewhere = Path(folder), "choose another place with --data"
    if workers is not None and workers < 1:
        raise UserError(f"workers must be at least 1, not {workers}")
    try:
        if (folder / "meta.json").exists():
            return open_dataset(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with lock(folder, f"another process is preparing {folder}; waiting for it"):
            if (folder / "meta.json").exists():
                return open_dataset(folder)
            if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
                raise UserError(f"{folder} exists, but is no data set: {elsewhere}")
            with Archive(find(source, folder.parent)) as archive:
                strict = str(source) in ("auto", *URLS)
                build(archive, folder, workers or available_cores(), progress, strict)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write {folder}: {reason}; {elsewhere}") from error
    return open_dataset(folder)


def build(archive: Archive, folder: Path, workers: int, progress: bool, strict: bool) -> None:
    """Decode the archive into `folder`. strict: refuse Tiny ImageNet's classes with other files."""
    building = folder.with_name(f"{folder.name}.tinylab-building")
    shutil.rmtree(building, ignore_errors=True)  # of a killed process: the lock is ours
    try:
        building.mkdir()
        labels = [file.label for file in archive.files]
        np.save(building / "labels.npy", np.array(labels, np.int16))
        np.save(building / "boxes.npy", np.array([file.box for file in archive.files], np.uint8))
        digests = write_images(archive, building / "images.npy", workers, progress)

        # ---- identity ----
        written = ("labels.npy", "boxes.npy", "images.npy")  # the order in meta.json
        content = content_sha256(archive.files, archive.wnids, digests)
        if content != CONTENT_SHA256 and class_order_sha256(archive.wnids) == WNIDS_SHA256:
            problem = f"{archive.path} has Tiny ImageNet's classes, but other files ({content})"
            if strict:
                raise UserError(f"{problem}: name it with --source to use it all the same")
            print(f"note: {problem}", file=sys.stderr)
        elif content != CONTENT_SHA256 and strict:
            print(f"note: {archive.path} is not Tiny ImageNet", file=sys.stderr)
        meta = {
            "format_version": FORMAT_VERSION,
            "is_tiny_imagenet": content == CONTENT_SHA256,
            "content_sha256": content,
            "train_count": archive.train_count,
            "val_count": len(labels) - archive.train_count,
            "sha256": {name: file_sha256(building / name) for name in written},
            "wnids": archive.wnids,
            "names": archive.names,
        }
        meta["sha256"]["meta.json"] = meta_sha256(meta)
        (building / "meta.json").write_bytes(meta_bytes(meta))
        building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def write_images(archive: Archive, path: Path, workers: int, progress: bool) -> list[str]:
    """Decode all images into the .npy file; return the sha256 of every JPEG file."""
    shape, digests = (len(archive.files), SIZE, SIZE, 3), []
    reserve(path.parent, math.prod(shape))
    hidden = not (progress and interactive())
    bar = tqdm(total=shape[0], desc="decoding", unit=" images", mininterval=0.3, disable=hidden)
    quiet = warnings.catch_warnings(action="ignore")  # Pillow's, of files that decode all the same
    with bar, quiet, open(path, "wb") as file, ThreadPoolExecutor(workers) as pool:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for first in range(0, shape[0], CHUNK):
            names = [each.path for each in archive.files[first : first + CHUNK]]
            jpegs = [archive.read(name) for name in names]
            digests += [hashlib.sha256(jpeg).hexdigest() for jpeg in jpegs]
            # Written, not memory-mapped: on a full disk this is an exception, not a signal.
            file.write(np.stack(list(pool.map(decode, jpegs, names))).data)
            bar.update(len(names))
    return digests


def reserve(folder: Path, size: int) -> None:
    """Refuse a disk with less than `size` bytes free, before any work is done."""
    if shutil.disk_usage(folder).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def decode(jpeg: bytes, name: str) -> np.ndarray:
    """Return the image, uint8 (64, 64, 3), RGB. Raise `UserError` naming the file.

    libjpeg mends small damage silently: zips tell it by their CRC-32, Tiny ImageNet by its hash.
    """
    try:
        with Image.open(io.BytesIO(jpeg), formats=["JPEG"]) as image:
            if image.size == (SIZE, SIZE):
                return np.asarray(image.convert("RGB"))
            problem = f"has {image.width} x {image.height} pixels instead of {SIZE} x {SIZE}"
    except Exception:  # Pillow raises many kinds for broken files, SyntaxError among them
        problem = "is not a sound JPEG file"
    raise UserError(f"{printable(name)} {problem}; use an unmodified copy of the archive")


def available_cores() -> int:
    """Return the cores that this process may use: a container's share, not the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

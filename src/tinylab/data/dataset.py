"""The data set as training reads it: decoded once into arrays on disk, then memory-mapped.

A data set folder holds the arrays of `Dataset` in images.npy, labels.npy and boxes.npy, in the
order of `archive.Archive`, and meta.json: classes, counts, the content's sha256, and the sha256 of
these files and of itself. It is built under another name: a folder that exists is complete.
"""

import hashlib
import json
import os
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from tinylab.data.archive import (  # isort: skip
    CONTENT_SHA256, SAMPLE_WNIDS_SHA256, WNIDS_SHA256, Archive, class_order_sha256,
)  # fmt: skip
from tinylab.data.download import find
from tinylab.data.picture import decode
from tinylab.exceptions import UserError
from tinylab.files import interactive, lock, new_folder, printable
from tinylab.recipe import SIZE

FORMAT_VERSION = 1
FOLDER = Path("data/tiny-imagenet")
ARRAYS = {"images.npy": ("u1", SIZE, SIZE, 3), "labels.npy": ("i2",), "boxes.npy": ("u1", 4)}
CHUNK = 500  # images that are decoded and written at once: 6 MB


@dataclass(frozen=True)
class Dataset:
    """An opened data set folder: N images in canonical order, all arrays read-only."""

    folder: Path
    images: np.ndarray  # uint8 (N, 64, 64, 3), RGB, memory-mapped
    labels: np.ndarray  # int16 (N,), indices into `wnids`
    boxes: np.ndarray  # uint8 (N, 4): x0, y0, x1, y1 in pixels, corners included; 0: there is none
    wnids: tuple[str, ...]  # sorted
    names: tuple[str, ...]  # of the classes, for people
    train_count: int  # rows below it were the official training images, the others validation
    content_sha256: str
    title: str = ""  # what somebody's own images are called; "" for Tiny ImageNet's layout

    @property
    def is_tiny_imagenet(self) -> bool:
        """Whether it was decoded from exactly the published files."""
        return self.content_sha256 == CONTENT_SHA256

    @property
    def made_up(self) -> bool:
        """Whether it is tinylab's own sample of made-up shapes."""
        return class_order_sha256(self.wnids) == SAMPLE_WNIDS_SHA256

    def __len__(self) -> int:
        return len(self.labels)

    def __reduce__(self) -> tuple:
        return open_dataset, (self.folder,)  # another process maps the files, too


def open_dataset(folder: str | Path = FOLDER) -> Dataset:
    """Return the data set in `folder`, images memory-mapped.

    Raise `UserError` if there is none, of another version, or not as meta.json describes it. The
    pixels themselves are not checked: that is `verify`.
    """
    folder = Path(folder)
    meta = read_meta(folder)
    try:
        wnids, train_count, arrays = tuple(meta["wnids"]), meta["train_count"], []
        names = (printable(n) or wnid for n, wnid in zip(meta["names"], wnids, strict=True))
        for name, (dtype, *shape) in ARRAYS.items():
            array = np.load(folder / name, mmap_mode="r", allow_pickle=False)
            if array.shape != (train_count + meta["val_count"], *shape) or array.dtype != dtype:
                raise ValueError(f"{name} is {array.dtype}{array.shape}")
            arrays.append(array)
        _, labels, boxes = arrays
        in_range = labels.min() >= 0 and labels.max() < len(wnids) and boxes.max() < SIZE
        if not in_range or list(wnids) != sorted(set(wnids)) or "/" in "".join(wnids):
            raise ValueError("labels, classes and boxes do not fit")
        what = meta["content_sha256"], printable(meta.get("title", ""))
        return Dataset(folder, *arrays, wnids, tuple(names), train_count, *what)
    except Exception as error:  # np.load passes on what its parsers raise for a damaged header
        raise damaged(folder, printable(error, 100)) from error


def refuse_inside(dataset: Dataset, folder: Path, what: str) -> None:
    """Raise `UserError` if `folder` lies in the data folder."""
    if folder.resolve().is_relative_to(dataset.folder.resolve()):
        inside = f"{folder} is inside the data folder {dataset.folder}"
        raise UserError(f"{inside}: choose another place for the {what}")


def verify(dataset: Dataset) -> None:
    """Read all of the data set and compare it with the sha256 in its meta.json."""
    hashes = read_meta(dataset.folder).get("sha256", {})
    for name in ARRAYS:
        if file_sha256(dataset.folder / name) != hashes.get(name):
            raise damaged(dataset.folder, f"{name} has changed since it was prepared")


def read_meta(folder: Path) -> dict:
    """Return the contents of meta.json."""
    try:
        raw = (folder / "meta.json").read_bytes()
        meta = json.loads(raw)
        version, hashes = meta["format_version"], meta.get("sha256", {})
    except (FileNotFoundError, NotADirectoryError) as error:
        way = f"`tinylab prepare --{'source' if folder.is_file() else 'data'} {folder}` makes one"
        raise UserError(f"no data set in {folder}: {way}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise damaged(folder, "meta.json is not JSON, or none of a data set") from error
    if version != FORMAT_VERSION:
        raise damaged(folder, f"it has another format than this tinylab reads ({FORMAT_VERSION})")
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


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damaged(folder: Path, problem: str) -> UserError:
    """Return the error of a data set that must be made anew."""
    again = f"delete it and run `tinylab prepare --data {folder}`"
    return UserError(f"{folder} is damaged: {problem}; {again}")


def prepare(
    source: str | Path = "auto",
    folder: str | Path = FOLDER,
    workers: int | None = None,
    progress: bool = True,
) -> Dataset:
    """Return the data set in `folder`, decoded from `source` first if it is not there yet.

    source: see `download.find`; downloads go beside `folder`. workers: threads that decode. Of
    several processes one builds, the others wait. Raise `UserError`, naming the file at fault.
    """
    folder = Path(folder)
    if not (folder / "meta.json").exists():
        with lock(folder, f"another process is preparing {folder}; waiting for it"):
            if not (folder / "meta.json").exists():
                with new_folder(folder) as building:
                    archive = Archive(find(source, folder.parent))
                    threads, strict = max(1, workers or available_cores()), str(source) == "auto"
                    build(archive, building, threads, progress, strict)
    elif str(source) != "auto":
        print(f"note: {folder} was prepared before: {source} is not read", file=sys.stderr)
    return open_dataset(folder)


def build(archive: Archive, folder: Path, workers: int, progress: bool, strict: bool) -> None:
    """Decode the archive into `folder`. strict: refuse Tiny ImageNet's classes with other files."""
    labels = [file.label for file in archive.files]
    np.save(folder / "labels.npy", np.array(labels, np.int16))
    np.save(folder / "boxes.npy", np.array([file.box for file in archive.files], np.uint8))

    # ---- images ----
    shape, paths, digests = (len(labels), SIZE, SIZE, 3), [file.path for file in archive.files], []

    def load(path: str) -> tuple[str, np.ndarray]:
        content = archive.read(path)
        return hashlib.sha256(content).hexdigest(), decode(content, printable(path))

    starts, look = range(0, len(paths), CHUNK), {"unit": " images", "unit_scale": CHUNK}
    bar = tqdm(starts, "decoding", disable=not (progress and interactive()), **look)
    quiet = warnings.catch_warnings(action="ignore")  # Pillow's, of files that decode all the same
    with quiet, open(folder / "images.npy", "wb") as file, ThreadPoolExecutor(workers) as pool:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for first in bar:
            some, images = zip(*pool.map(load, paths[first : first + CHUNK]), strict=True)
            # Written, not memory-mapped: on a full disk this is an exception, not a signal.
            file.write(np.stack(images).data)
            digests += some

    # ---- identity ----
    written = ("labels.npy", "boxes.npy", "images.npy")  # the order in meta.json
    content = archive.content_sha256(digests)
    if content != CONTENT_SHA256 and class_order_sha256(archive.wnids) == WNIDS_SHA256:
        what = f"{archive.path} has Tiny ImageNet's classes, but other files ({content})"
        if strict:
            raise UserError(f"{what}: name it with --source to use it all the same")
        print(f"note: {what}", file=sys.stderr)
    meta = {
        "format_version": FORMAT_VERSION,
        "is_tiny_imagenet": content == CONTENT_SHA256,
        "content_sha256": content,
        "train_count": archive.train_count,
        "val_count": len(labels) - archive.train_count,
        "sha256": {name: file_sha256(folder / name) for name in written},
        "wnids": archive.wnids,
        "names": archive.names,
    } | ({"title": archive.title} if archive.title else {})
    meta["sha256"]["meta.json"] = meta_sha256(meta)
    (folder / "meta.json").write_bytes(meta_bytes(meta))


def write_folders(dataset: Dataset, folder: Path) -> None:
    """Write train/ and val/ into `folder` as torchvision's ImageFolder reads them, and words.txt.

    As PNG, named by row: the very pixels that are trained on (JPEG decoders differ), made of any
    data folder, its archive at hand or not.
    """
    words = map("\t".join, zip(dataset.wnids, dataset.names, strict=True))
    with new_folder(folder) as building:
        (building / "words.txt").write_text("\n".join(words) + "\n", "utf-8")
        for row, label in enumerate(dataset.labels):
            part = "train" if row < dataset.train_count else "val"
            target = building / part / dataset.wnids[label] / f"{row:06}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(dataset.images[row]).save(target)


def available_cores() -> int:
    """Return the cores that this process may use: a container's share, not the machine's."""
    known = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1

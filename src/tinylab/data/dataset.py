"""The data set as training reads it: decoded once into arrays on disk, opened memory-mapped ever after.

A data set folder holds

    images.npy    uint8 (N, 64, 64, 3), RGB
    labels.npy    int16 (N,), indices into the sorted wnids
    boxes.npy     uint8 (N, 4), x0 y0 x1 y1 in pixels, corners included
    meta.json     classes, counts, the content's sha256, and the sha256 of the three files above and of itself

in canonical order (see `archive.Archive`). It is built under another name and renamed: a folder that exists is
complete.
"""

import contextlib
import errno
import glob
import hashlib
import io
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image
from tqdm import tqdm

from tinylab.data import archive
from tinylab.data.archive import (
    CONTENT_SHA256,
    IMAGE_SIDE,
    URLS,
    Archive,
    Members,
    interactive,
    shown,
)
from tinylab.exceptions import UserError

FORMAT_VERSION = 1
FOLDER = Path("data/tiny-imagenet")
"""Where the data set lies unless told otherwise."""

_IMAGE_BYTES = IMAGE_SIDE * IMAGE_SIDE * 3
_CHUNK_IMAGES = 500  # 6 MB of pixels: what one worker holds in memory and writes at once
_ARRAYS = ("images.npy", "labels.npy", "boxes.npy")
_MARGIN_BYTES = 16 * 1024 * 1024
_META_LIMIT = 8 * 1024 * 1024
_COUNT_LIMIT = 1 << 31
_KEYS = {
    "format_version",
    "is_tiny_imagenet",
    "content_sha256",
    "train_count",
    "val_count",
    "sha256",
    "wnids",
    "names",
}


@dataclass(frozen=True)
class Dataset:
    """An opened data set folder. N images in canonical order, all arrays read-only."""

    folder: Path
    images: np.ndarray
    """uint8 (N, 64, 64, 3), RGB, memory-mapped."""
    labels: np.ndarray
    """int16 (N,), indices into `wnids`."""
    boxes: np.ndarray
    """uint8 (N, 4): x0, y0, x1, y1 in pixels, corners included."""
    wnids: tuple[str, ...]
    """WordNet ids of the classes, sorted."""
    names: tuple[str, ...]
    """Names of the classes for people, in the same order."""
    train_count: int
    """Rows [0, train_count) were the official training images, the others the official validation images."""
    content_sha256: str
    """Identity of the files it was decoded from, see `archive.content_sha256`."""

    @property
    def is_tiny_imagenet(self) -> bool:
        """Whether it was decoded from exactly the published files."""
        return self.content_sha256 == CONTENT_SHA256

    def __len__(self) -> int:
        return len(self.labels)

    def __reduce__(self) -> tuple:
        # Pickled for another process it is its folder, to be mapped there too, not 1.35 GB of pixels.
        return open_dataset, (self.folder,)


# --- Opening ----------------------------------------------------------------------------------------------------------


def open_dataset(folder: Path = FOLDER) -> Dataset:
    """The data set in `folder`, images memory-mapped; takes milliseconds.

    Raises `UserError` when there is none, when it has another format version, or when a file is missing or not as
    meta.json describes it. The pixels themselves are not checked: that is `verify`.
    """
    folder = Path(folder)
    meta = _read_meta(folder)
    wnids, names, content = meta.get("wnids"), meta.get("names"), meta.get("content_sha256")
    counts = meta.get("train_count"), meta.get("val_count")
    if not (
        all(
            type(texts) is list and all(type(text) is str for text in texts)
            for texts in (wnids, names)
        )
        and all(type(count) is int and abs(count) < _COUNT_LIMIT for count in counts)
        and type(content) is str
        and re.fullmatch("[0-9a-f]{64}", content)
    ):
        raise _damaged(folder, "meta.json is incomplete")
    if not wnids or wnids != sorted(set(wnids)) or len(names) != len(wnids):
        raise _damaged(
            folder, "the classes in meta.json are not sorted, or their names do not match"
        )
    if not all(wnid.isprintable() for wnid in wnids):
        raise _damaged(folder, "meta.json names a class with control characters")
    train_count, count = counts[0], sum(counts)
    images = _open_array(folder / "images.npy", (count, IMAGE_SIDE, IMAGE_SIDE, 3), np.uint8)
    labels = _open_array(folder / "labels.npy", (count,), np.int16)
    boxes = _open_array(folder / "boxes.npy", (count, 4), np.uint8)
    if not 0 <= train_count <= count or not 0 <= labels.min() <= labels.max() < len(wnids):
        raise _damaged(folder, "labels.npy has labels that stand for no class")
    if boxes.max() >= IMAGE_SIDE:
        raise _damaged(folder, "boxes.npy has boxes outside the image")
    # A folder from somebody else may hold names that no archive could have given.
    names = tuple(archive.printable(name) or wnid for name, wnid in zip(names, wnids, strict=True))
    return Dataset(folder, images, labels, boxes, tuple(wnids), names, train_count, content)


def refuse_inside(dataset: Dataset, folder: Path, what: str) -> None:
    """Raises `UserError` if `folder` lies in the data folder, which holds what `prepare` wrote and no more."""
    if folder.resolve().is_relative_to(dataset.folder.resolve()):
        raise UserError(
            f"{folder} is inside the data folder {dataset.folder}: choose another place for the {what}"
        )


def verify(dataset: Dataset) -> None:
    """Reads all of the data set and compares it with the sha256 in its meta.json; a few seconds.

    Raises `UserError` naming the file that has changed since it was prepared. In folders prepared before meta.json had
    a hash of itself, only its form is checked.
    """
    folder = dataset.folder
    meta = _read_meta(folder)
    expected = meta.get("sha256")
    if not isinstance(expected, dict) or not set(_ARRAYS) <= set(expected):
        raise _damaged(folder, "meta.json has no hashes")
    if set(meta) != _KEYS or not set(expected) <= {*_ARRAYS, "meta.json"}:
        raise _damaged(folder, "meta.json has changed since it was prepared")
    if (folder / "meta.json").read_bytes() != _meta_bytes(meta):
        raise _damaged(folder, "meta.json has changed since it was prepared")
    for name in _ARRAYS:
        with _open_file(folder / name) as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected[name]:
                raise _damaged(folder, f"{name} has changed since it was prepared")


def _meta_bytes(meta: dict) -> bytes:
    """The only way in which meta.json is written, so that every changed byte shows."""
    return (json.dumps(meta, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


def _meta_sha256(meta: dict) -> str:
    """sha256 of meta.json without the entry that holds this hash."""
    others = {name: digest for name, digest in meta["sha256"].items() if name != "meta.json"}
    return hashlib.sha256(_meta_bytes(meta | {"sha256": others})).hexdigest()


def _read_meta(folder: Path) -> dict:
    try:
        with _open_file(folder / "meta.json") as file:
            raw = file.read(_META_LIMIT + 1)
        if len(raw) > _META_LIMIT:
            raise _damaged(folder, f"meta.json has more than {_META_LIMIT:,} bytes")
        meta = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_no_constant
        )
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"no data set in {folder}: run `tinylab prepare --data {folder}`"
        ) from error
    except OSError as error:
        raise UserError(f"cannot read {folder / 'meta.json'}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise _damaged(folder, "meta.json is not JSON") from error
    version = meta.get("format_version") if isinstance(meta, dict) else None
    if type(version) is not int or version != FORMAT_VERSION:
        found = (
            ascii(version)[:40] if isinstance(version, int | float | str | None) else "of no kind"
        )
        raise UserError(
            f"{folder} has format version {found}, this tinylab reads version {FORMAT_VERSION}: delete it and run "
            f"`tinylab prepare --data {folder}`"
        )
    hashes = meta.get("sha256")
    if (
        isinstance(hashes, dict)
        and "meta.json" in hashes
        and hashes["meta.json"] != _meta_sha256(meta)
    ):
        raise _damaged(folder, "meta.json has changed since it was prepared")
    return meta


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key that is there twice")
    return dict(pairs)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _open_file(path: Path) -> BinaryIO:
    """Opens a regular file for reading. A pipe or a device, which may never end, is a damaged data set."""
    if path.exists() and not path.is_file():
        raise _damaged(path.parent, f"{path.name} is not a file")
    return open(path, "rb")


def _open_array(path: Path, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """The .npy file at `path`, memory-mapped; its header must be just the one of this shape and type.

    `np.load` would evaluate whatever stands in the header, and open other kinds of files too.
    """
    wanted = f"{{'descr': {np.lib.format.dtype_to_descr(np.dtype(dtype))!r}, 'fortran_order': False, 'shape': {shape}, }}"
    try:
        with _open_file(path) as file:
            magic = file.read(10)
            if magic[:8] != b"\x93NUMPY\1\0":
                raise _damaged(path.parent, f"{path.name} is cut short or no array")
            header = file.read(int.from_bytes(magic[8:], "little")).decode("latin-1")
            offset, size = file.tell(), os.fstat(file.fileno()).st_size
        if header.rstrip(" \n") != wanted:
            found = shown(ascii(header.rstrip())[1:-1])
            raise _damaged(
                path.parent,
                f"{path.name} is no {np.dtype(dtype)}{shape} array, it has the header {found}",
            )
        if size != offset + math.prod(shape) * np.dtype(dtype).itemsize or 0 in shape:
            raise _damaged(path.parent, f"{path.name} has the wrong size")
        return np.memmap(path, dtype, "r", offset, shape)
    except FileNotFoundError as error:
        raise _damaged(path.parent, f"{path.name} is missing") from error
    except (OSError, ValueError) as error:
        raise _damaged(path.parent, f"{path.name} is cut short or no array") from error


def _damaged(folder: Path, problem: str) -> UserError:
    return UserError(
        f"{folder} is damaged: {problem}; delete it and run `tinylab prepare --data {folder}`"
    )


# --- Preparing --------------------------------------------------------------------------------------------------------


def prepare(
    source: str | Path = "auto",
    folder: Path = FOLDER,
    workers: int | None = None,
    progress: bool = True,
) -> Dataset:
    """The data set in `folder`, decoded from `source` first if it is not there yet.

    `source` is 'auto', a URL, a zip or a folder (see `archive.find`; downloads go beside `folder`). A folder that is
    complete is opened at once, whatever `source` says. `workers` processes decode (default: one per core, at most 8; 1:
    none beside this one). Any number of processes may call this at once: one builds, the others wait and open.

    Raises `UserError` when the source cannot be had, is broken or has another layout, naming the file at fault; when
    'auto' or a built-in address gives Tiny ImageNet's classes with other than the published files; and when `folder`
    cannot be written. Nothing is left behind then, nor after an interrupt.
    """
    folder = Path(folder)
    if workers is not None and workers < 1:
        raise UserError(f"workers must be at least 1, not {workers}")
    try:
        if _is_prepared(folder):
            return open_dataset(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with archive.locked(folder, f"another process is preparing {folder}; waiting for it"):
            if not _is_prepared(folder):
                for stray in folder.parent.glob(f"{glob.escape(folder.name)}.building-*"):
                    shutil.rmtree(stray)  # whoever built there is gone: the lock is ours
                with archive.open_archive(archive.find(source, folder.parent)) as opened:
                    _build(
                        opened,
                        folder,
                        workers or min(available_cores(), 8),
                        progress,
                        str(source) in ("auto", *URLS),
                    )
    except OSError as error:
        raise UserError(
            f"cannot write {folder}: {error.strerror or error}; choose another place with --data"
        ) from error
    return open_dataset(folder)


def _is_prepared(folder: Path) -> bool:
    """Whether a data set is there. Raises `UserError` when something else is, which must not be replaced."""
    if (folder / "meta.json").exists():
        return True
    if folder.exists() and not (folder.is_dir() and next(folder.iterdir(), None) is None):
        raise UserError(
            f"{folder} exists, but is no data set: choose another place with --data, or move it away"
        )
    return False


def _build(source: Archive, folder: Path, workers: int, progress: bool, strict: bool) -> None:
    need = len(source.files) * (_IMAGE_BYTES + 6) + _MARGIN_BYTES
    free = shutil.disk_usage(folder.parent).free
    if free < need:
        raise UserError(
            f"{folder} needs {need:,} bytes, its disk has {free:,} free: make room or use another --data"
        )
    building = folder.with_name(f"{folder.name}.building-{os.getpid()}")
    try:
        building.mkdir()
        _write(source, building, workers, progress, strict)
        building.rename(folder)
    except OSError as error:
        raise UserError(
            f"cannot write {folder}: {error.strerror or error}; it needs {need:,} bytes and permission to write"
        ) from error
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, perhaps for lack of memory: try again with workers=1"
        ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _write(source: Archive, building: Path, workers: int, progress: bool, strict: bool) -> None:
    """Fills the folder `building` with the three arrays and meta.json."""
    count = len(source.files)
    labels = np.array([file.label for file in source.files], dtype=np.int16)
    boxes = np.array([file.box for file in source.files], dtype=np.uint8).reshape(count, 4)
    hashes = {}
    for name, array in (("labels.npy", labels), ("boxes.npy", boxes)):
        np.save(building / name, array)
        hashes[name] = hashlib.sha256((building / name).read_bytes()).hexdigest()
    digests, hashes["images.npy"] = _write_images(
        source, building / "images.npy", workers, progress
    )
    content = archive.content_sha256(source.files, source.wnids, digests)
    _check_identity(source, content, strict)
    meta = {
        "format_version": FORMAT_VERSION,
        "is_tiny_imagenet": content == CONTENT_SHA256,
        "content_sha256": content,
        "train_count": source.train_count,
        "val_count": count - source.train_count,
        "sha256": hashes,
        "wnids": source.wnids,
        "names": source.names,
    }
    hashes["meta.json"] = _meta_sha256(meta)
    (building / "meta.json").write_bytes(_meta_bytes(meta))


def _check_identity(source: Archive, content: str, strict: bool) -> None:
    """Says when these are not the published files; `strict`: the caller wanted those and no others."""
    if content == CONTENT_SHA256:
        return
    if archive.has_published_classes(source.wnids):
        problem = f"{source.path} has Tiny ImageNet's classes, but not its published files (content sha256 {content})"
        if strict:
            raise UserError(
                f"{problem}: get an unmodified copy, or name this one with --source to use it all the same"
            )
        print(f"note: {problem}", file=sys.stderr)
    elif strict:
        print(
            f"note: {source.path} is not Tiny ImageNet, it has {len(source.wnids)} other classes",
            file=sys.stderr,
        )


def _write_images(
    source: Archive, path: Path, workers: int, progress: bool
) -> tuple[list[str], str]:
    """Decodes all images into the .npy file at `path`; returns the sha256 of every JPEG file, and that of `path`."""
    names = [file.path for file in source.files]
    chunks = [names[first : first + _CHUNK_IMAGES] for first in range(0, len(names), _CHUNK_IMAGES)]
    with open(path, "wb") as file:
        shape = (len(names), IMAGE_SIDE, IMAGE_SIDE, 3)
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|u1", "fortran_order": False, "shape": shape}
        )
        offsets = [
            file.tell() + index * _CHUNK_IMAGES * _IMAGE_BYTES for index in range(len(chunks))
        ]
        _reserve(file, file.tell() + len(names) * _IMAGE_BYTES)
    digests: list[str] = []
    whole = hashlib.sha256()
    bar = tqdm(
        total=len(names),
        desc="decoding",
        unit=" images",
        mininterval=0.3,
        disable=not (progress and interactive()),
    )
    # Unbuffered, so that nothing is read before its chunk is written.
    with (
        bar,
        _decoders(source.members, path, min(workers, len(chunks))) as run,
        open(path, "rb", buffering=0) as written,
    ):
        whole.update(written.read(offsets[0]))
        for chunk_digests in run(chunks, offsets):
            whole.update(written.read(len(chunk_digests) * _IMAGE_BYTES))
            digests += chunk_digests
            bar.update(len(chunk_digests))
    return digests, whole.hexdigest()


def _reserve(file: BinaryIO, size: int) -> None:
    """Takes the disk space for `size` bytes now: on a full disk this fails before any work is done."""
    file.flush()
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
    zeros = bytes(1 << 20)  # this platform or file system cannot reserve, but it can write
    while file.tell() < size:
        file.write(zeros[: size - file.tell()])


# --- Decoding, in worker processes ------------------------------------------------------------------------------------


@contextlib.contextmanager
def _decoders(
    source: Members, target: Path, workers: int
) -> Iterator[Callable[..., Iterator[list[str]]]]:
    """A function (chunks, offsets) that decodes chunk after chunk in `workers` processes; results come in order."""
    if workers == 1:
        decoder = _Decoder(source, target)
        yield lambda chunks, offsets: map(decoder, chunks, offsets)
        return
    # Forked workers start in milliseconds and need no `if __name__ == "__main__"` in the caller's script. They touch
    # neither CUDA nor threads of this process. Elsewhere than on Linux forking is not safe.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (source, target)) as pool:
        try:
            yield lambda chunks, offsets: pool.map(_decode_in_worker, chunks, offsets)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True)
class _Decoder:
    """Decodes images of an archive into the .npy file at `target`."""

    source: Members
    target: Path

    def __call__(self, names: Sequence[str], offset: int) -> list[str]:
        """Writes the pixels of the files `names` from byte `offset` on; returns each file's sha256."""
        digests = []
        pixels = np.empty((len(names), IMAGE_SIDE, IMAGE_SIDE, 3), dtype=np.uint8)
        for row, name in enumerate(names):
            jpeg = self.source.read(name)
            digests.append(hashlib.sha256(jpeg).hexdigest())
            pixels[row] = _decode(jpeg, name)
        # Written, not memory-mapped: a full disk is an exception then, and the pages do not count as this process's.
        with open(self.target, "r+b") as file:
            file.seek(offset)
            file.write(pixels.data)
        return digests


_decoder: _Decoder | None = None  # of this worker process


def _start_worker(source: Members, target: Path) -> None:
    global _decoder
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # they may reach all processes; the first one ends the others
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    source.reopen()
    _decoder = _Decoder(source, target)


def _die_with_parent() -> None:
    # A worker whose parent was killed would wait for work for ever.
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _decode_in_worker(names: Sequence[str], offset: int) -> list[str]:
    return _decoder(names, offset)


def _decode(jpeg: bytes, name: str) -> np.ndarray:
    """The image, uint8 (64, 64, 3), RGB. Raises `UserError` naming the file when it cannot be decoded.

    Small damage inside the picture data goes through, as libjpeg mends it silently: zips tell it by their CRC-32, and
    Tiny ImageNet by its content hash.
    """
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            Image.open(io.BytesIO(jpeg), formats=["JPEG"]) as image,
        ):
            if image.size != (IMAGE_SIDE, IMAGE_SIDE):
                problem = f"has {image.width} x {image.height} pixels instead of {IMAGE_SIDE} x {IMAGE_SIDE}"
                raise UserError(f"{shown(name)} {problem}; use an unmodified copy of the archive")
            if image.mode not in ("L", "RGB", "CMYK"):
                raise UserError(
                    f"{shown(name)} is neither grey, RGB nor CMYK; use an unmodified copy of the archive"
                )
            return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    except UserError:
        raise
    except Exception as error:  # Pillow raises many kinds for broken files, SyntaxError among them
        raise UserError(
            f"{shown(name)} is not a sound JPEG file; use an unmodified copy of the archive"
        ) from error


def available_cores() -> int:
    """Cores this process may use (a container's or a batch system's share, not the whole machine's)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

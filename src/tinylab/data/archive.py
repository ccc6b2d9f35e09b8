"""Tiny ImageNet as it is published: find it, download it, check it, and list its labelled files in one order.

The archive (248 MB, Stanford's CS231n course) holds

    tiny-imagenet-200/wnids.txt                              the 200 classes, one WordNet id per line, unsorted
    tiny-imagenet-200/words.txt                              wnid <tab> names, for all of WordNet
    tiny-imagenet-200/train/<wnid>/<wnid>_boxes.txt          file <tab> x0 <tab> y0 <tab> x1 <tab> y1
    tiny-imagenet-200/train/<wnid>/images/<wnid>_<n>.JPEG    500 per class, 64 x 64
    tiny-imagenet-200/val/val_annotations.txt                file <tab> wnid <tab> x0 <tab> y0 <tab> x1 <tab> y1
    tiny-imagenet-200/val/images/val_<n>.JPEG                50 per class
    tiny-imagenet-200/test/                                  10,000 images without labels: never read, may be missing

Nothing is ever extracted: files are read one by one, from the zip or from a folder in which somebody extracted it.
"""

import contextlib
import errno
import hashlib
import io
import os
import re
import shutil
import stat
import struct
import sys
import tempfile
import time
import unicodedata
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from itertools import islice, pairwise
from pathlib import Path
from typing import Self

from filelock import FileLock, Timeout
from tqdm import tqdm

from tinylab.exceptions import UserError

if sys.platform != "win32":
    import fcntl

URLS = (
    "https://cs231n.stanford.edu/tiny-imagenet-200.zip",
    "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    # Unmodified copies: others report the same byte count and md5. A mirror need not be trusted, its bytes are checked.
    "https://zenodo.org/records/10720917/files/tiny-imagenet-200.zip?download=1",
    "https://huggingface.co/datasets/cnak47/cv-datasets/resolve/main/tiny-imagenet-200.zip",
)
"""Where the archive is downloaded from, in this order."""

ZIP_BYTES = 248_100_043
ZIP_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
ZIP_SHA256 = "6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462022fe5e43c821"
CONTENT_SHA256 = "64bbbec8d50fdc7e7606fa6d82e82a07b000c2b97e23d9d6121434e711dc6b8f"
"""`content_sha256` of the published archive: the same for the zip, a folder, or a zip packed anew."""
WNIDS_SHA256 = "342d6acf18911d62da4c981221f833718a3ef8299e55512239e09c64e49a344c"
"""sha256 of the 200 sorted wnids, each followed by a newline."""
LISTS_SHA256 = "a489fe6c802c0be1333defea26502e125e31f3196131021c687cd4714e4da14c"
"""`_lists_sha256` of the published archive: what `content_sha256` does not cover."""

NAME = "tiny-imagenet-200"
IMAGE_SIDE = 64
"""Pixels per side of every image; boxes lie in 0..63, corners included."""

# What an honest archive stays far below (its largest image has 3,195 bytes, its largest text 2.6 MB).
_IMAGE_LIMIT = 64 * 1024
_TEXT_LIMIT = 8 * 1024 * 1024
_TOTAL_LIMIT = 400_000_000
_RATIO_LIMIT = 100
_MEMBER_LIMIT = 250_000
_DIRECTORY_LIMIT = 64 * 1024 * 1024
_NAME_LIMIT = 200  # characters
_CLASS_LIMIT = 32_767  # labels are int16
_DOWNLOAD_LIMIT = 1_000_000_000
_MARGIN_BYTES = 16 * 1024 * 1024
_SILENCE = 30.0  # seconds without a byte after which a server is given up


# The files that are read, all others are left alone. No image begins with a dot: desktops leave such files in folders.
_IMAGE = r"images/[^/.][^/]*(?i:\.jpe?g)"
_NEEDED = re.compile(
    rf"wnids\.txt|words\.txt|train/([^/]+)/(\1_boxes\.txt|{_IMAGE})|val/(val_annotations\.txt|{_IMAGE})"
)

# What zipfile raises for damage, now here, now there. UnicodeDecodeError is a ValueError.
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    NotImplementedError,
    ValueError,
    OverflowError,
    struct.error,
)

Box = tuple[int, int, int, int]
"""x0, y0, x1, y1 in pixels, 0..63, corners included. A few hundred have no area; they stay as published."""


@dataclass(frozen=True, slots=True)
class LabelledFile:
    """One image: its path in the archive, its label and the box of its object."""

    path: str
    """`train/<wnid>/images/<file>` or `val/images/<file>`."""
    label: int
    """Index into the sorted wnids."""
    box: Box


def content_sha256(
    files: Iterable[LabelledFile], wnids: Sequence[str], digests: Iterable[str]
) -> str:
    """The identity of a data set, whatever it is packed in.

    sha256, as hexadecimal text, over one line `<path> <wnid> <sha256 of the file>` per labelled file in canonical
    order; `digests` are the files' sha256 as hexadecimal text, in the same order.
    """
    total = hashlib.sha256()
    for file, digest in zip(files, digests, strict=True):
        total.update(f"{file.path} {wnids[file.label]} {digest}\n".encode())
    return total.hexdigest()


def interactive() -> bool:
    """Whether somebody may be watching the output, in a terminal or a notebook: then there are progress bars."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def class_order_sha256(wnids: Sequence[str]) -> str:
    """The identity of classes in their order: sha256, as hexadecimal text, of the wnids, each followed by a newline."""
    return hashlib.sha256("".join(f"{wnid}\n" for wnid in wnids).encode()).hexdigest()


def has_published_classes(wnids: Sequence[str]) -> bool:
    """Whether these sorted wnids are Tiny ImageNet's 200 classes."""
    return class_order_sha256(wnids) == WNIDS_SHA256


# --- Reading: a zip and a folder offer the same methods ---------------------------------------------------------------


class ZipMembers:
    """The files of a zip, by their names below the archive's root folder."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with _Directory(path) as file:
                self._zip = zipfile.ZipFile(file)
            self.reopen()
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error
        except (*_ZIP_ERRORS, EOFError) as error:
            raise _refusal(path, "it is not a zip file, or it is cut short") from error
        members = {info.filename: info for info in self._zip.infolist()}
        root = "" if "wnids.txt" in members else f"{NAME}/"
        below_root = (
            (name.removeprefix(root), info)
            for name, info in members.items()
            if name.startswith(root)
        )
        self._infos = {name: info for name, info in below_root if _NEEDED.fullmatch(name)}

    def names(self) -> list[str]:
        """Names of the labelled files and the lists. Raises `UserError` when a member of the zip is dangerous."""
        _check_members(self.path, self._zip.infolist())
        for info in self._infos.values():
            _check_needed(self.path, info)
        _check_places(self.path, self._zip.infolist(), self._zip.start_dir)
        if sum(info.file_size for info in self._infos.values()) > _TOTAL_LIMIT:
            raise _refusal(self.path, f"its files would take more than {_TOTAL_LIMIT:,} bytes")
        return list(self._infos)

    def read(self, name: str, limit: int = _IMAGE_LIMIT) -> bytes:
        """Content of one file, checked against the zip's CRC-32. Raises `UserError` naming the file when damaged."""
        info = self._infos[name]
        try:
            if info.file_size > limit:
                raise _refusal(self.path, f"{shown(name)} has more than {limit:,} bytes")
            with self._zip.open(info) as member:
                # With a size, zipfile stops unpacking there: a member that lies about its size cannot fill the memory.
                content = member.read(info.file_size)
        except OSError as error:
            raise UserError(
                f"cannot read {shown(name)} in {self.path}: {error.strerror or error}"
            ) from error
        except (*_ZIP_ERRORS, EOFError, RuntimeError) as error:
            raise _refusal(self.path, f"{shown(name)} is damaged ({shown(str(error))})") from error
        if len(content) != info.file_size or (
            not content and info.CRC
        ):  # of no bytes zipfile checks nothing
            raise _refusal(self.path, f"{shown(name)} is shorter than it should be")
        return content

    def reopen(self) -> None:
        """To be called in a forked process, which else would share its file position with the others.

        Opening the zip anew would do too, but parsing 110,000 entries takes half a second. A process that is not forked
        receives this object pickled, which is the zip opened anew.
        """
        self._zip.fp = open(self.path, "rb")  # noqa: SIM115 (`close` closes it)

    def __reduce__(self) -> tuple:
        return ZipMembers, (self.path,)

    def close(self) -> None:
        file = self._zip.fp
        self._zip.close()
        if file is not None:  # a ZipFile closes only what it opened itself
            file.close()


class _Directory(io.FileIO):
    """A zip's file while its directory is read, which with millions of members would fill the memory."""

    def read(self, size: int = -1) -> bytes:
        if size > _DIRECTORY_LIMIT:
            raise _refusal(Path(self.name), f"its directory would take {size:,} bytes")
        content = super().read(size)
        if content.count(b"PK\1\2") > _MEMBER_LIMIT:  # every entry begins so
            raise _refusal(Path(self.name), f"it has more than {_MEMBER_LIMIT:,} members")
        return content


class FolderMembers:
    """The files of an extracted archive, by their names below its root folder."""

    def __init__(self, path: Path):
        self.path = path
        self._root = path if (path / "wnids.txt").exists() else path / NAME

    def names(self) -> list[str]:
        """Names of the labelled files and the lists. Raises `UserError` when a link leaves the folder."""
        try:
            found = (
                self._walk("", os.path.realpath(self._root), depth=4)
                if self._root.is_dir()
                else iter(())
            )
            names = list(islice(found, _MEMBER_LIMIT + 1))
        except OSError as error:
            raise UserError(
                f"cannot read {shown(error.filename or self.path)}: {error.strerror}"
            ) from error
        if len(names) > _MEMBER_LIMIT:
            raise _refusal(self.path, f"it has more than {_MEMBER_LIMIT:,} files")
        return names

    def _walk(self, below: str, root: str, depth: int) -> Iterator[str]:
        # The layout is four levels deep; stopping there also ends loops of links.
        with os.scandir(self._root / below) as entries:
            for entry in entries:
                name = f"{below}{entry.name}"
                if entry.is_dir():
                    if depth > 1 and (below or name in ("train", "val")):
                        self._check_link(entry, root)
                        yield from self._walk(f"{name}/", root, depth - 1)
                elif _NEEDED.fullmatch(name) and entry.is_file():
                    self._check_link(entry, root)
                    yield name

    def _check_link(self, entry: os.DirEntry, root: str) -> None:
        if entry.is_symlink() and not Path(os.path.realpath(entry.path)).is_relative_to(root):
            raise _refusal(self.path, f"{shown(entry.path)} is a link that leaves the folder")

    def read(self, name: str, limit: int = _IMAGE_LIMIT) -> bytes:
        """Content of one file. Raises `UserError` naming the file when it cannot be read or is far too large."""
        try:
            with open(self._root / name, "rb") as file:
                content = file.read(limit + 1)
        except OSError as error:
            raise UserError(
                f"cannot read {shown(name)} in {self.path}: {error.strerror}"
            ) from error
        if len(content) > limit:
            raise _refusal(self.path, f"{shown(name)} has more than {limit:,} bytes")
        return content

    def reopen(self) -> None:
        """Nothing to do: every read opens its file."""

    def close(self) -> None:
        """Nothing to do: every read closes its file."""


Members = ZipMembers | FolderMembers


def _check_members(path: Path, infos: Sequence[zipfile.ZipInfo]) -> None:
    """No member may be dangerous to those who do extract the archive, or be read differently by another program."""
    is_folder: dict[str, bool] = {}
    parents = set()
    for info in infos:
        name = info.orig_filename  # as it stands in the zip; zipfile cuts `filename` at a NUL
        if (
            name[:1] == "/"
            or name[1:2] == ":"
            or "\\" in name
            or ".." in name.split("/")
            or not name.isprintable()
        ):
            raise _refusal(path, f"the member {shown(name)} has an unsafe path")
        if len(name) > 255:
            raise _refusal(
                path, f"the member {shown(name)} has an unsafe path, longer than 255 characters"
            )
        key = name.rstrip("/").casefold()
        if key in is_folder:
            raise _refusal(path, f"the member {shown(name)} is there twice")
        is_folder[key] = info.is_dir()
        parents.add(key.rpartition("/")[0])
        # Zips packed outside Unix leave the file type at 0.
        if stat.S_IFMT(info.external_attr >> 16) not in (
            0,
            stat.S_IFDIR if info.is_dir() else stat.S_IFREG,
        ):
            raise _refusal(path, f"the member {shown(name)} is not a regular file")
    for name in parents:
        if is_folder.get(name) is False:
            raise _refusal(path, f"the member {shown(name)} is both a file and a folder")


def _check_places(path: Path, infos: Sequence[zipfile.ZipInfo], end: int) -> None:
    """No two members may share bytes of the zip: a small one would unfold without end."""
    ordered = sorted(infos, key=lambda info: info.header_offset)
    starts = (*(info.header_offset for info in ordered), end)
    for info, (start, following) in zip(ordered, pairwise(starts), strict=True):
        # 30 bytes and the name stand in front of every member's content, at least.
        if start < 0 or start + 30 + len(info.orig_filename) + info.compress_size > following:
            raise _refusal(path, f"the member {shown(info.orig_filename)} overlaps another one")


def _check_needed(path: Path, info: zipfile.ZipInfo) -> None:
    limit = _TEXT_LIMIT if info.filename.endswith(".txt") else _IMAGE_LIMIT
    if info.flag_bits & 1:
        raise _refusal(path, f"{shown(info.filename)} is encrypted")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise _refusal(path, f"{shown(info.filename)} is packed with an unusual method")
    if info.file_size > limit:
        raise _refusal(path, f"{shown(info.filename)} has more than {limit:,} bytes")
    # Packing never lengthens a file by more than a few bytes.
    if (
        info.file_size > _RATIO_LIMIT * info.compress_size
        or info.compress_size > info.file_size + 1024
    ):
        raise _refusal(path, f"{shown(info.filename)} states sizes that cannot be true")


def _refusal(path: Path, problem: str) -> UserError:
    return UserError(f"{path}: {problem}; use an unmodified copy of {NAME}.zip")


def shown(text: object) -> str:
    """A name from an archive as it may be printed: one line, no control characters, not endless."""
    text = str(text)
    return (text if text.isprintable() else ascii(text))[:120]


# --- The layout ------------------------------------------------------------------------------------------------------


class Archive:
    """The labelled files of Tiny ImageNet, or of anything packed like it. Made by `open_archive`; a context manager.

    Attributes:
        path: the zip or folder.
        members: its files by their paths, for reading in other processes.
        wnids: the classes, sorted; a label is an index into it.
        names: each class's first name in words.txt, or its wnid where that is silent.
        files: all labelled files in canonical order: training by sorted wnid, then sorted file name; then validation in
            the order of val_annotations.txt.
        train_count: how many of `files` are training images.
    """

    def __init__(self, members: Members):
        self.path = members.path
        self.members = members
        self._folders: dict[str, list[str]] = defaultdict(list)
        for name in members.names():
            folder, _, file = name.rpartition("/")
            self._folders[folder].append(file)
        self.wnids = self._read_wnids()
        self.names = self._read_names()
        train = self._train_files()
        self.files = (*train, *self._validation_files())
        self.train_count = len(train)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.members.close()

    def read(self, file: LabelledFile) -> bytes:
        """The JPEG file's bytes. Raises `UserError` naming the file when it is damaged."""
        return self.members.read(file.path)

    def _lines(self, name: str) -> Iterator[str]:
        folder, _, file = name.rpartition("/")
        if file not in self._folders[folder]:
            raise _refusal(self.path, f"{name} is missing")
        try:
            text = self.members.read(name, _TEXT_LIMIT).decode("utf-8")
        except UnicodeDecodeError as error:
            raise _refusal(self.path, f"{name} is not UTF-8 text") from error
        for line in io.StringIO(
            text
        ):  # one by one: as a list, millions of short lines would fill the memory
            line = line.removesuffix("\n").removesuffix("\r")
            if line:
                yield line

    def _read_wnids(self) -> tuple[str, ...]:
        if "wnids.txt" not in self._folders[""]:
            raise UserError(
                f"{self.path} is not Tiny ImageNet: it has no wnids.txt; use a copy of {NAME}.zip"
            )
        wnids = list(islice(self._lines("wnids.txt"), _CLASS_LIMIT + 1))
        if not wnids:
            raise _refusal(self.path, "wnids.txt names no class")
        if len(wnids) > _CLASS_LIMIT:
            raise _refusal(self.path, f"wnids.txt names more than {_CLASS_LIMIT:,} classes")
        if not all(wnid.isprintable() for wnid in wnids):
            raise _refusal(self.path, "wnids.txt names a class with control characters")
        wnid, count = Counter(wnids).most_common(1)[0]
        if count > 1:
            raise _refusal(self.path, f"wnids.txt names {shown(wnid)} more than once")
        folders = {folder.split("/")[1] for folder in self._folders if folder.startswith("train/")}
        for wnid in sorted(set(wnids) - folders):
            raise _refusal(
                self.path, f"the class {shown(wnid)} of wnids.txt has no folder in train/"
            )
        for folder in sorted(folders - set(wnids)):
            raise _refusal(
                self.path, f"train/ has the class {shown(folder)}, which wnids.txt does not name"
            )
        return tuple(sorted(wnids))

    def _read_names(self) -> tuple[str, ...]:
        names = dict.fromkeys(self.wnids, "")
        for line in self._lines("words.txt"):
            wnid, _, synonyms = line.partition("\t")
            if wnid in names:
                names[wnid] = printable(synonyms.partition(",")[0])
        return tuple(name or wnid for wnid, name in names.items())

    def _train_files(self) -> list[LabelledFile]:
        images = {wnid: sorted(self._folders[f"train/{wnid}/images"]) for wnid in self.wnids}
        self._check_equal_counts("train/", {wnid: len(files) for wnid, files in images.items()})
        result = []
        for label, wnid in enumerate(self.wnids):
            boxes = self._boxes_of_class(wnid, images[wnid])
            result += [
                LabelledFile(f"train/{wnid}/images/{file}", label, boxes[file])
                for file in images[wnid]
            ]
        return result

    def _boxes_of_class(self, wnid: str, files: Sequence[str]) -> dict[str, Box]:
        where = f"train/{wnid}/{wnid}_boxes.txt"
        boxes = {}
        present = set(files)
        for line in self._lines(where):
            file, *numbers = line.split("\t")
            if file not in present:
                raise _refusal(
                    self.path, f"{shown(where)} has a box for {shown(file)}, which is missing"
                )
            boxes[file] = self._box(numbers, where, line)
        for file in sorted(present - boxes.keys()):
            raise _refusal(self.path, f"{shown(where)} has no box for {shown(file)}")
        return boxes

    def _validation_files(self) -> list[LabelledFile]:
        where = "val/val_annotations.txt"
        labels = {wnid: label for label, wnid in enumerate(self.wnids)}
        present = set(self._folders["val/images"])
        files: dict[str, LabelledFile] = {}
        for line in self._lines(where):
            file, _, rest = line.partition("\t")
            wnid, *numbers = rest.split("\t")
            if wnid not in labels:
                raise _refusal(
                    self.path, f"{where} gives {shown(file)} the unknown class {shown(wnid)!r}"
                )
            if file in files:
                raise _refusal(self.path, f"{where} lists {shown(file)} more than once")
            if file not in present:
                raise _refusal(
                    self.path, f"{where} lists {shown(file)}, which is not in val/images/"
                )
            files[file] = LabelledFile(
                f"val/images/{file}", labels[wnid], self._box(numbers, where, line)
            )
        for file in sorted(present - files.keys()):
            raise _refusal(self.path, f"val/images/{shown(file)} is not listed in {where}")
        counts = Counter(file.label for file in files.values())
        self._check_equal_counts("val/", {wnid: counts[label] for wnid, label in labels.items()})
        return list(files.values())

    def _check_equal_counts(self, where: str, counts: dict[str, int]) -> None:
        usual = Counter(counts.values()).most_common(1)[0][0]
        for wnid, count in counts.items():
            if count == 0 or count != usual:
                raise _refusal(
                    self.path,
                    f"{where} has {count} images of {shown(wnid)}, of other classes {usual}",
                )

    def _box(self, numbers: Sequence[str], where: str, line: str) -> Box:
        try:
            x0, y0, x1, y1 = map(int, numbers)
        except ValueError as error:
            raise _refusal(
                self.path, f"{shown(where)} has a line without a box: {shown(line)!r}"
            ) from error
        if min(x0, y0, x1, y1) < 0 or max(x0, y0, x1, y1) >= IMAGE_SIDE:
            raise _refusal(
                self.path, f"{shown(where)} has a box outside the image: {shown(line)!r}"
            )
        return x0, y0, x1, y1


def open_archive(path: Path) -> Archive:
    """The labelled files of the zip or folder at `path`, with or without the root folder `tiny-imagenet-200/`.

    About two seconds for the real archive. Raises `UserError`, naming the culprit, when the zip is broken or dangerous
    to extract, when it is not Tiny ImageNet's layout, or when its lists and its files disagree.
    """
    path = Path(path)
    if path.exists() and not (
        path.is_file() or path.is_dir()
    ):  # reading a pipe would wait for ever
        raise UserError(f"cannot read {path}: it is neither a file nor a folder")
    members = FolderMembers(path) if path.is_dir() else ZipMembers(path)
    try:
        return Archive(members)
    except BaseException:
        members.close()
        raise


def verify_archive(path: Path) -> str:
    """Reads all of the zip or folder at `path`, and says in one line what it is. Nothing is decoded.

    A zip may be the published one, byte for byte. Else every file that is needed is read, a zip's against its CRC-32,
    and content, classes, names and boxes are compared with the published ones.

    Raises `UserError` naming the first file that is damaged; when the zip has the published size, but other bytes; when
    it has Tiny ImageNet's classes, but not its published files.
    """
    path = Path(path)
    difference = (
        _difference(path, ZIP_BYTES, ZIP_MD5, ZIP_SHA256)
        if path.is_file()
        else "a folder has no hash"
    )
    if difference is None:
        return f"{path} is the published archive: {ZIP_BYTES:,} bytes, md5 {ZIP_MD5}, sha256 {ZIP_SHA256}"
    with open_archive(path) as opened:
        digests = (hashlib.sha256(opened.read(file)).hexdigest() for file in opened.files)
        content = content_sha256(opened.files, opened.wnids, digests)
        lists = _lists_sha256(opened)
    if path.is_file() and path.stat().st_size == ZIP_BYTES:
        raise _refusal(
            path, f"it is damaged: {difference}, though the labelled files in it are whole"
        )
    if content == CONTENT_SHA256 and lists == LISTS_SHA256:
        return f"{path} holds the published files, packed anew (content sha256 {content})"
    if content == CONTENT_SHA256:
        raise _refusal(
            path, "it has the published images, but not the published class names and boxes"
        )
    if has_published_classes(opened.wnids):
        raise _refusal(
            path,
            f"it has Tiny ImageNet's classes, but not its published files (content sha256 {content})",
        )
    counts = f"{len(opened.wnids):,} classes, {len(opened.files):,} labelled images"
    return f"{path} is whole, but not Tiny ImageNet: {counts} (content sha256 {content})"


def _lists_sha256(opened: Archive) -> str:
    """sha256 of the classes, their names and all boxes, in canonical order."""
    total = hashlib.sha256()
    for wnid, name in zip(opened.wnids, opened.names, strict=True):
        total.update(f"{wnid}\t{name}\n".encode())
    for file in opened.files:
        total.update(bytes(file.box))
    return total.hexdigest()


def printable(name: str) -> str:
    """Without control, format and surrogate characters, which would break terminals, tables and file formats.

    Of a name longer than 200 characters, the beginning.
    """
    return "".join(c for c in name if not unicodedata.category(c).startswith("C")).strip()[
        :_NAME_LIMIT
    ]


# --- Finding ----------------------------------------------------------------------------------------------------------


def find(
    source: str | Path = "auto", data_root: Path = Path("data"), urls: Sequence[str] = URLS
) -> Path:
    """The zip or folder that `source` means, downloaded if need be.

    'auto' takes the first of: what $TINY_IMAGENET names, `data_root/tiny-imagenet-200.zip`, the extracted
    `data_root/tiny-imagenet-200/`, the same two in `data/`, a download from `urls` to `data_root`. Anything else is a
    URL (http or https; the file lands in `data_root`), a zip or a folder. What is downloaded from `urls` has passed
    byte count, md5 and sha256.

    Raises `UserError` when there is nothing at the place named, or when the download fails.
    """
    if str(source) == "auto":
        named = os.environ.get("TINY_IMAGENET")
        if named:
            return _existing(named, f"TINY_IMAGENET is set to {named}")
        for root in (Path(data_root), Path("data")):
            if (root / f"{NAME}.zip").is_file():
                return root / f"{NAME}.zip"
            if (root / NAME / "wnids.txt").is_file():
                return root / NAME
        return download(
            urls, Path(data_root) / f"{NAME}.zip", size=ZIP_BYTES, md5=ZIP_MD5, sha256=ZIP_SHA256
        )
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", str(source)):
        target = Path(data_root) / _file_name(str(source))
        if str(source) in urls:
            return download([str(source)], target, size=ZIP_BYTES, md5=ZIP_MD5, sha256=ZIP_SHA256)
        return download([str(source)], target)
    return _existing(source, f"the source is {source}")


def _existing(named: str | Path, statement: str) -> Path:
    path = Path(named)
    with contextlib.suppress(RuntimeError):  # of a user who is not known here
        path = path.expanduser()
    if not (path.is_file() or path.is_dir()):
        raise UserError(
            f"{statement}, but there is no zip file and no folder of that name: correct it or leave it out"
        )
    return path


def _file_name(url: str) -> str:
    """The last part of the URL's path, reduced to characters that are safe everywhere."""
    try:
        name = urllib.parse.unquote(urllib.parse.urlsplit(url).path).rpartition("/")[2]
    except ValueError as error:
        raise UserError(
            f"{shown(url)} is not an address: {error}; correct it or leave it out"
        ) from error
    return re.sub(r"[^A-Za-z0-9._-]", "_", name).strip("._") or f"{NAME}.zip"


# --- Downloading ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(path: Path, waiting: str = "") -> Iterator[None]:
    """Only one process of this machine is inside at a time, for one `path`; a killed one leaves at once.

    The lock is the file `<path>.lock`; where the file system cannot lock, as on some mounted drives, a file in the
    temporary folder. The text `waiting` is printed if another process has it. Raises OSError where neither is possible.
    """
    lock = FileLock(_lock_file(path))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if waiting:
            print(waiting, file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _lock_file(path: Path) -> Path:
    beside = path.with_name(f"{path.name}.lock")
    if sys.platform == "win32":
        return beside
    file = os.open(
        beside, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o666
    )  # a pipe of that name must not block
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return beside  # somebody has it, so it can be locked
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK):
            raise
        key = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:32]
        return Path(tempfile.gettempdir()) / f"tinylab-{os.getuid()}-{key}.lock"
    finally:
        os.close(file)
    return beside


class _Again(Exception):
    """This attempt failed; the next one may not."""


class _NextMirror(Exception):
    """This address will not give the file."""


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https only, and never from https to http."""

    def redirect_request(self, request, response, code, message, headers, new_url):
        old, new = (urllib.parse.urlsplit(url).scheme for url in (request.full_url, new_url))
        if new not in ("http", "https") or (old, new) == ("https", "http"):
            raise _NextMirror(f"redirects to {shown(new_url)}")
        return super().redirect_request(request, response, code, message, headers, new_url)


def download(
    urls: Sequence[str],
    target: Path,
    *,
    size: int | None = None,
    md5: str | None = None,
    sha256: str | None = None,
    tries: int = 3,
    wait: float = 1.0,
) -> Path:
    """Downloads the first of `urls` that gives the right bytes to `target`, and returns `target`.

    Without a hash it must at least end like a zip, which cut files and error pages do not. The bytes gather in
    `<target>.partial`, where a later call continues (only when `sha256` is known: two addresses, or
    one address at two times, may differ); `target` appears by renaming, when `size` (bytes), `md5` and `sha256` are as
    asked. An existing `target` that is right stays untouched. Each address gets `tries` attempts, `wait` seconds apart,
    then twice that, and so on. Only one process at a time downloads to a target.

    Raises `UserError` when no address gives the file, when the disk is too small or when `target` cannot be written.
    """
    target = Path(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target, f"another process is downloading {target}; waiting for it"):
            if target.is_file() and not _difference(target, size, md5, sha256):
                return target
            _download_locked(urls, target, size, md5, sha256, tries, wait)
    except OSError as error:
        with contextlib.suppress(OSError):
            _partial(target).unlink()
        needed = f"{size:,} bytes" if size else "room"
        raise UserError(
            f"cannot write {target}: {error.strerror or error}; it takes {needed} and permission"
        ) from error
    return target


def _partial(target: Path) -> Path:
    return target.with_name(f"{target.name}.partial")


def _download_locked(
    urls: Sequence[str],
    target: Path,
    size: int | None,
    md5: str | None,
    sha256: str | None,
    tries: int,
    wait: float,
) -> None:
    partial = _partial(target)
    problems = []
    for url in urls:
        for attempt in range(tries):
            if sha256 is None:
                partial.unlink(missing_ok=True)
            continued = partial.exists()
            try:
                _fetch(url, partial, size)
                difference = _difference(partial, size, md5, sha256)
                if difference:
                    partial.unlink()
                    # What was there before may be to blame; the address gets another chance.
                    raise _Again(difference) if continued else _NextMirror(difference)
                os.replace(partial, target)
                return
            except _Again as problem:
                problems.append(f"{urllib.parse.urlsplit(url).netloc}: {problem}")
                if attempt + 1 < tries:
                    time.sleep(wait * 2**attempt)
            except _NextMirror as problem:
                problems.append(f"{urllib.parse.urlsplit(url).netloc}: {problem}")
                break
    raise UserError(
        f"cannot download {target.name} ({'; '.join(dict.fromkeys(problems))}): get it by other means and put it at "
        f"{target}, or set TINY_IMAGENET to where it is"
    )


def _fetch(url: str, partial: Path, size: int | None) -> None:
    """One attempt to complete `partial`. Raises `_Again` or `_NextMirror`; OSError only for the local disk."""
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise _NextMirror("only http and https addresses are used")
    have = partial.stat().st_size if partial.exists() else 0
    if size is not None and have >= size:
        if have == size:
            return
        partial.unlink()
        have = 0
    try:
        response = _request(url, have)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:
            partial.unlink(missing_ok=True)
        elif error.code < 500 and error.code not in (408, 429):
            raise _NextMirror(f"HTTP {error.code} {shown(str(error.reason))}") from error
        raise _Again(f"HTTP {error.code} {shown(str(error.reason))}") from error
    except (OSError, HTTPException, ValueError) as error:
        raise _Again(_reason(error)) from error
    with response:
        _save(response, partial, have, size)


def _request(url: str, have: int) -> HTTPResponse:
    opener = urllib.request.OpenerDirector()  # unlike build_opener's, it knows no file: and no ftp:
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _SafeRedirects(),
    ):
        opener.add_handler(handler)
    request = urllib.request.Request(url, headers={"User-Agent": "tinylab"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    return opener.open(request, timeout=_SILENCE)


def _save(response: HTTPResponse, partial: Path, have: int, size: int | None) -> None:
    if response.status != 206:
        have = 0  # the server sends the whole file
    elif not (response.headers.get("Content-Range") or "").startswith(f"bytes {have}-"):
        partial.unlink(missing_ok=True)
        raise _Again("sends another part than the one asked for")
    length = response.headers.get("Content-Length") or ""
    end = have + int(length) if re.fullmatch(r"[0-9]{1,15}", length) else None
    if size is not None and end is not None and end != size:
        raise _NextMirror(f"offers {end:,} bytes instead of {size:,}")
    limit = size or end or _DOWNLOAD_LIMIT
    if limit > _DOWNLOAD_LIMIT:
        raise _NextMirror(f"offers {limit:,} bytes")
    _require_space(partial, (size or end or 0) - have)
    bar = tqdm(
        total=size or end,
        initial=have,
        unit="B",
        unit_scale=True,
        desc=partial.stem,
        mininterval=0.5,
        disable=not interactive(),
    )
    with bar, open(partial, "r+b" if have else "wb") as file:
        file.seek(have)
        while have < limit + 1:
            try:
                block = response.read(1 << 18)
            except (OSError, HTTPException) as error:
                raise _Again(_reason(error)) from error
            if not block:
                break
            if have == 0 and not block.startswith(b"PK"):
                partial.unlink()
                raise _NextMirror("sends a page or something else that is no zip")
            file.write(block)
            have += len(block)
            bar.update(len(block))
    if have > limit:
        partial.unlink()
        raise _NextMirror(f"sends more than {limit:,} bytes")
    if have < (size or end or 0):
        raise _Again(f"the connection ended after {have:,} bytes")


def _require_space(partial: Path, need: int) -> None:
    free = shutil.disk_usage(partial.parent).free
    if free < need + _MARGIN_BYTES:
        raise UserError(
            f"{partial.parent} has {free:,} bytes free, the download needs {need:,}: make room there"
        )


def _difference(path: Path, size: int | None, md5: str | None, sha256: str | None) -> str | None:
    """What about the file at `path` is not as expected, or None. An expectation that is None is not checked."""
    if sha256 is None and not zipfile.is_zipfile(path):
        return "the file is not a zip, or it is cut short"
    if size is not None and path.stat().st_size != size:
        return f"the file has {path.stat().st_size:,} bytes instead of {size:,}"
    for algorithm, expected in (("md5", md5), ("sha256", sha256)):
        if expected is not None:
            with open(path, "rb") as file:
                if hashlib.file_digest(file, algorithm).hexdigest() != expected:
                    return f"the file has the wrong {algorithm}"
    return None


def _reason(error: Exception) -> str:
    inner = getattr(error, "reason", error)
    return shown(getattr(inner, "strerror", None) or str(inner) or type(inner).__name__)

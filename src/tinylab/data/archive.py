"""Tiny ImageNet as it is published: its labelled files in one order.

The archive (248 MB, Stanford's CS231n course) holds

    tiny-imagenet-200/
      wnids.txt                              the 200 classes, unsorted
      words.txt                              wnid <tab> names, for all of WordNet
      train/<wnid>/<wnid>_boxes.txt          file <tab> x0 <tab> y0 <tab> x1 <tab> y1
      train/<wnid>/images/<wnid>_<n>.JPEG    500 per class, 64 x 64
      val/val_annotations.txt                file <tab> wnid <tab> x0 <tab> y0 <tab> x1 <tab> y1
      val/images/val_<n>.JPEG                50 per class
      test/                                  without labels: never read, may be missing

Nothing is extracted: files are read one by one, by an allow-list of names with caps on count and
size, from the zip or from a folder in which somebody extracted it.
"""

import hashlib
import io
import re
import struct
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tinylab.data.download import NAME, ZIP_BYTES, ZIP_SHA256
from tinylab.exceptions import UserError
from tinylab.files import printable

CONTENT_SHA256 = "64bbbec8d50fdc7e7606fa6d82e82a07b000c2b97e23d9d6121434e711dc6b8f"
"""`content_sha256` of the published archive, be it the zip, a folder, or a zip packed anew."""
WNIDS_SHA256 = "342d6acf18911d62da4c981221f833718a3ef8299e55512239e09c64e49a344c"
"""sha256 of the 200 sorted wnids, each followed by a newline."""
LISTS_SHA256 = "a489fe6c802c0be1333defea26502e125e31f3196131021c687cd4714e4da14c"
"""sha256 of the published class names and boxes, which `content_sha256` does not cover."""
IMAGE_SIDE = 64
"""Pixels per side of every image; boxes lie in 0..63, corners included."""

# Far above the published archive: 3,195 bytes in an image, 2.6 MB in a text, 110,203 files.
IMAGE_LIMIT, TEXT_LIMIT, FILE_LIMIT = 64 * 1024, 8 * 1024 * 1024, 250_000
CLASS_LIMIT = 32_767  # labels are int16
IMAGE = r"images/[^/.][^/]*(?i:\.jpe?g)"  # desktops leave files that begin with a dot
NEEDED = re.compile(
    rf"wnids\.txt|words\.txt|train/([^/]+)/(\1_boxes\.txt|{IMAGE})"
    rf"|val/(val_annotations\.txt|{IMAGE})"
)
DAMAGE = (zipfile.BadZipFile, zlib.error, NotImplementedError, ValueError, EOFError, struct.error)
"""What zipfile raises for damage, now here, now there."""

Box = tuple[int, int, int, int]
"""x0, y0, x1, y1 in pixels, corners included. A few hundred have no area, as published."""


@dataclass(frozen=True, slots=True)
class LabelledFile:
    """One image: its path in the archive, its label (index into the sorted wnids) and its box."""

    path: str
    label: int
    box: Box


def content_sha256(
    files: Iterable[LabelledFile], wnids: Sequence[str], digests: Iterable[str]
) -> str:
    """Return the identity of a data set, whatever it is packed in.

    sha256 over a line `<path> <wnid> <sha256 of the file>` per labelled file in canonical order.
    """
    total = hashlib.sha256()
    for file, digest in zip(files, digests, strict=True):
        total.update(f"{file.path} {wnids[file.label]} {digest}\n".encode())
    return total.hexdigest()


def class_order_sha256(wnids: Sequence[str]) -> str:
    """Return the identity of classes in their order: of the wnids, each followed by a newline."""
    return hashlib.sha256("".join(f"{wnid}\n" for wnid in wnids).encode()).hexdigest()


class Archive:
    """The labelled files of Tiny ImageNet, or of anything packed like it.

    wnids: sorted. names: each class's first name in words.txt, or its wnid. files: in canonical
    order, training by sorted wnid and file name, then validation in the order of
    val_annotations.txt; the first `train_count` are training images.
    Raise `UserError`, naming the culprit, for another layout, or lists and files that disagree.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._zip = None if self.path.is_dir() else self._open_zip()
        self._prefix = "" if self._has("wnids.txt") else f"{NAME}/"
        self._folders: dict[str, list[str]] = defaultdict(list)
        for name in self._names():
            folder, _, file = name.rpartition("/")
            self._folders[folder].append(file)
        self.wnids = self._read_wnids()
        names = dict.fromkeys(self.wnids, "")
        for line in self._lines("words.txt"):
            wnid, _, synonyms = line.partition("\t")
            if wnid in names:
                names[wnid] = printable(synonyms.partition(",")[0])
        self.names = tuple(name or wnid for wnid, name in names.items())
        train = self._train_files()
        self.files = (*train, *self._validation_files())
        self.train_count = len(train)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._zip is not None:
            self._zip.close()

    # --- files ---

    def _open_zip(self) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(self.path)
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror or error}") from error
        except DAMAGE as error:
            raise self._refusal("it is not a zip file, or it is cut short") from error

    def _has(self, name: str) -> bool:
        if self._zip is None:
            return (self.path / name).is_file()
        return name in self._zip.NameToInfo

    def _names(self) -> list[str]:
        """Return the names of the files that are read, below the archive's root."""
        if self._zip is None:
            root = self.path / self._prefix
            patterns = ("*.txt", "train/*/*.txt", "train/*/images/*", "val/*.txt", "val/images/*")
            every = (path for pattern in patterns for path in root.glob(pattern))
            names = [path.relative_to(root).as_posix() for path in every if path.is_file()]
        else:
            every = [name for name in self._zip.namelist() if name.startswith(self._prefix)]
            names = [name.removeprefix(self._prefix) for name in every]
        needed = [name for name in names if NEEDED.fullmatch(name)]
        if len(names) > FILE_LIMIT:
            raise self._refusal(f"it has more than {FILE_LIMIT:,} files")
        if len(set(needed)) < len(needed):
            raise self._refusal(f"it has {Counter(needed).most_common(1)[0][0]} twice")
        return needed

    def read(self, name: str, limit: int = IMAGE_LIMIT) -> bytes:
        """Return a file's bytes; a zip's are checked against their CRC-32."""
        try:
            if self._zip is None:
                with open(self.path / self._prefix / name, "rb") as file:
                    content = file.read(limit + 1)
            else:
                # With a size, zipfile stops unpacking there.
                with self._zip.open(self._prefix + name) as member:
                    content = member.read(limit + 1)
        except OSError as error:
            raise UserError(
                f"cannot read {printable(name)} in {self.path}: {error.strerror or error}"
            ) from error
        except (*DAMAGE, RuntimeError) as error:
            raise self._refusal(f"{printable(name)} is damaged ({printable(error)})") from error
        if len(content) > limit:
            raise self._refusal(f"{printable(name)} has more than {limit:,} bytes")
        return content

    def _lines(self, name: str) -> list[str]:
        folder, _, file = name.rpartition("/")
        if file not in self._folders[folder]:
            raise self._refusal(f"{name} is missing")
        try:
            text = self.read(name, TEXT_LIMIT).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._refusal(f"{name} is not UTF-8 text") from error
        return [line.rstrip("\r\n") for line in io.StringIO(text) if line.strip("\r\n")]

    def _refusal(self, problem: str) -> UserError:
        return UserError(f"{self.path}: {problem}; use an unmodified copy of {NAME}.zip")

    # --- lists ---

    def _read_wnids(self) -> tuple[str, ...]:
        if "wnids.txt" not in self._folders[""]:
            raise UserError(
                f"{self.path} is not Tiny ImageNet: it has no wnids.txt; use a copy of {NAME}.zip"
            )
        wnids = self._lines("wnids.txt")
        if not 1 <= len(wnids) <= CLASS_LIMIT:
            raise self._refusal(f"wnids.txt names {len(wnids):,} classes")
        if not all(wnid.isprintable() for wnid in wnids):
            raise self._refusal("wnids.txt names a class with control characters")
        wnid, count = Counter(wnids).most_common(1)[0]
        if count > 1:
            raise self._refusal(f"wnids.txt names {wnid} more than once")
        folders = {folder.split("/")[1] for folder in self._folders if folder.startswith("train/")}
        for wnid in sorted(set(wnids) - folders):
            raise self._refusal(f"the class {wnid} of wnids.txt has no folder in train/")
        for folder in sorted(folders - set(wnids)):
            strange = printable(folder)
            raise self._refusal(f"train/ has the class {strange}, which wnids.txt does not name")
        return tuple(sorted(wnids))

    def _train_files(self) -> list[LabelledFile]:
        result = []
        for label, wnid in enumerate(self.wnids):
            files = sorted(self._folders[f"train/{wnid}/images"])
            where = f"train/{wnid}/{wnid}_boxes.txt"
            boxes = {}
            for line in self._lines(where):
                file, *numbers = line.split("\t")
                boxes[file] = self._box(numbers, where, line)
            if different := sorted(set(files) ^ boxes.keys()):
                raise self._refusal(
                    f"{where} and the images disagree about {printable(different[0])}"
                )
            folder = f"train/{wnid}/images"
            result += [LabelledFile(f"{folder}/{file}", label, boxes[file]) for file in files]
        self._check_equal_counts("train/", result)
        return result

    def _validation_files(self) -> list[LabelledFile]:
        where = "val/val_annotations.txt"
        labels = {wnid: label for label, wnid in enumerate(self.wnids)}
        files: dict[str, LabelledFile] = {}
        for line in self._lines(where):
            file, _, rest = line.partition("\t")
            wnid, *numbers = rest.split("\t")
            if wnid not in labels:
                raise self._refusal(
                    f"{where} gives {printable(file)} the unknown class {printable(wnid)!r}"
                )
            if file in files:
                raise self._refusal(f"{where} lists {printable(file)} more than once")
            box = self._box(numbers, where, line)
            files[file] = LabelledFile(f"val/images/{file}", labels[wnid], box)
        if different := sorted(set(self._folders["val/images"]) ^ files.keys()):
            raise self._refusal(f"{where} and the images disagree about {printable(different[0])}")
        self._check_equal_counts("val/", list(files.values()))
        return list(files.values())

    def _check_equal_counts(self, where: str, files: list[LabelledFile]) -> None:
        counts = Counter(file.label for file in files)
        usual = Counter(counts.values()).most_common(1)[0][0] if counts else 0
        for label, wnid in enumerate(self.wnids):
            if counts[label] == 0 or counts[label] != usual:
                count = f"{counts[label]} images of {wnid}"
                raise self._refusal(f"{where} has {count}, of other classes {usual}")

    def _box(self, numbers: Sequence[str], where: str, line: str) -> Box:
        try:
            x0, y0, x1, y1 = map(int, numbers)
        except ValueError as error:
            raise self._refusal(f"{where} has a line without a box: {printable(line)!r}") from error
        if min(x0, y0, x1, y1) < 0 or max(x0, y0, x1, y1) >= IMAGE_SIDE:
            raise self._refusal(f"{where} has a box outside the image: {printable(line)!r}")
        return x0, y0, x1, y1


def verify_archive(path: Path) -> str:
    """Read all of the zip or folder at `path`, and say in one line what it is. Nothing is decoded.

    Raise `UserError` for damage, and for Tiny ImageNet's classes with other files.
    """
    path = Path(path)
    published_size = path.is_file() and path.stat().st_size == ZIP_BYTES
    if published_size:
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == ZIP_SHA256:
                return f"{path} is the published archive: {ZIP_BYTES:,} bytes, sha256 {ZIP_SHA256}"
    with Archive(path) as opened:
        digests = (hashlib.sha256(opened.read(file.path)).hexdigest() for file in opened.files)
        content = content_sha256(opened.files, opened.wnids, digests)
    lists = hashlib.sha256()
    for wnid, name in zip(opened.wnids, opened.names, strict=True):
        lists.update(f"{wnid}\t{name}\n".encode())
    for file in opened.files:
        lists.update(bytes(file.box))
    problem = None
    if published_size:
        problem = "it has the published size, but other bytes"
    elif content == CONTENT_SHA256 and lists.hexdigest() == LISTS_SHA256:
        return f"{path} holds the published files, packed anew (content sha256 {content})"
    elif content == CONTENT_SHA256:
        problem = "it has the published images, but not the published class names and boxes"
    elif class_order_sha256(opened.wnids) == WNIDS_SHA256:
        problem = f"it has Tiny ImageNet's classes, but other files (content sha256 {content})"
    if problem:
        raise UserError(f"{path}: {problem}; use an unmodified copy of {NAME}.zip")
    counts = f"{len(opened.wnids):,} classes, {len(opened.files):,} labelled images"
    return f"{path} is whole, but not Tiny ImageNet: {counts} (content sha256 {content})"

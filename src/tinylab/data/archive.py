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

Nothing is extracted: files are read one by one, by an allow-list of names with caps on size, from
the zip or from a folder in which somebody extracted it.
"""

import hashlib
import io
import re
import statistics
import struct
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Self

from tinylab.data.download import NAME, ZIP_BYTES, ZIP_SHA256
from tinylab.exceptions import UserError
from tinylab.files import printable
from tinylab.recipe import SIZE

CONTENT_SHA256 = "64bbbec8d50fdc7e7606fa6d82e82a07b000c2b97e23d9d6121434e711dc6b8f"
"""`content_sha256` of the published archive, be it the zip, a folder, or a zip packed anew."""
SAMPLE_SHA256 = "b8c98ddd45bdaaa5f99246cee787b04a9e60a3f5abed3df9f67d1ff93d1e9489"
"""The same of the made-up sample (`synthetic.write_sample`)."""
DATA_NAMES = {CONTENT_SHA256: "Tiny ImageNet", SAMPLE_SHA256: "made-up shapes"}
WNIDS_SHA256 = "342d6acf18911d62da4c981221f833718a3ef8299e55512239e09c64e49a344c"
"""sha256 of the 200 sorted wnids, each followed by a newline."""
LISTS_SHA256 = "a489fe6c802c0be1333defea26502e125e31f3196131021c687cd4714e4da14c"
"""sha256 of the published class names and boxes, which `content_sha256` does not cover."""

# Far above the published archive: 3,195 bytes in an image, 2.6 MB in a text.
IMAGE_LIMIT, TEXT_LIMIT = 64 * 1024, 8 * 1024 * 1024
CLASS_LIMIT = 32_767  # labels are int16
IMAGE = r"images/[^/.][^/]*(?i:\.jpe?g)"  # desktops leave files that begin with a dot
NEEDED = re.compile(
    rf"wnids\.txt|words\.txt|train/([^/]+)/(\1_boxes\.txt|{IMAGE})"
    rf"|val/(val_annotations\.txt|{IMAGE})"
)
DAMAGE = (zipfile.BadZipFile, zlib.error, NotImplementedError, ValueError, EOFError, struct.error)
"""What zipfile raises for damage, now here, now there."""


class LabelledFile(NamedTuple):
    """One image of the archive."""

    path: str
    label: int  # index into the sorted wnids
    box: tuple[int, ...]  # x0 y0 x1 y1, corners included; a few hundred have no area, as published


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


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Archive:
    """The labelled files of Tiny ImageNet, or of anything packed like it.

    wnids: sorted. names: each class's first name in words.txt, or its wnid. files: in canonical
    order, training by sorted wnid and file name, then validation in the order of
    val_annotations.txt; the first `train_count` are training images.
    Raise `UserError`, naming the culprit, for another layout, or lists and files that disagree.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        try:
            self._zip = None if self.path.is_dir() else zipfile.ZipFile(self.path)
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror or error}") from error
        except DAMAGE as error:
            raise self.refusal("it is not a zip file, or it is cut short") from error
        self._folders: dict[str, set[str]] = defaultdict(set)
        for name in self._names():
            folder, _, file = name.rpartition("/")
            self._folders[folder].add(file)

        # ---- classes ----
        self.wnids = self._read_wnids()
        names = dict.fromkeys(self.wnids, "")
        for line in self._lines("words.txt"):
            wnid, _, synonyms = line.partition("\t")
            if wnid in names:
                names[wnid] = printable(synonyms.partition(",")[0])
        self.names = tuple(name or wnid for wnid, name in names.items())

        # ---- labelled files ----
        train = []
        for wnid in self.wnids:
            files = self._annotated(f"train/{wnid}/{wnid}_boxes.txt", f"train/{wnid}/images", wnid)
            train += sorted(files, key=lambda file: file.path)
        val = self._annotated("val/val_annotations.txt", "val/images")
        for where, files in (("train/", train), ("val/", val)):
            counts = Counter(file.label for file in files)
            usual = statistics.mode(counts.values()) if counts else 0
            for label, wnid in enumerate(self.wnids):
                if counts[label] == 0 or counts[label] != usual:
                    count = f"{counts[label]} images of {wnid}"
                    raise self.refusal(f"{where} has {count}, of other classes {usual}")
        self.files, self.train_count = (*train, *val), len(train)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._zip is not None:
            self._zip.close()

    def _names(self) -> list[str]:
        """Return the names of the files that are read, below the archive's root."""
        if self._zip is None:
            self._root = self.path if (self.path / "wnids.txt").is_file() else self.path / NAME
            patterns = ("*.txt", "train/*/*.txt", "train/*/images/*", "val/*.txt", "val/images/*")
            every = (path for pattern in patterns for path in self._root.glob(pattern))
            names = [path.relative_to(self._root).as_posix() for path in every if path.is_file()]
        else:
            names = self._zip.namelist()
            self._root = "" if "wnids.txt" in names else f"{NAME}/"
            names = [n.removeprefix(self._root) for n in names if n.startswith(self._root)]
        needed = [name for name in names if NEEDED.fullmatch(name)]
        if len(set(needed)) < len(needed):
            raise self.refusal(f"it has {statistics.mode(needed)} twice")
        return needed

    def read(self, name: str, limit: int = IMAGE_LIMIT) -> bytes:
        """Return a file's bytes; a zip's are checked against their CRC-32."""
        try:
            with (
                self._zip.open(self._root + name) if self._zip else open(self._root / name, "rb")
            ) as file:
                content = file.read(limit + 1)  # with a size, zipfile stops unpacking there
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"cannot read {printable(name)} in {self.path}: {reason}") from error
        except (*DAMAGE, RuntimeError) as error:
            raise self.refusal(f"{printable(name)} is damaged ({printable(error)})") from error
        if len(content) > limit:
            raise self.refusal(f"{printable(name)} has more than {limit:,} bytes")
        return content

    def _lines(self, name: str) -> list[str]:
        folder, _, file = name.rpartition("/")
        if file not in self._folders[folder]:
            raise self.refusal(f"{name} is missing")
        try:
            text = self.read(name, TEXT_LIMIT).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.refusal(f"{name} is not UTF-8 text") from error
        return [line.rstrip("\r\n") for line in io.StringIO(text) if line.strip("\r\n")]

    def refusal(self, problem: str) -> UserError:
        """Return the error that names the archive and the way out."""
        return UserError(f"{self.path}: {problem}; use an unmodified copy of {NAME}.zip")

    def _read_wnids(self) -> tuple[str, ...]:
        if "wnids.txt" not in self._folders[""]:
            raise self.refusal("it is not Tiny ImageNet: it has no wnids.txt")
        wnids = self._lines("wnids.txt")
        if not 1 <= len(wnids) <= CLASS_LIMIT:
            raise self.refusal(f"wnids.txt names {len(wnids):,} classes")
        if not "".join(wnids).isprintable():
            raise self.refusal("wnids.txt names a class with control characters")
        if len(set(wnids)) < len(wnids):
            raise self.refusal(f"wnids.txt names {statistics.mode(wnids)} more than once")
        folders = {folder.split("/")[1] for folder in self._folders if folder.startswith("train/")}
        if missing := sorted(set(wnids) - folders):
            raise self.refusal(f"the class {missing[0]} of wnids.txt has no folder in train/")
        if others := sorted(folders - set(wnids)):
            raise self.refusal(f"wnids.txt lacks the class {printable(others[0])} of train/")
        return tuple(sorted(wnids))

    def _annotated(self, where: str, folder: str, wnid: str | None = None) -> list[LabelledFile]:
        """Return the images in `folder`, in the order of their list; None: it names the classes."""
        labels = {each: label for label, each in enumerate(self.wnids)}
        files: dict[str, LabelledFile] = {}
        for line in self._lines(where):
            name, *numbers = line.split("\t")
            named = wnid or (numbers.pop(0) if numbers else "")
            problem = None
            try:
                x0, y0, x1, y1 = box = tuple(map(int, numbers))
            except ValueError:
                problem = f"has a line without a box: {printable(line)!r}"
            else:
                if min(box) < 0 or max(box) >= SIZE:
                    problem = f"has a box outside the image: {printable(line)!r}"
            if named not in labels:
                problem = f"gives {printable(name)} the unknown class {printable(named)!r}"
            if name in files:
                problem = f"lists {printable(name)} more than once"
            if problem:
                raise self.refusal(f"{where} {problem}")
            files[name] = LabelledFile(f"{folder}/{name}", labels[named], (x0, y0, x1, y1))
        if different := sorted(self._folders[folder] ^ files.keys()):
            raise self.refusal(f"{where} and the images disagree about {printable(different[0])}")
        return list(files.values())


def verify_archive(path: Path) -> str:
    """Read all of the zip or folder at `path`, and say in one line what it is. Nothing is decoded.

    Raise `UserError` for damage, and for Tiny ImageNet's classes with other files.
    """
    path = Path(path)
    published_size = path.is_file() and path.stat().st_size == ZIP_BYTES
    if published_size and file_sha256(path) == ZIP_SHA256:
        return f"{path} is the published archive: {ZIP_BYTES:,} bytes, sha256 {ZIP_SHA256}"

    with Archive(path) as opened:
        digests = (hashlib.sha256(opened.read(file.path)).hexdigest() for file in opened.files)
        content = content_sha256(opened.files, opened.wnids, digests)
    names = "".join(f"{w}\t{name}\n" for w, name in zip(opened.wnids, opened.names, strict=True))
    lists = hashlib.sha256(names.encode() + b"".join(bytes(file.box) for file in opened.files))

    if published_size:
        problem = "it has the published size, but other bytes"
    elif content == CONTENT_SHA256 and lists.hexdigest() == LISTS_SHA256:
        return f"{path} holds the published files, packed anew (content sha256 {content})"
    elif content == CONTENT_SHA256:
        problem = "it has the published images, but not the published class names and boxes"
    elif class_order_sha256(opened.wnids) == WNIDS_SHA256:
        problem = f"it has Tiny ImageNet's classes, but other files (content sha256 {content})"
    else:
        counts = f"{len(opened.wnids):,} classes, {len(opened.files):,} labelled images"
        return f"{path} is whole, but not Tiny ImageNet: {counts} (content sha256 {content})"
    raise opened.refusal(problem)

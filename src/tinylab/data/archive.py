"""Labelled images in one order: Tiny ImageNet in every layout that people have, or class folders.

The published archive (248 MB, Stanford's CS231n course) holds

    tiny-imagenet-200/
      wnids.txt                              the 200 classes, unsorted
      words.txt                              wnid <tab> names, for all of WordNet
      train/<wnid>/<wnid>_boxes.txt          file <tab> x0 <tab> y0 <tab> x1 <tab> y1
      train/<wnid>/images/<wnid>_<n>.JPEG    500 per class, 64 x 64
      val/val_annotations.txt                file <tab> wnid <tab> x0 <tab> y0 <tab> x1 <tab> y1
      val/images/val_<n>.JPEG                50 per class
      test/                                  without labels: never read, may be missing

Equal to it are: the root under another name or deeper; train/<wnid>/<file>; val/ sorted into class
folders; no words.txt; no boxes. Without a wnids.txt it is anybody's images: <class>/<file>, or
train/<class>/<file> and val/<class>/<file>, also deeper. Nothing is extracted: files are read one
by one from a folder or a zip, with caps on their size; a tar is read once, into memory.
"""

import glob
import hashlib
import io
import posixpath
import re
import sys
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence, Set
from pathlib import Path
from typing import BinaryIO, NamedTuple

from tinylab.data.download import NAME
from tinylab.data.picture import MOST_BYTES
from tinylab.exceptions import UserError
from tinylab.files import printable
from tinylab.recipe import SIZE

CONTENT_SHA256 = "64bbbec8d50fdc7e7606fa6d82e82a07b000c2b97e23d9d6121434e711dc6b8f"
"""`content_sha256` of the published archive, in whatever layout or packing."""
SAMPLE_SHA256 = "b8c98ddd45bdaaa5f99246cee787b04a9e60a3f5abed3df9f67d1ff93d1e9489"
"""The same of the made-up sample (`synthetic.write_sample`), with its own seed."""
SAMPLE_WNIDS_SHA256 = "1994ac312b44eebf25b98cedc61dd8e16590a089121b08c1e781c2c018c063b5"
"""`class_order_sha256` of the made-up sample with any seed."""
DATA_NAMES = {CONTENT_SHA256: "Tiny ImageNet", SAMPLE_SHA256: "made-up shapes"}
WNIDS_SHA256 = "342d6acf18911d62da4c981221f833718a3ef8299e55512239e09c64e49a344c"
"""sha256 of the 200 sorted wnids, each followed by a newline."""
LISTS_SHA256 = "a489fe6c802c0be1333defea26502e125e31f3196131021c687cd4714e4da14c"
"""sha256 of the published class names and boxes, which `content_sha256` does not cover."""

TAR_LIMIT = 4 * 1024**3  # bytes that are held in memory
LITTER = re.compile(r"(^|/)(\.|__MACOSX/|Thumbs\.db$|desktop\.ini$)", re.I)
"""What desktops leave behind, and names that lead out of the archive."""
PICTURE = re.compile(r"\.(jpe?g|jfif|png|webp|gif|bmp)$", re.I)
PUBLISHED = re.compile(r"(train|val)/(?:images/)?(?:([^/]+)/)?(?:images/)?([^/]+(?i:\.jpe?g))")
"""Part, class folder if there is one, and file of an image, in each layout of Tiny ImageNet."""
VAL_LIST = "val/val_annotations.txt"
NO_BOX = "\t0\t0\t0\t0"
PARTS = {"train": 0, "training": 0, "val": 1, "valid": 1, "validation": 1}


class LabelledFile(NamedTuple):
    """One image of the archive."""

    path: str  # as in the published layout, wherever the file lies
    label: int  # index into the sorted wnids
    box: tuple[int, ...]  # x0 y0 x1 y1, corners included; a few hundred have no area, as published


def class_order_sha256(wnids: Sequence[str]) -> str:
    """Return the identity of classes in their order: of the wnids, each followed by a newline."""
    return hashlib.sha256("".join(f"{wnid}\n" for wnid in wnids).encode()).hexdigest()


def contents(path: Path) -> tuple[list[str], Callable[[str], BinaryIO]]:
    """Return the names of the files in a folder, a zip or a tar, and what opens one of them."""
    if path.is_dir():
        every = glob.iglob("**", root_dir=path, recursive=True)  # it follows links
        names = [Path(name).as_posix() for name in every if (path / name).is_file()]
        return names, lambda name: open(path / name, "rb")

    if tarfile.is_tarfile(path):
        held, total = {}, 0
        with tarfile.open(path) as tar:
            for member in tar:
                name = member.name.removeprefix("./")
                if member.isfile() and not LITTER.search(name):
                    held[name] = tar.extractfile(member).read(MOST_BYTES + 1)
                    total += len(held[name])
                if total > TAR_LIMIT:
                    raise OSError("it is too large for a tar: unpack it and name the folder")
            while tar.fileobj.read(1024**2):  # a compressed one has its checksum at the end
                pass
        return list(held), lambda name: io.BytesIO(held[name])

    packed = zipfile.ZipFile(path)
    for name in packed.namelist():
        if not PICTURE.search(name):
            packed.open(name).close()  # a list whose name is damaged would count as missing
    return [name for name in packed.namelist() if not name.endswith("/")], packed.open


class Archive:
    """The labelled files of Tiny ImageNet, of anything packed like it, or of class folders.

    wnids: sorted. names: each class's first name in words.txt, or its wnid. files: in canonical
    order, training by sorted wnid and file name, then validation in the order of
    val_annotations.txt (without one, by the number in a file's name); the first `train_count` are
    training images. title: what somebody's own images are called, "" for Tiny ImageNet's layout.
    Raise `UserError`, naming the culprit, for another layout, or lists and files that disagree.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.title, self.files = Path(path), "", []
        self._places: dict[str, str] = {}  # where each of `files` lies
        try:
            names, self._open = contents(self.path)
        except Exception as error:  # zipfile and tarfile raise many kinds for damage
            problem = f"it is no zip, tar or folder, or it is cut short ({printable(error)})"
            raise self.refusal(problem) from error
        names = sorted(name for name in names if not LITTER.search(name))
        if len(set(names)) < len(names):
            raise self.refusal("it has two files of one name")
        roots = [name[: -len("wnids.txt")] for name in names if f"/{name}".endswith("/wnids.txt")]
        if roots:
            root = min(roots, key=lambda root: root.count("/"))
            self._read_published(root, {n.removeprefix(root) for n in names if n.startswith(root)})
        else:
            self._read_class_folders(names)

    def read(self, path: str) -> bytes:
        """Return a labelled file's bytes; a zip's are checked against their CRC-32."""
        return self._read(self._places[path])

    def content_sha256(self, digests: Iterable[str]) -> str:
        """Return the sha256 of all lines `<path> <wnid> <sha256>` of `files`: what the data are."""
        total = hashlib.sha256()
        for file, digest in zip(self.files, digests, strict=True):
            line = f"{file.path} {self.wnids[file.label]} {digest}\n"
            total.update(line.encode("utf-8", "surrogateescape"))
        return total.hexdigest()

    def _read(self, name: str) -> bytes:
        try:
            with self._open(name) as file:
                content = file.read(MOST_BYTES + 1)  # with a size, zipfile stops unpacking there
        except Exception as error:  # of the disk, or as above
            raise self.refusal(f"{printable(name)} is damaged ({printable(error)})") from error
        if len(content) > MOST_BYTES:
            raise self.refusal(f"{printable(name)} has more than {MOST_BYTES:,} bytes")
        return content

    def refusal(self, problem: str) -> UserError:
        """Return the error that names the archive and the way out."""
        way = "" if self.title else f"; use an unmodified copy of {NAME}.zip"
        return UserError(f"{self.path}: {problem}{way}")

    def _read_class_folders(self, names: list[str]) -> None:
        """Label somebody's own images by their folder; the rest is left out, with a note."""
        name = self.path.resolve().name
        title = printable(name if self.path.is_dir() else name.partition(".")[0])
        self.title = "other images" if title in ("", *DATA_NAMES.values()) else title
        pictures = [f"/{name}" for name in names if PICTURE.search(name)]
        above = posixpath.commonpath([posixpath.dirname(name) for name in pictures] or "/")
        parts = {name: name.removeprefix(above).strip("/").split("/") for name in pictures}
        divided = any(PARTS.get(each[0].lower()) == 0 and len(each) > 2 for each in parts.values())
        found, folders = [], {}
        for name, each in parts.items():
            part = PARTS.get(each[0].lower()) if divided else 0
            if part is None or len(each) < 2 + divided:
                continue
            wnid = printable(each[divided], 255)
            if not wnid or folders.setdefault(wnid, each[divided]) != each[divided]:
                raise self.refusal(f"rename the folder {each[divided]!a}: another one looks alike")
            found.append((part, wnid, "/".join(each)))
            self._places[found[-1][-1]] = name[1:]
        if not found:
            raise UserError(f"{self.path} holds neither Tiny ImageNet nor class folders of images")
        if others := sorted(set(names).difference(self._places.values())):
            what = f"{len(others):,} files that are no picture of a class"
            print(f"note: left out {what}, {printable(others[0])} the first", file=sys.stderr)
        self.wnids = self.names = tuple(sorted(folders))
        self.train_count = sum(part == 0 for part, *_ in found)
        labels = {wnid: label for label, wnid in enumerate(self.wnids)}
        for _, wnid, path in sorted(found):
            self.files.append(LabelledFile(path, labels[wnid], (0, 0, 0, 0)))

    def _read_published(self, root: str, names: set[str]) -> None:
        """Label images by the archive's lists, or by their folder where there is no list."""

        def lines(name: str) -> list[str]:
            if name not in names:
                raise self.refusal(f"{name} is missing")
            text = self._read(root + name).decode("utf-8-sig", "replace")
            return [line.rstrip() for line in text.split("\n") if line.strip()]

        train: dict[str | None, set[str]] = defaultdict(set)  # files of each class
        val: dict[str, str | None] = {}  # class folder of each file
        for match in filter(None, map(PUBLISHED.fullmatch, sorted(names))):
            part, wnid, file = match.groups()
            if part == "val":
                path, val[file] = f"val/images/{file}", wnid
            else:
                path = f"train/{wnid}/images/{file}"
                train[wnid].add(file)
            self._places[path] = root + match[0]

        # ---- classes ----
        self.wnids = tuple(sorted(set(map(printable, lines("wnids.txt")))))
        if different := train.keys() ^ self.wnids:
            culprit = printable(min(map(str, different)))
            raise self.refusal(f"wnids.txt and the folders in train/ disagree about {culprit}")
        words = lines("words.txt") if "words.txt" in names else []
        named = {wnid: synonyms for wnid, _, synonyms in (line.partition("\t") for line in words)}
        first = (printable(named.get(wnid, "").partition(",")[0]) for wnid in self.wnids)
        self.names = tuple(name or wnid for name, wnid in zip(first, self.wnids, strict=True))

        # ---- labelled files ----
        lists = [f"train/{wnid}/{wnid}_boxes.txt" for wnid in self.wnids]
        boxed = not names.isdisjoint(lists)  # if only some have one, that is damage
        for wnid, where in zip(self.wnids, lists, strict=True):
            rows = lines(where) if boxed else [file + NO_BOX for file in train[wnid]]
            self.files += sorted(self._listed(where, rows, train[wnid], wnid))
        self.train_count = len(self.files)
        if VAL_LIST in names or not val or None in val.values():
            rows = lines(VAL_LIST)
        else:
            numbers = {file: [int(n) for n in re.findall(r"\d+", file)] for file in val}
            order = sorted(val, key=lambda file: (numbers[file], file))
            rows = [f"{file}\t{val[file]}{NO_BOX}" for file in order]
        self.files += self._listed(VAL_LIST, rows, val.keys())

    def _listed(self, where: str, rows: list[str], files: Set[str], wnid: str = "") -> list:
        """Return the `LabelledFile` of each row of a list; without `wnid` it names the classes."""
        folder = f"train/{wnid}/images" if wnid else "val/images"
        found: dict[str, LabelledFile] = {}
        for row in rows:
            name, *fields = row.split("\t")
            try:
                label = self.wnids.index(wnid or fields.pop(0))
                x0, y0, x1, y1 = box = tuple(map(int, fields))
                if name in found or min(box) < 0 or max(box) >= SIZE:
                    raise ValueError("repeated, or outside the image")
            except (ValueError, IndexError) as error:
                raise self.refusal(f"{where} has an impossible line: {printable(row)!r}") from error
            found[name] = LabelledFile(f"{folder}/{name}", label, (x0, y0, x1, y1))
        if different := files ^ found.keys():
            culprit = printable(min(different))
            raise self.refusal(f"{where} and the images disagree about {culprit}")
        return list(found.values())


def verify_archive(path: Path) -> str:
    """Read all that is labelled at `path`, and say in one line what it is. Nothing is decoded.

    Raise `UserError` for damage, and for Tiny ImageNet's classes with anything but its files.
    """
    opened = Archive(path)
    digests = (hashlib.sha256(opened.read(file.path)).hexdigest() for file in opened.files)
    content = opened.content_sha256(digests)
    names = "".join(f"{w}\t{name}\n" for w, name in zip(opened.wnids, opened.names, strict=True))
    lists = hashlib.sha256(names.encode() + b"".join(bytes(file.box) for file in opened.files))
    found = (content, lists.hexdigest())
    if class_order_sha256(opened.wnids) == WNIDS_SHA256 and found != (CONTENT_SHA256, LISTS_SHA256):
        other = "class names or boxes" if content == CONTENT_SHA256 else f"files ({content})"
        raise opened.refusal(f"it has Tiny ImageNet's classes, but other {other}")
    counts = f"{len(opened.wnids):,} classes, {len(opened.files):,} labelled images"
    name = DATA_NAMES.get(content, "not Tiny ImageNet")
    return f"{path} is whole: {name}, {counts}, content sha256 {content}"

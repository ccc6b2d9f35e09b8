"""Archives, images and data set folders made to do harm: each is refused in one line, or gives the defined pixels."""

import hashlib
import io
import json
import os
import stat
import struct
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reliability.archives import (
    ROOT,
    change_meta,
    contents,
    jpeg,
    made_up,
    needs_proc,
    readable,
    refused,
    rewritten,
    run,
    write_folder,
    write_zip,
)
from tinylab.data import dataset
from tinylab.data.archive import open_archive
from tinylab.data.dataset import Dataset, open_dataset, prepare, verify

pytestmark = [pytest.mark.promise("hostile"), needs_proc]

VICTIM = "train/n01/images/n01_2.JPEG"  # row 3 of the data set
ALL_MEMORY = 200_000  # KiB that a process which prepares may reach, Python and numpy included
SECONDS = 4.0  # of processor time, on a busy machine; 1.5 on an idle one

# --- Archives: each function writes one to the path it is given -------------------------------------------------------


def member(name: str, attributes: int = 0) -> Callable[[Path], None]:
    """A sound archive with one more member, of that name and type."""

    def write(path: Path) -> None:
        write_zip(path, made_up())
        with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(path, "a") as out:
            info = zipfile.ZipInfo("placeholder")
            info.external_attr = attributes << 16
            out.writestr(info, b"/etc/passwd")
            out.filelist[-1].filename = name  # the constructor would have tidied it

    return write


def record(name: str, content: bytes = b"tiny", **fields: int) -> Callable[[Path], None]:
    """A sound archive in which the directory lies about one member."""

    def write(path: Path) -> None:
        write_zip(path, made_up() | {name: content}, method=zipfile.ZIP_DEFLATED)
        rewritten(
            path,
            name,
            lambda info: [setattr(info, field, value) for field, value in fields.items()],
        )

    return write


def packed(name: str, content: bytes, method: int = zipfile.ZIP_DEFLATED) -> Callable[[Path], None]:
    return lambda path: write_zip(path, made_up() | {name: content}, method=method)


def changed(change: Callable[[bytes, int], bytes]) -> Callable[[Path], None]:
    """A sound archive after `change` of its bytes; the second argument is where its directory begins."""

    def write(path: Path) -> None:
        whole = write_zip(path, made_up()).read_bytes()
        path.write_bytes(change(whole, whole.index(b"PK\1\2")))

    return write


def many_members(count: int, claimed: int) -> Callable[[Path], None]:
    """A sound archive whose directory also lists `count` members that are not there, and claims `claimed`."""

    def change(whole: bytes, start: int) -> bytes:
        entry = struct.pack(
            "<4s6H3I5H2I", b"PK\1\2", 20, 20, 0, 0, 0, 0, 0, 0, 0, 50, 0, 0, 0, 0, 0, 0
        )
        more = b"".join(entry + b"tiny-imagenet-200/litter/%025d" % i for i in range(count))
        directory = whole[start : whole.rindex(b"PK\5\6")] + more
        end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, claimed, claimed, len(directory), start, 0)
        return whole[:start] + directory + end

    return changed(change)


def end_record(**fields: int) -> Callable[[Path], None]:
    """A sound archive whose last record lies: `count`, `size` and `start` of the directory."""

    def change(whole: bytes, start: int) -> bytes:
        end = whole.rindex(b"PK\5\6")
        count, size = struct.unpack("<H", whole[end + 10 : end + 12])[0], end - start
        values = {"count": count, "size": size, "start": start} | fields
        return whole[:end] + struct.pack(
            "<4s4H2IH",
            b"PK\5\6",
            0,
            0,
            values["count"],
            values["count"],
            values["size"],
            values["start"],
            0,
        )

    return changed(change)


def zip64(whole: bytes, start: int) -> bytes:
    """A locator and a record of a zip64 archive whose directory has 2**60 bytes."""
    end = whole.rindex(b"PK\5\6")
    record64 = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, 1 << 60, start)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, end, 1)
    return whole[:end] + record64 + locator + whole[end:-22] + b"PK\5\6" + b"\xff" * 16 + bytes(2)


def zip64_size(path: Path) -> None:
    """A member whose size stands in a zip64 field, and is 2**62."""
    write_zip(path, made_up() | {VICTIM: b"tiny"})
    whole = path.read_bytes()
    at = whole.index(f"{ROOT}{VICTIM}".encode(), whole.index(b"PK\1\2")) - 46
    name = f"{ROOT}{VICTIM}".encode()
    entry = bytearray(whole[at : at + 46])
    entry[24:28] = b"\xff" * 4
    entry[30:32] = struct.pack("<H", 12)
    end = whole.rindex(b"PK\5\6")
    directory = (
        whole[whole.index(b"PK\1\2") : at]
        + entry
        + name
        + struct.pack("<HHQ", 1, 8, 1 << 62)
        + whole[at + 46 + len(name) : end]
    )
    start = whole.index(b"PK\1\2")
    count = whole[end + 8 : end + 12]
    path.write_bytes(
        whole[:start]
        + directory
        + b"PK\5\6"
        + bytes(4)
        + count
        + struct.pack("<2IH", len(directory), start, 0)
    )


def overlapping(path: Path) -> None:
    """Fifty names for the bytes of one member."""
    write_zip(path, made_up())
    with zipfile.ZipFile(path, "a") as out:
        first = out.filelist[0]
        for number in range(50):
            copy = zipfile.ZipInfo(f"{ROOT}litter/{number}")
            for field in ("header_offset", "compress_size", "file_size", "CRC"):
                setattr(copy, field, getattr(first, field))
            out.filelist.append(copy)
        out.comment = b"rewritten"


def local_name(path: Path) -> None:
    """The name in front of a member is not UTF-8 and not the directory's."""
    write_zip(path, made_up())
    whole = bytearray(path.read_bytes())
    at = whole.index(f"{ROOT}{VICTIM}".encode())
    whole[at : at + 2] = b"\xff\xfe"
    whole[at - 23] |= 8  # the flag for UTF-8
    path.write_bytes(whole)


def many_classes(path: Path) -> None:
    files = made_up()
    files["wnids.txt"] = "".join(f"n{i:08}\n" for i in range(700_000)).encode()
    write_zip(path, files, method=zipfile.ZIP_DEFLATED)


def nested(path: Path) -> None:
    write_zip(path, made_up())
    inner = path.read_bytes()[:40_000]
    write_zip(path, made_up() | {VICTIM: inner})


REFUSED_ARCHIVES = {
    "parent folder": (member("../evil"), "unsafe path"),
    "parent folder inside": (member("a/../../evil"), "unsafe path"),
    "absolute": (member("/etc/evil"), "unsafe path"),
    "drive": (member("C:/evil"), "unsafe path"),
    "backslash": (member("a\\..\\evil"), "unsafe path"),
    "NUL in the name": (member("a\0b"), "unsafe path"),
    "escape in the name": (member("a\x1b[2Jb"), "unsafe path"),
    "name that turns the line": (member("a\u202eb"), "unsafe path"),
    "300-character name": (member("a" * 300), "unsafe path"),
    "the same name twice": (member(f"{ROOT}wnids.txt"), "is there twice"),
    "case clash": (member(f"{ROOT}WNIDS.TXT"), "is there twice"),
    "file used as a folder": (member(f"{ROOT}train/n01/images"), "both a file and a folder"),
    "link": (member("a", stat.S_IFLNK | 0o777), "not a regular file"),
    "pipe": (member("a", stat.S_IFIFO | 0o644), "not a regular file"),
    "device": (member("a", stat.S_IFCHR | 0o644), "not a regular file"),
    "image that is a link": (
        record(VICTIM, external_attr=(stat.S_IFLNK | 0o777) << 16),
        "not a regular file",
    ),
    "encrypted": (record(VICTIM, flag_bits=1), "encrypted"),
    "LZMA": (packed(VICTIM, jpeg(1), zipfile.ZIP_LZMA), "unusual method"),
    "bzip2": (packed(VICTIM, jpeg(1), zipfile.ZIP_BZIP2), "unusual method"),
    "small bomb": (packed(VICTIM, bytes(60_000)), "sizes that cannot be true"),
    "bomb": (packed(VICTIM, bytes(50_000_000)), "more than 65,536 bytes"),
    "bomb that understates its size": (
        record(VICTIM, bytes(50_000_000), file_size=60_000),
        "n01_2.JPEG is damaged",
    ),
    "bomb of text": (packed("words.txt", b"n\n" * 40_000_000), "more than 8,388,608 bytes"),
    "overstated size": (record(VICTIM, file_size=50_000), "sizes that cannot be true"),
    "huge size": (record(VICTIM, file_size=1 << 30), "more than 65,536 bytes"),
    "overstated packed size": (record(VICTIM, compress_size=60_000), "sizes that cannot be true"),
    "size of 2**62": (zip64_size, "more than 65,536 bytes"),
    "overlapping members": (overlapping, "overlaps another one"),
    "300,000 members": (many_members(300_000, 65_535), "more than 250,000 members"),
    "120,000 members in one place": (many_members(120_000, 25), "overlaps another one"),
    "huge directory": (end_record(size=0xFFFF_FFF0), "cut short"),
    "directory elsewhere": (end_record(start=10_000_000), "overlaps another one"),
    "directory of 2**60 bytes": (changed(zip64), "cut short"),
    "name before the member": (local_name, "n01_2.JPEG is damaged"),
    "millions of words": (
        packed("words.txt", os.urandom(1_000).hex().encode() * 4_000),
        "sizes that cannot be true",
    ),
    "700,000 classes": (many_classes, "more than 32,767 classes"),
    "endless box number": (
        packed(
            "train/n01/n01_boxes.txt",
            b"n01_0.JPEG\t" + b"9" * 5_000 + b"\t0\t1\t1\n",
            zipfile.ZIP_STORED,
        ),
        "line without a box",
    ),
    "zip in an image": (nested, "not a sound JPEG"),
}

HARMLESS_ARCHIVES = {
    "something in front": changed(lambda whole, start: b"#!/bin/sh\nexit\n" * 100 + whole),
    "comment": changed(lambda whole, start: whole[:-2] + b"\xff\xff" + b"x" * 65_535),
    "wrong count": end_record(count=3),
    "millions of lines": packed(
        "words.txt", made_up()["words.txt"] + b"ab\n" * 2_700_000, zipfile.ZIP_STORED
    ),
    "setuid": record(VICTIM, jpeg(2), external_attr=(stat.S_IFREG | 0o6755) << 16),
}

# --- Images -----------------------------------------------------------------------------------------------------------


def saved(
    mode: str = "RGB", kind: str = "JPEG", size: tuple[int, int] = (64, 64), **options: object
) -> bytes:
    buffer = io.BytesIO()
    ramp = np.add.outer(np.arange(size[1]), np.arange(size[0])).astype(np.uint8)
    Image.fromarray(ramp).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def resized(side: int) -> bytes:
    """A JPEG file whose header claims another size."""
    sound = jpeg(0)
    frame = sound.index(b"\xff\xc0")
    return sound[: frame + 5] + struct.pack(">2H", side, side) + sound[frame + 9 :]


def segment(marker: int, content: bytes) -> bytes:
    """A JPEG file with one more segment after its beginning."""
    sound = jpeg(7)
    return sound[:2] + struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content + sound[2:]


def endless_scans() -> bytes:
    """A progressive 64 x 64 JPEG file that repeats one scan as often as 64 KiB allow."""
    sound = saved(progressive=True, quality=20)
    last = sound.rindex(b"\xff\xda")
    return (
        sound[:-2]
        + sound[last:-2] * ((64_000 - len(sound)) // (len(sound) - 2 - last))
        + sound[-2:]
    )


def animated() -> bytes:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "green", "blue")]
    frames[0].save(buffer, "PNG", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def exif_loop() -> bytes:
    """EXIF data whose directory points at itself and claims four thousand million entries of text."""
    entry = struct.pack("<HHII", 0x8769, 4, 1, 8)
    long = struct.pack("<HHII", 0x010E, 2, 0xFFFF_FFF0, 0xFFFF_FF00)
    return segment(
        0xE1,
        b"Exif\0\0" + b"II*\0" + struct.pack("<IH", 8, 2) + entry + long + struct.pack("<I", 8),
    )


def several_pictures() -> bytes:
    buffer = io.BytesIO()
    first, second = (Image.open(io.BytesIO(jpeg(seed))) for seed in (7, 8))
    first.save(buffer, "MPO", save_all=True, append_images=[second])
    return buffer.getvalue()


REFUSED_IMAGES = {
    "cut": (jpeg(0)[:-200], "not a sound JPEG"),
    "header only": (jpeg(0)[:200], "not a sound JPEG"),
    "empty": (b"", "not a sound JPEG"),
    "text": (b"hello", "not a sound JPEG"),
    "SVG": (
        b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
        "not a sound JPEG",
    ),
    "PNG named JPEG": (saved(kind="PNG"), "not a sound JPEG"),
    "animated PNG": (animated(), "not a sound JPEG"),
    "GIF": (saved("P", "GIF"), "not a sound JPEG"),
    "TIFF": (saved(kind="TIFF"), "not a sound JPEG"),
    "1 x 1": (saved(size=(1, 1)), "1 x 1 pixels instead of 64 x 64"),
    "63 x 63": (jpeg(0, side=63), "63 x 63 pixels instead of 64 x 64"),
    "224 x 224": (jpeg(0, side=224), "224 x 224 pixels instead of 64 x 64"),
    "12,000 x 12,000 header": (resized(12_000), "12000 x 12000 pixels instead of 64 x 64"),
    "60,000 x 60,000 header": (resized(60_000), "not a sound JPEG"),
    "0 x 0 header": (resized(0), "not a sound JPEG"),
    "PostScript": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\nquit\n",
        "not a sound JPEG",
    ),
}

FINE_IMAGES = {
    "grey": saved("L"),
    "CMYK": saved("CMYK"),
    "progressive": saved(progressive=True),
    "endless scans": endless_scans(),
    "60,000-byte comment": segment(0xFE, b"<script>" * 7_500),
    "EXIF that points at itself": exif_loop(),
    "broken EXIF": segment(0xE1, b"Exif\0\0MM\0*\xff\xff\xff\xff"),
    "several pictures": several_pictures(),
    "bytes after the end": jpeg(7) + b"PK\3\4" + bytes(1000),
}

# --- The process that prepares them -----------------------------------------------------------------------------------

PREPARE = """
import hashlib, json, pathlib, resource, sys, time
from tinylab.data import dataset
from tinylab.recipe import UserError

def memory(field):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))

assert "torch" not in sys.modules
address_space = 1024 * (memory("VmSize") + 300_000)
resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))
for line in sys.stdin:
    folder = pathlib.Path(line.strip())
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    start = time.process_time()  # the machine may be busy with other things
    try:
        made = dataset.prepare(folder / "made.zip", folder / "ds", workers=1, progress=False)
        outcome = {name: hashlib.sha256(getattr(made, name).tobytes()).hexdigest() for name in ("labels", "boxes")}
        outcome |= {"images": [hashlib.sha256(image.tobytes()).hexdigest() for image in made.images]}
        outcome |= {"names": made.names}
        del made
    except UserError as error:
        outcome = str(error)
    except Exception as error:
        outcome = {"traceback": repr(error)[:500]}
    print(json.dumps([outcome, time.process_time() - start, memory("VmHWM")]), flush=True)
"""


class Preparer:
    """A process of its own that prepares what is laid before it, with little memory to spare."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.process = run(PREPARE)
        self.count = 0
        self.sound = self.outcome(lambda path: write_zip(path, made_up()))
        assert set(self.sound) == {"labels", "boxes", "images", "names"}

    def outcome(self, write: Callable[[Path], object]) -> dict | str:
        """What preparing the archive gives that `write` writes: hashes, or the one line of its refusal."""
        self.count += 1
        folder = self.folder / f"{self.count}"
        (folder / "above").mkdir(parents=True)
        (folder / "neighbour").write_text("kept")
        write(folder / "made.zip")
        before = contents(folder)
        self.process.stdin.write(f"{folder}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, self.process.communicate()[1]
        outcome, seconds, peak = json.loads(answer)
        assert seconds < SECONDS
        assert peak < ALL_MEMORY
        after = {
            name: digest for name, digest in contents(folder).items() if not name.startswith("ds")
        }
        assert after == before, "something was written outside the data set"
        assert (folder / "ds").exists() == isinstance(outcome, dict)
        assert not list(folder.glob("ds.building*"))
        return outcome


@pytest.fixture(scope="module")
def preparer(tmp_path_factory: pytest.TempPathFactory):
    made = Preparer(tmp_path_factory.mktemp("hostile"))
    yield made
    _, errors = made.process.communicate(timeout=20)
    assert errors == ""  # no warning either


@pytest.mark.parametrize("case", REFUSED_ARCHIVES)
def test_hostile_archives_are_refused(preparer, tally, case):
    write, expected = REFUSED_ARCHIVES[case]
    message = preparer.outcome(write)
    assert isinstance(message, str), f"not refused: {message}"
    assert readable(message)
    assert expected in message
    tally(kinds_of_archive=1, refused=1)


@pytest.mark.parametrize("case", HARMLESS_ARCHIVES)
def test_odd_archives_that_are_harmless_give_the_same(preparer, tally, case):
    expected = preparer.sound
    if case == "setuid":
        expected = preparer.outcome(packed(VICTIM, jpeg(2)))
    assert preparer.outcome(HARMLESS_ARCHIVES[case]) == expected
    tally(kinds_of_archive=1, harmless=1)


@pytest.mark.parametrize("case", REFUSED_IMAGES)
def test_hostile_images_are_refused_and_named(preparer, tally, case):
    content, expected = REFUSED_IMAGES[case]
    message = preparer.outcome(lambda path: write_zip(path, made_up() | {VICTIM: content}))
    assert isinstance(message, str), f"not refused: {message}"
    assert readable(message)
    assert f"{VICTIM} " in message
    assert expected in message
    tally(kinds_of_image=1, refused=1)


@pytest.mark.parametrize("case", FINE_IMAGES)
def test_odd_images_that_are_fine_give_the_defined_pixels(preparer, tally, case):
    content = FINE_IMAGES[case]
    outcome = preparer.outcome(lambda path: write_zip(path, made_up() | {VICTIM: content}))
    with warnings.catch_warnings(action="ignore"):
        pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    expected = preparer.sound["images"].copy()
    expected[3] = hashlib.sha256(pixels.tobytes()).hexdigest()
    assert outcome == preparer.sound | {"images": expected}
    tally(kinds_of_image=1, harmless=1)


def test_a_bomb_that_understates_its_size_is_not_unfolded(tmp_path, tally):
    record(VICTIM, bytes(50_000_000), file_size=60_000)(tmp_path / "a.zip")
    with open_archive(tmp_path / "a.zip") as opened:
        tracemalloc.start()
        message = refused(opened.members.read, VICTIM)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert "n01_2.JPEG is damaged" in message
    assert peak < 2_000_000
    tally(kinds_of_archive=1, refused=1)


def test_the_size_is_checked_before_the_pixels(monkeypatch, tally):
    """A picture of 100 million pixels would take seconds and 300 MB."""
    giant = resized(9_000)
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("decoded"))
    assert "9000 x 9000" in refused(dataset._decode, giant, "a.JPEG")
    tally(kinds_of_image=1, refused=1)


# --- Folders ----------------------------------------------------------------------------------------------------------


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def link(target: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.unlink()
        path.symlink_to(target)

    return change


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def written(content: bytes) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.unlink()
        path.write_bytes(content)

    return change


def header(text: str, version: bytes = b"\1\0", body: int = 36) -> bytes:
    """A .npy file with that header."""
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text.encode() + bytes(body)


def compressed_arrays() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(18, np.int16))
    return buffer.getvalue()


META = "meta.json"
HOSTILE_FOLDERS = {
    "pipe for images": ("images.npy", pipe),
    "pipe for meta": (META, pipe),
    "device for labels": ("labels.npy", link("/dev/zero")),
    "device for meta": (META, link("/dev/zero")),
    "link to itself": ("boxes.npy", link("boxes.npy")),
    "folder for images": ("images.npy", folder_instead),
    "folder for meta": (META, folder_instead),
    "npz named npy": ("labels.npy", written(compressed_arrays())),
    "pickle named npy": ("labels.npy", written(b"\x80\x04cos\nsystem\n(S'true'\ntR.")),
    "objects": (
        "labels.npy",
        written(header("{'descr': '|O', 'fortran_order': False, 'shape': (18,), }\n")),
    ),
    "endless parentheses": ("labels.npy", written(header("(" * 60_000))),
    "code in the header": ("labels.npy", written(header("__import__('os').system('true')\n"))),
    "unclosed header": ("labels.npy", written(header("{'descr': '<i2', 'shape': (18,"))),
    "huge shape": (
        "labels.npy",
        written(header(f"{{'descr': '<i2', 'fortran_order': False, 'shape': ({2**62},), }}\n")),
    ),
    "negative shape": (
        "labels.npy",
        written(header("{'descr': '<i2', 'fortran_order': False, 'shape': (-18,), }\n")),
    ),
    "fortran order": (
        "boxes.npy",
        written(header("{'descr': '|u1', 'fortran_order': True, 'shape': (18, 4), }\n", body=72)),
    ),
    "version 9": ("labels.npy", written(header("{}", b"\x09\0"))),
    "deep JSON": (META, written(b"[" * 1_000_000)),
    "deep version": (META, written(b'{"format_version": ' + b"[" * 900 + b"]" * 900 + b"}")),
    "huge JSON": (META, written(b" " * 9_000_000)),
    "NaN": (META, written(b'{"format_version": NaN}')),
    "version true": (META, written(b'{"format_version": true}')),
    "endless number": (META, written(b'{"format_version": ' + b"9" * 10_000 + b"}")),
    "the same key twice": (META, written(b'{"format_version": 1, "format_version": 1}')),
    "binary": (META, written(bytes(range(256)))),
}

HOSTILE_META = {
    "true for the version": {"format_version": True},
    "true for a count": {"train_count": True, "val_count": 17},
    "a fraction for a count": {"train_count": 12.0},
    "infinity for a count": {"train_count": float("1e308") * 10},
    "huge counts": {"train_count": 10**4000, "val_count": -(10**4000) + 18},
    "text for a count": {"val_count": "6"},
    "text for classes": {"wnids": "abc", "names": "abc"},
    "an object for classes": {"wnids": {"n01": 1, "n02": 1, "n03": 1}},
    "an object for names": {"names": {"a": 1, "b": 2, "c": 3}},
    "numbers for names": {"names": [1, 2, 3]},
    "control characters in a class": {"wnids": ["n01", "n02", "n\x1b3"]},
    "half a character in a class": {"wnids": ["n01", "n02", "n\ud800"]},
    "no hash for content": {"content_sha256": "x" * 64},
    "an object for content": {"content_sha256": {}},
}


@pytest.fixture
def prepared(tmp_path) -> Dataset:
    return prepare(
        write_zip(tmp_path / "made.zip", made_up()), tmp_path / "ds", workers=1, progress=False
    )


@pytest.mark.timeout(10)  # what is refused must not hang
@pytest.mark.parametrize("case", HOSTILE_FOLDERS)
def test_hostile_data_set_folders_are_refused(prepared, tally, case):
    name, change = HOSTILE_FOLDERS[case]
    change(prepared.folder / name)
    assert str(prepared.folder) in refused(open_dataset, prepared.folder)
    tally(kinds_of_folder=1, refused=1)


@pytest.mark.parametrize("case", HOSTILE_META)
def test_hostile_meta_is_refused(prepared, tally, case):
    path = prepared.folder / META
    meta = json.loads(path.read_text()) | HOSTILE_META[case]
    del meta["sha256"]["meta.json"]
    path.write_text(json.dumps(meta))
    assert str(prepared.folder) in refused(open_dataset, prepared.folder)
    tally(kinds_of_folder=1, refused=1)


def test_a_giant_meta_is_not_read_to_its_end(prepared, tally):
    os.truncate(prepared.folder / META, 1 << 33)
    assert "more than 8,388,608 bytes" in refused(open_dataset, prepared.folder)
    tally(kinds_of_folder=1, refused=1)


@pytest.mark.parametrize(
    ("old", "new"), [("{\n", '{\n "names": [],\n'), ('"val_count": 6', '"val_count": 6, "x": NaN')]
)
def test_what_programs_would_read_differently_is_refused(prepared, tally, old, new):
    """Keys that are there twice, and NaN: the rest is whole, and there is no hash."""
    path = prepared.folder / META
    meta = json.loads(path.read_text())
    del meta["sha256"]["meta.json"]
    text = json.dumps(meta, indent=1)
    path.write_text(text)
    open_dataset(prepared.folder)
    path.write_text(text.replace(old, new, 1))
    assert "meta.json is not JSON" in refused(open_dataset, prepared.folder)
    tally(kinds_of_folder=1, refused=1)


def test_boxes_outside_the_image_are_refused(prepared, tally):
    np.save(prepared.folder / "boxes.npy", np.full((18, 4), 64, np.uint8))
    assert "outside the image" in refused(open_dataset, prepared.folder)
    tally(kinds_of_folder=1, refused=1)


def test_names_from_a_foreign_folder_are_made_safe(prepared, tally):
    change_meta(prepared.folder, names=["\x1b[2J\u202egold\nfish\0", "", " <b>x</b> "])
    opened = open_dataset(prepared.folder)
    assert opened.names == ("[2Jgoldfish", "n02", "<b>x</b>")
    verify(opened)
    meta = json.loads((prepared.folder / META).read_text()) | {
        "names": ["\ud800", "x\udfffy", "\x07"]
    }
    del meta["sha256"]["meta.json"]
    (prepared.folder / META).write_text(json.dumps(meta))
    assert open_dataset(prepared.folder).names == ("n01", "xy", "n03")
    assert "meta.json has changed" in refused(verify, open_dataset(prepared.folder))
    tally(kinds_of_folder=1, harmless=1)


@pytest.mark.timeout(10)
def test_pipes_in_an_extracted_archive_are_passed_over(tmp_path, tally):
    folder = write_folder(tmp_path / "a", made_up())
    pipe(folder / VICTIM)
    assert "train/ has 3 images of n01" in refused(
        prepare, folder, tmp_path / "ds", workers=1, progress=False
    )
    assert not (tmp_path / "ds").exists()
    tally(kinds_of_archive=1, refused=1)


def test_control_characters_in_an_extracted_archive_do_not_reach_the_terminal(tmp_path, tally):
    name = "n01_\x1b[2J.JPEG"
    files = made_up()
    files[f"train/n01/images/{name}"] = b"no picture"
    del files["train/n01/images/n01_0.JPEG"]
    files["train/n01/n01_boxes.txt"] = files["train/n01/n01_boxes.txt"].replace(
        b"n01_0.JPEG", name.encode()
    )
    folder = write_folder(tmp_path / "a", files)
    assert "is not a sound JPEG" in refused(
        prepare, folder, tmp_path / "ds", workers=1, progress=False
    )
    tally(kinds_of_archive=1, refused=1)

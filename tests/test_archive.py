"""The archive: canonical order, every refusal, and a server that misbehaves. The archives are made up here."""

import hashlib
import http.server
import io
import os
import random
import stat
import threading
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tinylab import archive
from tinylab.archive import LabelledFile, download, find, open_archive
from tinylab.recipe import UserError

WNIDS = ("n03", "n01", "n02")  # as wnids.txt lists them: unsorted, like the published file
ROOT = "tiny-imagenet-200/"


def jpeg(seed: int, mode: str = "RGB", side: int = 64) -> bytes:
    """A smooth coloured JPEG file, another one for every seed."""
    corners = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(corners).resize((side, side), Image.Resampling.BILINEAR).convert(mode).save(buffer, "JPEG")
    return buffer.getvalue()


def made_up() -> dict[str, bytes]:
    """Three classes of four training and two validation images in the published layout; grey and CMYK among them."""
    files = {
        "wnids.txt": "".join(f"{wnid}\n" for wnid in WNIDS).encode(),
        "words.txt": b"n00\tentity\nn01\tgoldfish, Carassius auratus\nn02\tfire \x1b[31msalamander\nn03\t\n",
    }
    annotations = []
    for c, wnid in enumerate(WNIDS):
        boxes = []
        for number, i in enumerate((0, 1, 2, 10)):
            mode = {(0, 0): "L", (1, 1): "CMYK"}.get((c, i), "RGB")
            files[f"train/{wnid}/images/{wnid}_{i}.JPEG"] = jpeg(100 * c + i, mode)
            boxes.append(f"{wnid}_{i}.JPEG\t{i}\t{c}\t{40 + number}\t63\n")
        files[f"train/{wnid}/{wnid}_boxes.txt"] = "".join(boxes).encode()
    for i, wnid in enumerate(("n02", "n01", "n03", "n03", "n02", "n01")):
        name = f"val_{5 - i}.JPEG"
        files[f"val/images/{name}"] = jpeg(1000 + i)
        annotations.append(f"{name}\t{wnid}\t0\t{i}\t44\t62\n")
    files["val/val_annotations.txt"] = "".join(annotations).encode()
    files["test/images/test_0.JPEG"] = b"never read"
    return files


def write_zip(path: Path, files: dict[str, bytes], root: str = ROOT, method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as out:
        for name, content in files.items():
            out.writestr(f"{root}{name}", content)
    return path


def write_folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def refused(action: Callable[..., object], *arguments: object, **keywords: object) -> str:
    """The message of the UserError that `action` must raise: one readable line."""
    with pytest.raises(UserError) as caught:
        action(*arguments, **keywords)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 400
    return message


def real_archive() -> Path | None:
    named = Path(os.environ.get("TINY_IMAGENET") or Path(__file__).parents[1] / "data/tiny-imagenet-200.zip")
    return named if named.exists() else None


# --- What a sound archive gives ---------------------------------------------------------------------------------------


def test_files_come_in_canonical_order_whatever_the_order_in_the_zip(tmp_path):
    files = list(made_up().items())
    random.Random(0).shuffle(files)
    with open_archive(write_zip(tmp_path / "a.zip", dict(files))) as opened:
        assert opened.wnids == ("n01", "n02", "n03")
        assert opened.train_count == 12
        train = [f"train/{w}/images/{w}_{i}.JPEG" for w in ("n01", "n02", "n03") for i in ("0", "1", "10", "2")]
        assert [file.path for file in opened.files] == train + [f"val/images/val_{i}.JPEG" for i in range(5, -1, -1)]
        assert [file.label for file in opened.files] == [0] * 4 + [1] * 4 + [2] * 4 + [1, 0, 2, 2, 1, 0]


def test_boxes_and_bytes_belong_to_their_files(tmp_path):
    files = made_up()
    with open_archive(write_zip(tmp_path / "a.zip", files)) as opened:
        boxes = {file.path: file.box for file in opened.files}
        assert boxes["train/n01/images/n01_10.JPEG"] == (10, 1, 43, 63)
        assert boxes["val/images/val_5.JPEG"] == (0, 0, 44, 62)
        assert boxes["val/images/val_0.JPEG"] == (0, 5, 44, 62)
        assert all(opened.read(file) == files[file.path] for file in opened.files)


def test_names_are_first_synonyms_without_control_characters_or_the_wnid(tmp_path):
    with open_archive(write_zip(tmp_path / "a.zip", made_up())) as opened:
        assert opened.names == ("goldfish", "fire [31msalamander", "n03")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("root", [ROOT, ""])
def test_folder_and_zip_with_and_without_root_give_the_same(tmp_path, root, method):
    files = made_up()
    zipped = open_archive(write_zip(tmp_path / "a.zip", files, root, method))
    folder = open_archive(write_folder(tmp_path / "out" / root, files) if not root else _parent(tmp_path, files))
    with zipped, folder:
        assert folder.files == zipped.files
        assert (folder.wnids, folder.names, folder.train_count) == (zipped.wnids, zipped.names, zipped.train_count)
        assert [folder.read(file) for file in folder.files] == [zipped.read(file) for file in zipped.files]


def _parent(tmp_path: Path, files: dict[str, bytes]) -> Path:
    write_folder(tmp_path / "out" / ROOT, files)
    return tmp_path / "out"


def test_test_images_may_be_missing_and_desktop_litter_is_ignored(tmp_path):
    files = made_up()
    plain = {name: content for name, content in files.items() if not name.startswith("test/")}
    litter = ("__MACOSX/._x", "train/.DS_Store", "train/n01/images/._n01_0.JPEG", "val/images/Thumbs.db", "readme")
    with (
        open_archive(write_zip(tmp_path / "plain.zip", plain)) as first,
        open_archive(write_zip(tmp_path / "litter.zip", files | dict.fromkeys(litter, b"?"))) as second,
        open_archive(write_folder(tmp_path / "folder", files | dict.fromkeys(litter, b"?"))) as third,
    ):
        assert first.files == second.files == third.files


def test_windows_line_ends_are_read(tmp_path):
    files = made_up()
    crlf = {name: text.replace(b"\n", b"\r\n") if name.endswith(".txt") else text for name, text in files.items()}
    with (
        open_archive(write_zip(tmp_path / "a.zip", files)) as lf,
        open_archive(write_zip(tmp_path / "b.zip", crlf)) as cr,
    ):
        assert lf.files == cr.files
        assert lf.wnids == cr.wnids


def test_content_sha256_is_the_documented_one():
    files = [LabelledFile("train/b/images/x.JPEG", 1, (0, 0, 1, 1)), LabelledFile("val/images/y.JPEG", 0, (0, 0, 1, 1))]
    digests = [hashlib.sha256(content).hexdigest() for content in (b"x", b"y")]
    lines = f"train/b/images/x.JPEG b {digests[0]}\nval/images/y.JPEG a {digests[1]}\n"
    assert archive.content_sha256(files, ("a", "b"), digests) == hashlib.sha256(lines.encode()).hexdigest()
    with pytest.raises(ValueError, match="shorter"):
        archive.content_sha256(files, ("a", "b"), digests[:1])


# --- Refusals ---------------------------------------------------------------------------------------------------------


def _replaced(name: str, old: bytes, new: bytes) -> Callable[[dict[str, bytes]], None]:
    def change(files: dict[str, bytes]) -> None:
        assert old in files[name]
        files[name] = files[name].replace(old, new)

    return change


def _without(*parts: str) -> Callable[[dict[str, bytes]], None]:
    def change(files: dict[str, bytes]) -> None:
        doomed = [name for name in files if any(part in name for part in parts)]
        assert doomed
        for name in doomed:
            del files[name]

    return change


def _with(name: str, content: bytes = b"?") -> Callable[[dict[str, bytes]], None]:
    return lambda files: files.update({name: content})


BOXES, ANNOTATIONS = "train/n01/n01_boxes.txt", "val/val_annotations.txt"
BROKEN_LAYOUTS = {
    "no wnids": (_without("wnids.txt"), "not Tiny ImageNet: it has no wnids.txt"),
    "other zip": (lambda files: (files.clear(), files.update(a=b"")), "not Tiny ImageNet"),
    "no classes": (_with("wnids.txt", b"\n"), "names no class"),
    "class without folder": (_with("wnids.txt", b"n01\nn02\nn03\nn04\n"), "class n04"),
    "class with a path": (_with("wnids.txt", b"n01\nn02\nn03\n../n04\n"), "class ../n04"),
    "extra folder": (_with("train/n09/images/n09_0.JPEG"), "class n09"),
    "class twice": (_with("wnids.txt", b"n01\nn02\nn03\nn02\n"), "n02 more than once"),
    "control characters": (_with("wnids.txt", b"n01\nn02\nn03\nn\x1b4\n"), "control characters"),
    "wnids not text": (_with("wnids.txt", b"\xff\xfe"), "wnids.txt is not UTF-8"),
    "words not text": (_with("words.txt", b"n01\t\xff"), "words.txt is not UTF-8"),
    "fewer training images": (_without("n02_1.JPEG"), "train/ has 3 images of n02"),
    "no image of a class": (_without("n02/images"), "train/ has 0 images of n02"),
    "no training image": (_without("/images/n0"), "train/ has 0 images"),
    "no boxes": (_without("n01_boxes"), "train/n01/n01_boxes.txt is missing"),
    "box missing": (_replaced(BOXES, b"n01_2.JPEG\t2\t1\t42\t63\n", b""), "no box for n01_2.JPEG"),
    "box of no image": (_replaced(BOXES, b"n01_2.JPEG", b"n01_3.JPEG"), "n01_3.JPEG, which is missing"),
    "box too large": (_replaced(BOXES, b"\t63\n", b"\t64\n"), "outside the image"),
    "box negative": (_replaced(ANNOTATIONS, b"\t0\t3\t", b"\t-1\t3\t"), "outside the image"),
    "box of three": (_replaced(BOXES, b"\t63\n", b"\n"), "line without a box"),
    "box of words": (_replaced(ANNOTATIONS, b"\t44\t", b"\tbig\t"), "line without a box"),
    "no annotations": (_without("val_annotations"), "val/val_annotations.txt is missing"),
    "unannotated": (_with("val/images/val_9.JPEG"), "val/images/val_9.JPEG is not listed"),
    "annotated, not there": (_without("val_3.JPEG"), "lists val_3.JPEG, which is not in val/images/"),
    "annotated twice": (_replaced(ANNOTATIONS, b"val_3", b"val_4"), "lists val_4.JPEG more than once"),
    "annotated elsewhere": (_replaced(ANNOTATIONS, b"val_3", b"../../test/images/test_0"), "not in val/images/"),
    "unknown class": (_replaced(ANNOTATIONS, b"val_4.JPEG\tn01", b"val_4.JPEG\tn07"), "unknown class 'n07'"),
    "line of one word": (_with(ANNOTATIONS, b"val_0.JPEG\n"), "unknown class ''"),
    "uneven validation": (_replaced(ANNOTATIONS, b"val_4.JPEG\tn01", b"val_4.JPEG\tn02"), "val/ has"),
    "huge image": (_with("val/images/val_0.JPEG", bytes(range(256)) * 300), "more than 65,536 bytes"),
    "huge text": (_with("words.txt", random.Random(0).randbytes(9_000_000)), "more than 8,388,608 bytes"),
}


@pytest.mark.parametrize("packed", ["zip", "folder"])
@pytest.mark.parametrize("case", BROKEN_LAYOUTS)
def test_broken_layout_is_refused_naming_the_culprit(tmp_path, case, packed):
    change, expected = BROKEN_LAYOUTS[case]
    files = made_up()
    change(files)
    path = write_zip(tmp_path / "a.zip", files) if packed == "zip" else write_folder(tmp_path / "a", files)

    def use() -> None:
        with open_archive(path) as opened:
            for file in opened.files:
                opened.read(file)

    message = refused(use)
    assert expected in message
    assert str(path) in message


@pytest.mark.parametrize(
    "name",
    ["../evil", "a/../../evil", "/etc/evil", "C:/evil", "a\\..\\evil", "a\0b", ROOT + "WNIDS.TXT", ROOT + "wnids.txt"],
)
def test_dangerous_member_names_refuse_the_whole_zip(tmp_path, name):
    path = write_zip(tmp_path / "a.zip", made_up())
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as out:
        warnings.simplefilter("ignore")  # zipfile's own about the duplicate
        info = zipfile.ZipInfo("placeholder")
        out.writestr(info, b"?")
        out.filelist[-1].filename = name  # the constructor would have tidied it
    message = refused(open_archive, path)
    assert "unsafe path" in message or "is there twice" in message


def _rewritten(path: Path, member: str, change: Callable[[zipfile.ZipInfo], None]) -> Path:
    """Changes one member's record in the zip's directory, which is written when the zip is closed."""
    with zipfile.ZipFile(path, "a") as out:
        change(out.getinfo(f"{ROOT}{member}"))
        out.comment = b"rewritten"
    return path


@pytest.mark.parametrize(
    ("attribute", "value", "expected"),
    [
        ("external_attr", (stat.S_IFLNK | 0o777) << 16, "not a regular file"),
        ("external_attr", (stat.S_IFIFO | 0o644) << 16, "not a regular file"),
        ("flag_bits", 1, "encrypted"),
        ("compress_type", zipfile.ZIP_LZMA, "unusual method"),
        ("file_size", 50_000, "sizes that cannot be true"),
        ("compress_size", 60_000, "sizes that cannot be true"),
        ("file_size", 1 << 30, "more than 65,536 bytes"),
    ],
)
def test_dangerous_members_refuse_the_whole_zip(tmp_path, attribute, value, expected):
    files = made_up() | {"train/n01/images/n01_1.JPEG": b"tiny"}
    path = write_zip(tmp_path / "a.zip", files)
    _rewritten(path, "train/n01/images/n01_1.JPEG", lambda info: setattr(info, attribute, value))
    message = refused(open_archive, path)
    assert expected in message
    assert "n01_1.JPEG" in message


def test_compressed_bombs_are_refused_before_they_unfold(tmp_path):
    for size in (60_000, 50_000_000):
        files = made_up() | {"val/images/val_0.JPEG": bytes(size)}
        assert "val_0.JPEG" in refused(open_archive, write_zip(tmp_path / "a.zip", files, method=zipfile.ZIP_DEFLATED))


def test_a_member_that_understates_its_size_is_not_unfolded(tmp_path):
    files = made_up() | {"val/images/val_0.JPEG": bytes(50_000_000)}
    path = write_zip(tmp_path / "a.zip", files, method=zipfile.ZIP_DEFLATED)
    _rewritten(path, "val/images/val_0.JPEG", lambda info: setattr(info, "file_size", 60_000))
    with open_archive(path) as opened:
        file = next(file for file in opened.files if file.path.endswith("val_0.JPEG"))
        tracemalloc.start()
        message = refused(opened.read, file)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert "val_0.JPEG is damaged" in message
    assert peak < 2_000_000


def test_too_many_or_too_large_members_are_refused(tmp_path, monkeypatch):
    path = write_zip(tmp_path / "a.zip", made_up())
    monkeypatch.setattr(archive, "_MEMBER_LIMIT", 20)
    assert "25 members" in refused(open_archive, path)
    monkeypatch.undo()
    monkeypatch.setattr(archive, "_TOTAL_LIMIT", 10_000)
    assert "more than 10,000 bytes" in refused(open_archive, path)


def test_truncated_zip_is_refused_at_any_length(tmp_path):
    whole = write_zip(tmp_path / "a.zip", made_up()).read_bytes()
    for length in [0, 1, 22, 100, *range(1000, len(whole), 997), len(whole) - 1]:
        (tmp_path / "cut.zip").write_bytes(whole[:length])
        assert "cut short" in refused(open_archive, tmp_path / "cut.zip")


def test_damage_is_noticed_or_harmless(tmp_path):
    """300 single flipped bits: each one is refused with one line, or every label, box and image is still the same."""
    path = write_zip(tmp_path / "a.zip", made_up(), method=zipfile.ZIP_DEFLATED)
    whole = path.read_bytes()

    def contents() -> list[tuple[LabelledFile, bytes]]:
        with open_archive(path) as opened:
            return [(file, opened.read(file)) for file in opened.files]

    sound, noticed, chance = contents(), 0, random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            assert contents() == sound
        except UserError:
            noticed += 1
    assert noticed > 150


def test_damaged_image_is_named(tmp_path):
    files = made_up()
    path = write_zip(tmp_path / "a.zip", files)
    content = files["val/images/val_2.JPEG"]
    path.write_bytes(path.read_bytes().replace(content, content[:-5] + b"?" + content[-4:]))
    with open_archive(path) as opened:
        file = next(file for file in opened.files if file.path.endswith("val_2.JPEG"))
        assert "val/images/val_2.JPEG is damaged" in refused(opened.read, file)


@pytest.mark.parametrize("linked", ["train/n01/images/n01_0.JPEG", "train/n01/images", "val", "wnids.txt"])
def test_links_that_leave_the_folder_are_refused(tmp_path, linked):
    folder = write_folder(tmp_path / "a", made_up())
    (tmp_path / "elsewhere").mkdir()
    (folder / linked).rename(tmp_path / "elsewhere" / "moved")
    (folder / linked).symlink_to(tmp_path / "elsewhere" / "moved")
    assert "link that leaves the folder" in refused(open_archive, folder)


def test_links_inside_the_folder_are_followed_and_loops_end(tmp_path):
    folder = write_folder(tmp_path / "a", made_up())
    (folder / "val/images/val_0.JPEG").rename(folder / "kept.JPEG")
    (folder / "val/images/val_0.JPEG").symlink_to("../../kept.JPEG")
    (folder / "val/loop").symlink_to("..")
    with open_archive(folder) as opened:
        assert len(opened.files) == 18


# --- Finding ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def desk(tmp_path, monkeypatch) -> Path:
    """An empty current folder, and no TINY_IMAGENET."""
    monkeypatch.delenv("TINY_IMAGENET", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_auto_takes_the_first_of_its_places(desk, monkeypatch, server):
    body = write_zip(desk / "made.zip", made_up()).read_bytes()
    monkeypatch.setattr(archive, "ZIP_BYTES", len(body))
    monkeypatch.setattr(archive, "ZIP_MD5", hashlib.md5(body).hexdigest())
    monkeypatch.setattr(archive, "ZIP_SHA256", hashlib.sha256(body).hexdigest())
    server.files["/tiny-imagenet-200.zip"] = body
    root = desk / "root"

    downloaded = find("auto", root, [server.url("/tiny-imagenet-200.zip")])
    assert downloaded == root / "tiny-imagenet-200.zip"
    assert downloaded.read_bytes() == body
    downloaded.unlink()
    extracted = write_folder(desk / "data" / "tiny-imagenet-200", made_up())
    assert find("auto", root, []).resolve() == extracted
    extracted = write_folder(root / "tiny-imagenet-200", made_up())
    assert find("auto", root, []) == extracted
    write_zip(root / "tiny-imagenet-200.zip", made_up())
    assert find("auto", root, []) == root / "tiny-imagenet-200.zip"
    monkeypatch.setenv("TINY_IMAGENET", str(desk / "made.zip"))
    assert find("auto", root, []) == desk / "made.zip"
    assert len(server.requests) == 1


def test_named_sources_must_exist(desk, monkeypatch):
    assert "the source is missing.zip" in refused(find, "missing.zip")
    os.mkfifo(desk / "pipe")
    assert "no zip file and no folder" in refused(find, desk / "pipe")
    monkeypatch.setenv("TINY_IMAGENET", "nowhere.zip")
    assert "TINY_IMAGENET is set to nowhere.zip" in refused(find)


def test_a_url_is_saved_under_a_safe_name(desk, server):
    server.files["/a/..%2f..%2fevil%20name.zip"] = b"content"
    path = find(server.url("/a/..%2f..%2fevil%20name.zip?download=1"), desk / "root")
    assert path == desk / "root" / "evil_name.zip"
    assert path.read_bytes() == b"content"
    assert "is not an address" in refused(find, "http://[broken/x.zip", desk)
    assert "only http and https" in refused(find, "file:///etc/passwd", desk / "root")
    assert "only http and https" in refused(find, "ftp://127.0.0.1/a.zip", desk / "root")


def test_built_in_addresses_must_give_the_published_bytes(desk, server):
    server.files["/a.zip"] = b"something else"
    address = server.url("/a.zip")
    assert "14 bytes instead of 248,100,043" in refused(find, address, desk, urls=[address])
    assert not (desk / "a.zip").exists()


# --- Downloading ------------------------------------------------------------------------------------------------------

BODY = random.Random(1).randbytes(700_000)
EXPECTED = {"size": len(BODY), "md5": hashlib.md5(BODY).hexdigest(), "sha256": hashlib.sha256(BODY).hexdigest()}


class Server(http.server.ThreadingHTTPServer):
    """Serves `files` by path. A path's `behaviours` are used up first, one per request."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.behaviours: dict[str, list[object]] = {}
        self.requests: list[tuple[str, str | None]] = []

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        path, wanted = self.path.partition("?")[0], self.headers.get("Range")
        self.server.requests.append((path, wanted))
        behaviours = self.server.behaviours.get(path)
        behaviour = behaviours.pop(0) if behaviours else "serve"
        body = self.server.files.get(path)
        if isinstance(behaviour, int) or (body is None and not str(behaviour).startswith("to ")):
            self.send_error(behaviour if isinstance(behaviour, int) else 404)
            return
        if behaviour.startswith("to "):
            self.send_response(302)
            self.send_header("Location", behaviour[3:])
            self.end_headers()
            return
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and behaviour != "ignore range" else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if behaviour != "no length":
            self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start : len(body) // 2] if behaviour == "cut" else body[start:])

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        running.files["/good"] = BODY
        running.files["/bad"] = b"x" + BODY[1:]
        yield running
        running.shutdown()


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "data" / "x.zip"


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"x.zip.lock"}


def test_download_and_a_second_call_that_needs_no_server(server, target):
    assert download([server.url("/good")], target, **EXPECTED) == target
    assert target.read_bytes() == BODY
    assert _names(target.parent) == {"x.zip"}
    download([server.url("/good")], target, **EXPECTED)
    assert len(server.requests) == 1


@pytest.mark.parametrize("behaviour", ["serve", "ignore range"])
def test_a_partial_file_is_continued_or_begun_anew(server, target, behaviour):
    target.parent.mkdir()
    target.with_name("x.zip.partial").write_bytes(BODY[:300_000])
    server.behaviours["/good"] = [behaviour]
    download([server.url("/good")], target, **EXPECTED)
    assert target.read_bytes() == BODY
    assert server.requests == [("/good", "bytes=300000-")]


def test_a_cut_connection_is_continued(server, target):
    server.behaviours["/good"] = ["cut"]
    download([server.url("/good")], target, **EXPECTED, wait=0)
    assert target.read_bytes() == BODY
    assert server.requests == [("/good", None), ("/good", f"bytes={len(BODY) // 2}-")]


def test_a_partial_file_of_something_else_does_not_spoil_the_download(server, target):
    target.parent.mkdir()
    for junk in (b"x" * 300_000, b"x" * len(BODY), b"x" * 800_000):
        target.with_name("x.zip.partial").write_bytes(junk)
        download([server.url("/good")], target, **EXPECTED, wait=0)
        assert target.read_bytes() == BODY
        target.unlink()


def test_a_cut_file_of_unknown_hash_is_noticed_by_its_length(server, target):
    server.behaviours["/good"] = ["cut"] * 3
    assert "the connection ended after 350,000 bytes" in refused(download, [server.url("/good")], target, wait=0)
    assert not target.exists()
    server.behaviours["/good"] = ["no length"]
    assert download([server.url("/good")], target).read_bytes() == BODY


@pytest.mark.parametrize("behaviour", [500, 503, 429, "cut"])
def test_passing_faults_are_tried_three_times(server, target, behaviour):
    server.behaviours["/good"] = [behaviour, behaviour]
    download([server.url("/good")], target, **EXPECTED, wait=0)
    assert target.read_bytes() == BODY
    target.unlink()
    server.behaviours["/good"] = [500] * 3
    server.requests.clear()
    refused(download, [server.url("/good")], target, **EXPECTED, wait=0)
    assert len(server.requests) == 3


@pytest.mark.parametrize("first", ["/missing", "/bad", "/short", "/long"])
def test_the_next_mirror_takes_over(server, target, first):
    server.files |= {"/short": BODY[:-1], "/long": BODY + b"x"}
    server.behaviours["/short"] = server.behaviours["/long"] = ["no length"] * 3
    download([server.url(first), server.url("/good")], target, **EXPECTED, wait=0)
    assert target.read_bytes() == BODY
    assert _names(target.parent) == {"x.zip"}


def test_wrong_content_is_never_left_nor_replaces_anything(server, target):
    message = refused(download, [server.url("/bad")], target, **EXPECTED)
    assert "wrong md5" in message
    assert f"put it at {target}, or set TINY_IMAGENET" in message
    assert _names(target.parent) == set()
    target.write_bytes(b"mine")
    refused(download, [server.url("/bad")], target, **EXPECTED)
    assert target.read_bytes() == b"mine"


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:,x"])
def test_redirects_to_anything_but_http_are_refused(server, target, location):
    server.behaviours["/good"] = [f"to {location}"]
    assert "redirect" in refused(download, [server.url("/good")], target, **EXPECTED).lower()
    assert not target.exists()


def test_redirects_are_followed_but_not_from_https_to_http(server, target):
    server.behaviours["/moved"] = ["to /good"]
    download([server.url("/moved")], target, **EXPECTED)
    assert target.read_bytes() == BODY
    request = archive.urllib.request.Request("https://example.org/a")
    with pytest.raises(archive._NextMirror):
        archive._SafeRedirects().redirect_request(request, None, 302, "", {}, "http://example.org/a")


def test_without_a_network_one_line_says_what_to_do(target):
    with Server() as gone:
        address = gone.url("/good")
    message = refused(download, [address], target, **EXPECTED, tries=2, wait=0)
    assert "Connection refused" in message
    assert "TINY_IMAGENET" in message
    assert "no-such-host.invalid" in refused(download, ["https://no-such-host.invalid/x.zip"], target, tries=1)


def test_a_disk_without_room_is_noticed_before_the_download(server, target, monkeypatch):
    usage = archive.shutil.disk_usage("/")._replace(free=500_000)
    monkeypatch.setattr(archive.shutil, "disk_usage", lambda path: usage)
    message = refused(download, [server.url("/good")], target, **EXPECTED)
    assert "500,000 bytes free" in message
    assert _names(target.parent) == set()


def test_an_unwritable_place_is_one_line(server, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    assert "cannot write" in refused(download, [server.url("/good")], tmp_path / "file" / "x.zip", **EXPECTED)
    assert (tmp_path / "file").read_bytes() == b""


def test_two_downloads_at_once_are_one(server, target):
    threads = [threading.Thread(target=download, args=([server.url("/good")], target), kwargs=EXPECTED) for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert target.read_bytes() == BODY
    assert len(server.requests) == 1


# --- The published archive --------------------------------------------------------------------------------------------


@pytest.mark.archive
@pytest.mark.skipif(real_archive() is None, reason="no TINY_IMAGENET and no data/tiny-imagenet-200.zip")
def test_published_archive():
    with open_archive(real_archive()) as opened:
        assert len(opened.files) == 110_000
        assert opened.train_count == 100_000
        assert archive.has_published_classes(opened.wnids)
        assert opened.wnids[0] == "n01443537"
        assert opened.names[0] == "goldfish"
        assert opened.files[0] == LabelledFile("train/n01443537/images/n01443537_0.JPEG", 0, (0, 10, 63, 58))
        first = opened.files[100_000]
        assert (first.path, opened.wnids[first.label]) == ("val/images/val_0.JPEG", "n03444034")
        assert first.box == (0, 32, 44, 62)
        assert opened.read(first)[:3] == b"\xff\xd8\xff"

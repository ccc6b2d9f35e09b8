"""Where the archive is found, and downloads from a server of our own."""

import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from reliability.archives import made_up, refused, write_zip

from tinylab.data import download as module
from tinylab.data.download import download, find


class Handler(http.server.BaseHTTPRequestHandler):
    files: dict[str, bytes]

    def do_GET(self) -> None:
        content = self.files.get(self.path.partition("?")[0])
        self.send_response(404 if content is None else 200)
        cut = self.path.startswith("/cut")
        self.send_header("Content-Length", str(len(content or b"") + 100 * cut))
        self.end_headers()
        self.wfile.write(content or b"")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    return write_zip(tmp_path / "made.zip", made_up()).read_bytes()


@pytest.fixture
def address(whole: bytes) -> Iterator[str]:
    Handler.files = {"/good.zip": whole, "/cut.zip": whole, "/page.zip": b"<html>"}
    Handler.files["/other.zip"] = whole + b"x"
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("bad", ["missing.zip", "cut.zip", "page.zip", "other.zip"])
def test_the_next_address_takes_over_and_a_wrong_file_never_lands(
    tmp_path: Path, address: str, whole: bytes, bad: str
) -> None:
    target, known = tmp_path / "data" / "x.zip", hashlib.sha256(whole).hexdigest()
    problem = refused(download, [f"{address}/{bad}"], target, known)
    assert f"put it at {target}" in problem
    assert not list((tmp_path / "data").iterdir())
    download([f"{address}/{bad}", f"{address}/good.zip"], target, known)
    assert target.read_bytes() == whole
    Handler.files.clear()  # what is right needs no server
    assert download([f"{address}/good.zip"], target, known) == target


def test_without_a_hash_only_a_zip_is_taken(tmp_path: Path, address: str) -> None:
    assert find(f"{address}/good.zip?x=1", tmp_path / "d") == tmp_path / "d" / "good.zip"
    assert "sends something else than a zip" in refused(find, f"{address}/page.zip", tmp_path / "d")
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["good.zip"]


def test_without_a_network_one_line_says_what_to_do(tmp_path: Path) -> None:
    problem = refused(download, ["http://127.0.0.1:9/x.zip"], tmp_path / "x.zip", "0" * 64)
    assert "127.0.0.1:9" in problem
    assert "get it by other means" in problem


def test_auto_takes_the_first_of_its_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TINY_IMAGENET", raising=False)
    calls = []
    monkeypatch.setattr(module, "download", lambda urls, target, known: calls.append(known))
    find("auto", Path("elsewhere"))
    assert calls == [module.ZIP_SHA256]
    find(module.URLS[0], Path("elsewhere"))
    find("https://example.org/other.zip", Path("elsewhere"))
    assert calls[1:] == [module.ZIP_SHA256, None]
    for place in ("data/tiny-imagenet-200/wnids.txt", "data/tiny-imagenet-200.zip"):
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        Path(place).touch()
        wanted = Path("data/tiny-imagenet-200" + (".zip" if place.endswith("zip") else ""))
        assert find("auto", Path("elsewhere")) == wanted
    monkeypatch.setenv("TINY_IMAGENET", "nowhere")
    assert "TINY_IMAGENET is set to nowhere" in refused(find, "auto")
    assert "the source is nowhere" in refused(find, "nowhere")

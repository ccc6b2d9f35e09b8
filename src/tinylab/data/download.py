"""Where Tiny ImageNet comes from: a place on this disk, or one of four addresses."""

import os
import re
import urllib.parse
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pooch
import requests

from tinylab.exceptions import UserError
from tinylab.files import interactive, lock, printable

NAME = "tiny-imagenet-200"
URLS = (
    "https://cs231n.stanford.edu/tiny-imagenet-200.zip",
    "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    # Unmodified copies. They need not be trusted: the bytes are checked.
    "https://zenodo.org/records/10720917/files/tiny-imagenet-200.zip?download=1",
    "https://huggingface.co/datasets/cnak47/cv-datasets/resolve/main/tiny-imagenet-200.zip",
)
ZIP_SHA256 = "6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462022fe5e43c821"


def find(source: str | Path = "auto", data_root: Path = Path("data")) -> Path:
    """Return the zip or folder that `source` means, downloaded if need be.

    "auto" is the first of: $TINY_IMAGENET, the zip or the extracted folder in `data_root` or data/,
    a download to `data_root`. Else a URL, an archive or a folder. What comes from `URLS` has the
    right sha256. Raise `UserError` if there is nothing, or the download fails.
    """
    named = os.environ.get("TINY_IMAGENET", "") if source == "auto" else str(source)
    if not named:
        for root in (data_root, Path("data")):
            for path in (root / f"{NAME}.zip", root / NAME / "wnids.txt"):
                if path.is_file():
                    return path if path.suffix == ".zip" else path.parent
        return download(URLS, data_root / f"{NAME}.zip", ZIP_SHA256)
    if re.match(r"https?://", named):
        path = urllib.parse.unquote(urllib.parse.urlsplit(named).path)
        name = re.sub(r"[^A-Za-z0-9._-]", "_", Path(path).name).strip("._") or f"{NAME}.zip"
        return download([named], data_root / name, ZIP_SHA256 if named in URLS else None)
    path = Path(named).expanduser()
    if not path.exists():
        who = "TINY_IMAGENET is set to" if source == "auto" else "the source is"
        raise UserError(f"{who} {named}, but there is no archive and no folder of that name")
    return path


def download(urls: Sequence[str], target: Path, sha256: str | None = None) -> Path:
    """Download the first of `urls` that gives a zip with the right hash, and return `target`.

    `target` appears whole or not at all. One process at a time.
    """
    problems, http = [], pooch.HTTPDownloader(timeout=30, progressbar=interactive())

    def fetch(url: str, temporary: str, _: object) -> None:
        http(url, temporary, None)
        if not zipfile.is_zipfile(temporary):
            raise ValueError("sends something else than a zip")

    with lock(target, f"another process is downloading {target}; waiting for it"):
        for url in urls:
            try:
                known = f"sha256:{sha256}" if sha256 else None
                pooch.retrieve(url, known, target.name, target.parent, downloader=fetch)
                return target
            except (requests.RequestException, ValueError) as error:  # the latter: a wrong hash
                wrong = "sends other bytes" if "hash" in str(error) else printable(error, 120)
                problems.append(f"{urllib.parse.urlsplit(url).netloc}: {wrong}")
            except OSError as error:
                raise UserError(f"cannot write {target}: {error.strerror or error}") from error
    way = f"get it by other means and put it at {target}, or set TINY_IMAGENET to where it is"
    raise UserError(f"cannot download {target.name} ({'; '.join(problems)}): {way}")

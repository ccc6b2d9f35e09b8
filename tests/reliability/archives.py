"""Made-up archives, seeded damage, and processes of their own: what the tests of the data share."""

import hashlib
import io
import json
import os
import random
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tinylab.data import dataset
from tinylab.exceptions import UserError

WNIDS = ("n03", "n01", "n02")  # as wnids.txt lists them: unsorted, like the published file
ROOT = "tiny-imagenet-200/"

# --- Archives -------------------------------------------------------------------------------------


def jpeg(seed: int, mode: str = "RGB", side: int = 64) -> bytes:
    """A smooth coloured JPEG file, another one for every seed."""
    corners = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(corners).resize((side, side), Image.Resampling.BILINEAR).convert(mode).save(
        buffer, "JPEG"
    )
    return buffer.getvalue()


def made_up() -> dict[str, bytes]:
    """Three classes of four training and two validation images in the published layout; grey and
    CMYK among them."""
    files = {
        "wnids.txt": "".join(f"{wnid}\n" for wnid in WNIDS).encode(),
        "words.txt": b"n00\tentity\nn01\tgoldfish, Carassius auratus\n"
        b"n02\tfire \x1b[31msalamander\nn03\t\n",
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


def write_zip(
    path: Path, files: dict[str, bytes], root: str = ROOT, method: int = zipfile.ZIP_STORED
) -> Path:
    with zipfile.ZipFile(path, "w", method) as out:
        for name, content in files.items():
            out.writestr(f"{root}{name}", content)
    return path


def write_folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def real_archive() -> Path | None:
    named = Path(
        os.environ.get("TINY_IMAGENET") or Path(__file__).parents[2] / "data/tiny-imagenet-200.zip"
    )
    return named if named.exists() else None


# --- What must be said, and what must be left -----------------------------------------------------


def refused(action: Callable[..., object], *arguments: object, **keywords: object) -> str:
    """The message of the UserError that `action` must raise: one readable line."""
    with pytest.raises(UserError) as caught:
        action(*arguments, **keywords)
    message = str(caught.value)
    assert readable(message)
    return message


def readable(message: str) -> bool:
    """Whether a refusal can be shown: one line without control characters, and not endless."""
    return message.isprintable() and len(message) <= 400


def leftovers(folder: Path) -> set[str]:
    """What lies beside the data set, but for its lock and the archive."""
    return {path.name for path in folder.iterdir()} - {"made.zip", "ds.lock"}


def contents(folder: Path) -> dict[str, str]:
    """sha256 of every file below the folder but locks, by its path; of links and the like, only
    that they are there."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "no file"
        for path in sorted(folder.rglob("*"))
        if path.suffix != ".lock"
    }


def change_meta(folder: Path, **changes: object) -> None:
    """Rewrites fields of a data set's meta.json, its hash of itself included: what somebody else
    may have made."""
    meta = json.loads((folder / "meta.json").read_text()) | changes
    meta["sha256"]["meta.json"] = dataset.meta_sha256(meta)
    (folder / "meta.json").write_bytes(dataset.meta_bytes(meta))


# --- Damage ---------------------------------------------------------------------------------------

PAGE = 4096


def damaged(whole: bytes, kind: str, chance: random.Random) -> bytes:
    """`whole` with one fault of a kind: flip, flip near the end, truncate, zero tail, zero page,
    append, swap pages."""
    size = len(whole)
    result = bytearray(whole)
    while result == whole:
        place = chance.randrange(size)
        if kind == "flip":
            result[place] ^= 1 << chance.randrange(8)
        elif kind == "flip near the end":
            result[-1 - chance.randrange(min(size, 25_000))] ^= 1 << chance.randrange(8)
        elif kind == "truncate":
            del result[place:]
        elif kind == "zero tail":
            result[place:] = bytes(size - place)
        elif kind == "zero page":
            result[place : place + PAGE] = bytes(len(result[place : place + PAGE]))
        elif kind == "append":
            result += chance.randbytes(1 + chance.randrange(PAGE))
        else:
            assert kind == "swap pages"
            page = min(PAGE, size // 2)
            first, second = sorted(chance.sample(range(size // page), 2))
            one, other = (
                slice(first * page, (first + 1) * page),
                slice(second * page, (second + 1) * page),
            )
            result[one], result[other] = result[other], result[one]
    return bytes(result)


# --- Processes ------------------------------------------------------------------------------------


def run(script: str, *arguments: str) -> subprocess.Popen:
    """Start a Python process of its own, in which tinylab can be imported."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment |= {"OMP_NUM_THREADS": "1"}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    return subprocess.Popen(command, env=environment, text=True, **pipes, start_new_session=True)

"""A checkpoint, a weights file or a finished run in which anything has changed: it is noticed, and
never used."""

import random
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from reliability.archives import damaged, real_archive
from tinylab.cli import main
from tinylab.data.archive import verify_archive
from tinylab.exceptions import UserError
from tinylab.run.checkpoint import NEWEST, PREVIOUS, find, load, read, save
from tinylab.run.folder import CHECKSUMS, FINAL_FILES, Run, verify_run

pytestmark = pytest.mark.promise("damaged-files")

KINDS = ("flip", "truncate", "zero tail", "append", "swap pages")


def state(number: int) -> dict:
    """A checkpoint of twelve pages, no two of which are alike."""
    rng = torch.Generator().manual_seed(number)
    return {
        "epoch": number,
        "step": 3,
        "weight": torch.rand(10_000, generator=rng),
        "history": [{"loss": 0.5}],
    }


def test_every_damage_of_a_checkpoint_is_noticed_and_the_previous_one_used(
    tmp_path: Path, full: bool, tally: Callable
) -> None:
    for number in (1, 2):
        save(tmp_path, state(number))
    whole, chance = (tmp_path / NEWEST).read_bytes(), random.Random(0)
    faults, missed = 10_000 if full else 850, []
    for fault in range(faults):
        kind = KINDS[fault % len(KINDS)]
        (tmp_path / NEWEST).write_bytes(damaged(whole, kind, chance))
        if read(tmp_path / NEWEST) is not None:
            missed.append(kind)
        if fault % 20 == 0:  # what a run does then
            loaded, notice = load(tmp_path)
            assert loaded["epoch"] == 1
            assert torch.equal(loaded["weight"], state(1)["weight"])
            assert (
                notice == f"{tmp_path / NEWEST} is damaged; continuing from {tmp_path / PREVIOUS}"
            )
    tally(checkpoint_faults=faults, missed=len(missed))
    assert not missed
    (tmp_path / NEWEST).write_bytes(whole)
    assert find(tmp_path).progress == (2, 3)


@pytest.fixture
def run(finished_run: Run, tmp_path: Path) -> Run:
    """A finished run of one's own."""
    shutil.copytree(finished_run.folder, tmp_path / "run")
    return Run(tmp_path / "run")


def found(run: Run) -> str:
    """The line in which verifying the run says what is wrong, or nothing."""
    try:
        verify_run(run)
    except UserError as error:
        return "" if "\n" in str(error) else str(error)
    return ""


def test_every_damage_of_a_finished_run_is_found(run: Run, full: bool, tally: Callable) -> None:
    assert "finished, 7 files as they were written, 2 whole checkpoints" in verify_run(run)
    names = [
        *FINAL_FILES,
        "summary.json",
        CHECKSUMS,
        f"checkpoints/{NEWEST}",
        f"checkpoints/{PREVIOUS}",
    ]
    chance, missed = random.Random(1), []
    faults = 40 if full else 4
    for name in names:
        path = run.folder / name
        whole = path.read_bytes()
        for fault in range(faults):
            kind = KINDS[fault % len(KINDS)]
            path.write_bytes(damaged(whole, kind, chance))
            if not found(run) or (name != CHECKSUMS and Path(name).name not in found(run)):
                missed.append(f"{name}: {kind}")
        path.unlink()
        if name in (*FINAL_FILES, CHECKSUMS) and name not in found(run):
            missed.append(f"{name}: gone")
        path.write_bytes(whole)
    tally(faults_in_a_finished_run=faults * len(names), missed=len(missed))
    assert not missed


def test_damaged_weights_are_not_used(
    run: Run, monkeypatch: pytest.MonkeyPatch, tally: Callable
) -> None:
    """safetensors itself accepts nearly any flipped bit."""
    from tinylab.cli import trained_model

    class Data:
        wnids = ("n90000001", "n90000002", "n90000003")

    trained_model(run, Data)
    whole, chance = run.weights.read_bytes(), random.Random(2)
    for fault in range(40):
        run.weights.write_bytes(damaged(whole, KINDS[fault % len(KINDS)], chance))
        with pytest.raises(UserError, match=r"model.safetensors is missing or damaged"):
            trained_model(run, Data)
    tally(damaged_weights_refused=40)


def test_sha256sum_itself_can_check_a_run(run: Run) -> None:
    """The file has the format of coreutils, so that nobody needs this project to check what it
    wrote."""
    tool = shutil.which("sha256sum")
    if tool is None:
        pytest.skip("no sha256sum here")
    done = subprocess.run(
        [tool, "--check", "--strict", CHECKSUMS], cwd=run.folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": OK") == 7


# --- `tinylab verify` -----------------------------------------------------------------------------


def test_verify_tells_of_a_run_in_one_line(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(run.folder)]) == 0
    out, err = capsys.readouterr()
    assert out == (
        f"{run.folder}: finished, 7 files as they were written, 2 whole checkpoints, the newest "
        "of epoch 3, step 0\n"
    )
    assert err == ""
    for name in ("predictions.npz", "model.safetensors"):
        path = run.folder / name
        path.write_bytes(path.read_bytes()[:-1])
    assert main(["verify", str(run.folder)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert (
        err
        == f"tinylab: {run.folder} is damaged: not as written or missing: predictions.npz, model.safetensors\n"
    )


def test_verify_tells_of_a_run_that_is_not_finished(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    (run.folder / "summary.json").unlink()
    assert main(["verify", str(run.folder)]) == 0
    assert "not finished, 2 epochs done, 2 whole checkpoints" in capsys.readouterr().out
    (run.checkpoints / NEWEST).write_bytes(b"damaged")
    assert main(["verify", str(run.folder)]) == 2
    _, err = capsys.readouterr()
    assert f"{NEWEST}: not as written; {PREVIOUS} is whole, and training continues from it" in err


@pytest.mark.archive
def test_verify_finds_a_single_bit_in_the_real_archive(tmp_path: Path, tally: Callable) -> None:
    """Also in one that was packed anew, whose own bytes are nobody's."""
    source = real_archive()
    if source is None or not source.is_file():
        pytest.skip("no TINY_IMAGENET and no data/tiny-imagenet-200.zip")
    copy = tmp_path / "copy.zip"
    shutil.copyfile(source, copy)
    with zipfile.ZipFile(source) as opened:
        image = next(
            info for info in opened.infolist() if info.filename.endswith("n01443537_7.JPEG")
        )
    with open(copy, "r+b") as file:
        file.seek(image.header_offset + 200 + image.compress_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 4]))
    with pytest.raises(UserError, match=r"n01443537_7.JPEG is damaged"):
        verify_archive(copy)
    tally(bits_in_the_real_archive=1)

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
from tinylab.run.checkpoint import NEWEST, PREVIOUS, load, read, save
from tinylab.run.folder import CHECKSUMS, FINAL_FILES, Run
from tinylab.run.verify import verify_run
from tinylab.share.predict import load as load_network

pytestmark = pytest.mark.promise("damaged-files")

KINDS = ("flip", "truncate", "zero tail", "append", "swap pages")


def state(number: int) -> dict:
    """A checkpoint of twelve pages, no two of which are alike."""
    weight = torch.rand(10_000, generator=torch.Generator().manual_seed(number))
    return {"epoch": number, "step": 3, "weight": weight, "history": [{"loss": 0.5}]}


@pytest.fixture
def run(finished_run: Run, tmp_path: Path) -> Run:
    """A finished run of one's own."""
    return Run(Path(shutil.copytree(finished_run.folder, tmp_path / "run")))


def test_every_damage_of_a_checkpoint_is_noticed_and_the_previous_one_used(
    tmp_path: Path, full: bool, tally: Callable
) -> None:
    newest, previous = tmp_path / NEWEST, tmp_path / PREVIOUS
    for number in (1, 2):
        save(tmp_path, state(number))
    whole, chance = newest.read_bytes(), random.Random(0)
    faults, missed = 10_000 if full else 850, []
    for fault in range(faults):
        kind = KINDS[fault % len(KINDS)]
        newest.write_bytes(damaged(whole, kind, chance))
        if read(newest) is not None:
            missed.append(kind)
        if fault % 20 == 0:  # what a run does then
            loaded, notice = load(tmp_path)
            assert torch.equal(loaded["weight"], state(1)["weight"])
            assert notice == f"{newest} is damaged; continuing from {previous}"
    tally(checkpoint_faults=faults, missed=len(missed))
    assert not missed


def test_every_damage_of_a_finished_run_is_found(run: Run, full: bool, tally: Callable) -> None:
    assert "finished, 7 files as they were written, 2 whole checkpoints" in verify_run(run)
    checkpoints = (f"checkpoints/{NEWEST}", f"checkpoints/{PREVIOUS}")
    names = (*FINAL_FILES, "summary.json", CHECKSUMS, *checkpoints)
    faults, chance = 40 if full else 4, random.Random(1)
    for name in names:
        path = run.folder / name
        whole = path.read_bytes()
        named = r"\w" if name == CHECKSUMS else path.name  # a changed sum is another file's
        for fault in range(faults):
            path.write_bytes(damaged(whole, KINDS[fault % len(KINDS)], chance))
            with pytest.raises(UserError, match=named) as caught:
                verify_run(run)
            assert "\n" not in str(caught.value)
        path.unlink()
        if name in (*FINAL_FILES, CHECKSUMS):
            with pytest.raises(UserError, match=path.name):
                verify_run(run)
        path.write_bytes(whole)
    tally(faults_in_a_finished_run=faults * len(names))


def test_damaged_weights_are_not_used(run: Run, tally: Callable) -> None:
    """safetensors itself accepts nearly any flipped bit."""
    load_network(run.folder)
    whole, chance = run.weights.read_bytes(), random.Random(2)
    for fault in range(40):
        run.weights.write_bytes(damaged(whole, KINDS[fault % len(KINDS)], chance))
        with pytest.raises(UserError, match=r"model.safetensors is damaged"):
            load_network(run.folder)
    tally(damaged_weights_refused=40)


def test_sha256sum_itself_can_check_a_run(run: Run) -> None:
    """Nobody needs this project to check what it wrote."""
    tool = shutil.which("sha256sum")
    if tool is None:
        pytest.skip("no sha256sum here")
    command = [tool, "--check", "--strict", CHECKSUMS]
    done = subprocess.run(command, cwd=run.folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": OK") == 7


def test_verify_tells_of_a_run_in_one_line(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    def verify(status: int) -> str:
        assert main(["verify", str(run.folder)]) == status
        out, err = capsys.readouterr()
        assert (err if status == 0 else out) == ""
        return (out + err).removesuffix("\n")

    files = "finished, 7 files as they were written"
    newest = "2 whole checkpoints, the newest after epoch 2"
    assert verify(0) == f"{run.folder}: {files}, {newest}"
    for name in ("predictions.npz", "model.safetensors"):
        path = run.folder / name
        path.write_bytes(path.read_bytes()[:-1])
    bad = "damaged: not as written or missing: predictions.npz, model.safetensors"
    assert verify(2) == f"tinylab: {run.folder} is {bad}"
    (run.folder / "summary.json").unlink()
    assert verify(0) == f"{run.folder}: not finished, 2 epochs done, {newest}"
    (run.checkpoints / NEWEST).write_bytes(b"damaged")
    whole = f"{PREVIOUS} is whole, and training continues from it"
    assert verify(2).endswith(f"is damaged: {NEWEST}: not as written; {whole}")


@pytest.mark.archive
def test_verify_finds_a_single_bit_in_the_real_archive(tmp_path: Path, tally: Callable) -> None:
    source = real_archive()
    if source is None or not source.is_file():
        pytest.skip("no TINY_IMAGENET and no data/tiny-imagenet-200.zip")
    copy = tmp_path / "copy.zip"
    shutil.copyfile(source, copy)
    with zipfile.ZipFile(source) as opened:
        names = {Path(each.filename).name: each for each in opened.infolist()}
    image = names["n01443537_7.JPEG"]
    with open(copy, "r+b") as file:
        file.seek(image.header_offset + 200 + image.compress_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 4]))
    with pytest.raises(UserError, match=r"n01443537_7.JPEG is damaged"):
        verify_archive(copy)
    tally(bits_in_the_real_archive=1)

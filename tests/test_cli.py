"""Commands from outside: what they print, and how they end. What they refuse is in reliability/test_bad_input.py."""

import contextlib
import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tinylab.cli import COMMANDS, main, parse
from tinylab.recipe import Recipe
from tinylab.run.folder import Run

TRAIN = "train smoke --epochs 1 --width 16 --limit-classes 2 --split official"


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a user ran sample, prepare and train, with default places; two classes, one epoch."""
    folder = tmp_path_factory.mktemp("chain with a space")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        patched.delenv("TINY_IMAGENET", raising=False)  # it would come before the archive made here
        assert main(["sample", "data/tiny-imagenet-200.zip"]) == 0
        assert main(["prepare", "--workers", "1"]) == 0
        assert main(TRAIN.split()) == 0
    return folder


# --- How a command ends -----------------------------------------------------------------------------------------------


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(_self: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(COMMANDS["summary"], "run", bug)
    with pytest.raises(ZeroDivisionError):
        main(["summary"])


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs /dev/full")
def test_a_full_disk_behind_stdout_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with contextlib.suppress(OSError), open("/dev/full", "w") as full:  # closing it fails, too
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["schedule", "published", "--epochs", "1"]) == 2
    assert capsys.readouterr().err == "tinylab: output: No space left on device\n"


# --- What commands print ----------------------------------------------------------------------------------------------


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for name in COMMANDS:
        assert f"  {name}" in out
    assert "published" in out
    assert main([]) == 2


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_its_options(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code in (None, 0)
    out, err = capsys.readouterr()
    assert f"tinylab {name}" in out
    assert err == ""


def test_every_recipe_field_is_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "smoke", "--help"])
    out = capsys.readouterr().out
    for field in Recipe.__dataclass_fields__:
        assert re.search(rf"--{field.replace('_', '-')}\b", out), field


def test_the_schedule_is_csv(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule", "published", "--epochs", "2", "--images", "1000"]) == 0
    out, err = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(out)))
    assert list(rows[0]) == ["step", "learning_rate", "momentum"]
    assert [int(row["step"]) for row in rows] == list(range(8))
    assert float(rows[0]["learning_rate"]) == pytest.approx(0.002)
    assert float(rows[0]["momentum"]) == pytest.approx(0.95)
    assert err == ""


def test_the_published_schedule_prints_the_logged_learning_rates(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["schedule", "published"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 30 * 301
    with open(repository / "results" / "reference" / "published_run.csv", newline="") as file:
        logged = [float(row["lr_at_epoch_start"]) for row in csv.DictReader(file)]
    assert [float(line.split(",")[1]) for line in lines[1::301]] == logged


def test_the_summary_is_the_table_and_nothing_else(
    repository: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["summary"]) == 0
    out, err = capfd.readouterr()
    assert out == (repository / "results" / "reference" / "model_summary.txt").read_text()
    assert err == ""


def test_a_reader_that_has_seen_enough_is_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["schedule", "published"]) == 0
    assert capsys.readouterr().err == ""


# --- The chain, as a user runs it -------------------------------------------------------------------------------------


@pytest.fixture
def in_chain(
    chain: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable:
    """A function that runs a command line in the folder of `chain` and returns the lines it prints."""
    monkeypatch.chdir(chain)
    monkeypatch.delenv("TINY_IMAGENET", raising=False)

    def call(line: str) -> list[str]:
        capfd.readouterr()
        assert main(line.split()) == 0
        out, err = capfd.readouterr()
        assert err == ""
        return out.splitlines()

    return call


def test_a_run_lands_in_its_default_folder(chain: Path) -> None:
    run = Run(chain / "runs" / "smoke-official-s0")
    assert run.finished
    assert (run.recipe.epochs, run.recipe.width, run.recipe.name) == (1, 16, "smoke")
    assert (run.summary["train_images"], run.summary["test_images"]) == (100, 20)
    assert run.identity["data_folder"] == "data/tiny-imagenet"


def test_the_same_command_shows_the_finished_run(in_chain: Callable) -> None:
    lines = in_chain(TRAIN)
    assert "is finished" in lines[0]
    assert lines[-1].startswith("runs/smoke-official-s0: ")


def test_preparing_again_only_opens(in_chain: Callable) -> None:
    lines = in_chain("prepare --source nowhere.zip")
    assert lines[0] == "data/tiny-imagenet: 600 images (500 training, 100 validation)"


def test_verifying_tells_whether_anything_changed(
    in_chain: Callable, chain: Path, tmp_path: Path
) -> None:
    assert "every file is as it was prepared" in in_chain("verify")[0]
    shutil.copytree(chain / "data" / "tiny-imagenet", tmp_path / "copy")
    images = bytearray((tmp_path / "copy" / "images.npy").read_bytes())
    images[5000] ^= 1
    (tmp_path / "copy" / "images.npy").write_bytes(images)
    assert main(["verify", str(tmp_path / "copy")]) == 2


def test_evaluating_again_gives_the_run_s_numbers(in_chain: Callable, chain: Path) -> None:
    summary = Run(chain / "runs" / "smoke-official-s0").summary
    result = json.loads(in_chain("evaluate runs/smoke-official-s0")[-1])
    assert (result["tta"], result["protocol"], result["classes"], result["test_total"]) == (
        "none",
        "official",
        2,
        20,
    )
    for name in ("test_top1", "test_top5", "test_correct"):
        assert result[name] == summary[name]
    assert result["test_loss"] == pytest.approx(summary["test_loss"], rel=1e-6)


def test_evaluating_with_mirror_images_says_so(in_chain: Callable) -> None:
    plain, flip = (
        json.loads(in_chain(f"evaluate runs/smoke-official-s0 --tta {tta}")[-1])
        for tta in ("none", "flip")
    )
    assert flip["tta"] == "flip"
    assert flip["test_total"] == plain["test_total"]
    assert flip["test_loss"] != plain["test_loss"]


def test_explaining_draws_every_figure(in_chain: Callable, chain: Path) -> None:
    lines = in_chain("explain runs/smoke-official-s0 --count 2")
    run = Run(chain / "runs" / "smoke-official-s0")
    names = {
        "samples",
        "augmentation",
        "learning_rate",
        "curves",
        "classes",
        "misclassified",
        "gradcam",
    }
    names |= {
        "class_maps",
        "confusion",
        "confused_pairs",
        "confident_mistakes",
        "hesitant_hits",
        "reliability",
    }
    names |= {"label_conflicts", "localisation"}
    assert {path.stem for path in run.figures.iterdir()} == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in run.figures.glob("*.png"))
    explained = json.loads((run.folder / "explain.json").read_text())
    wrong = run.summary["test_images"] - run.summary["test_correct"]
    assert (explained["tested"], explained["wrong"]) == (20, wrong)
    assert len(explained["images"]) == min(2, wrong)
    assert set(explained["figures"]) == names
    assert explained["localisation"]["scored"] + explained["localisation"]["degenerate"] == 20
    assert explained["faithfulness"] is None
    assert lines[-1].startswith(f"{wrong} of 20 test images are wrong")
    for name, count in (("classes.csv", 3), ("confusion.csv", 3), ("localisation.csv", 21)):
        assert len((run.folder / name).read_text().splitlines()) == count


def test_explaining_all_images_of_another_stage_and_asking_for_faithfulness(
    in_chain: Callable, chain: Path
) -> None:
    in_chain(
        "explain runs/smoke-official-s0 --count 1 --all --layer layer3 --method eigencam --faithfulness 3"
    )
    run = Run(chain / "runs" / "smoke-official-s0")
    explained = run.explanation
    assert (explained["localisation"]["stage"], explained["localisation"]["method"]) == (
        "layer3",
        "eigencam",
    )
    assert explained["localisation"]["native_size"] == [16, 16]
    assert explained["faithfulness"]["images"] == 3
    assert (run.figures / "faithfulness.png").exists()


def test_a_report_is_one_file_and_explains_what_is_not_yet_explained(
    in_chain: Callable, chain: Path
) -> None:
    run = Run(chain / "runs" / "smoke-official-s0")
    (run.folder / "explain.json").unlink(missing_ok=True)
    lines = in_chain("report runs/smoke-official-s0")
    assert lines[-1].startswith("runs/smoke-official-s0/report.html")
    page = (run.folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(run.explanation["figures"])
    assert f"{run.summary['test_top1']:.2f}" in page
    before = (run.folder / "explain.json").stat().st_mtime_ns
    lines = in_chain("report runs/smoke-official-s0 --out new/page.html")
    assert len(lines) == 1
    assert (chain / "new" / "page.html").read_text() == page
    assert (run.folder / "explain.json").stat().st_mtime_ns == before


def test_what_an_earlier_explanation_made_does_not_stay_beside_a_later_one(
    in_chain: Callable, chain: Path
) -> None:
    run = Run(chain / "runs" / "smoke-official-s0")
    in_chain("explain runs/smoke-official-s0 --count 1 --faithfulness 1")
    assert (run.figures / "faithfulness.png").exists()
    weights = run.weights.read_bytes()
    run.weights.write_bytes(b"")  # without maps no network is needed
    try:
        in_chain("explain runs/smoke-official-s0 --count 0 --sample 0")
    finally:
        run.weights.write_bytes(weights)
    left = {path.stem for path in run.figures.iterdir()}
    assert left == set(run.explanation["figures"])
    assert not left & {"faithfulness", "localisation", "gradcam", "misclassified", "class_maps"}
    assert not (run.folder / "localisation.csv").exists()


def test_a_page_shows_no_picture_from_elsewhere(in_chain: Callable, chain: Path) -> None:
    """explain.json may be somebody's: its list of figures names files below figures/ and nothing else."""
    run = Run(chain / "runs" / "smoke-official-s0")
    in_chain("explain runs/smoke-official-s0 --count 0 --sample 0")
    shutil.copy(run.figures / "curves.png", chain / "private.png")
    record = run.explanation | {
        "figures": ["../../../private", str(chain / "private"), {}, 3, None, "curves"]
    }
    run.write("explain.json", record)
    in_chain("report runs/smoke-official-s0")
    assert (run.folder / "report.html").read_text().count("data:image/png") == 1
    (run.folder / "explain.json").unlink()


def test_an_explanation_of_other_weights_does_not_count(in_chain: Callable, chain: Path) -> None:
    in_chain("explain runs/smoke-official-s0 --count 1 --sample 0")
    run = Run(chain / "runs" / "smoke-official-s0")
    assert run.explanation["localisation"] is None
    path = run.folder / "explain.json"
    path.write_text(path.read_text().replace(run.summary["model_sha256"], "0" * 64))
    assert run.explanation is None


def test_predicting_names_classes_and_draws(in_chain: Callable, chain: Path) -> None:
    rng = np.random.default_rng(0)
    (chain / "there").mkdir(exist_ok=True)
    for name in ("a.png", "there/a.png", "there/A-2.png"):
        Image.fromarray(rng.integers(0, 256, (90, 120, 3), dtype=np.uint8)).save(chain / name)
    lines = in_chain(
        "predict runs/smoke-official-s0 a.png there/a.png there/A-2.png --gradcam seen --json"
    )
    answers = [json.loads(line) for line in lines]
    assert [answer["image"] for answer in answers] == ["a.png", "there/a.png", "there/A-2.png"]
    assert [Path(answer["figure"]).name for answer in answers] == ["a.png", "a-2.png", "A-2-2.png"]
    assert all((chain / answer["figure"]).read_bytes().startswith(b"\x89PNG") for answer in answers)
    for answer in answers:
        assert len(answer["top"]) == 2  # the run has no more classes
        assert sum(guess["probability"] for guess in answer["top"]) == pytest.approx(1)
    lines = in_chain("predict runs/smoke-official-s0/model.safetensors a.png --top 1")
    assert lines[0] == "a.png"
    assert re.fullmatch(r" *[\d.]+ %  n\d{8}  .+", lines[1])
    assert answers[0]["top"][0]["wnid"] in lines[1]


def test_exporting_hands_over_what_can_be_loaded(in_chain: Callable, chain: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the extra 'export' is not installed")
    lines = in_chain("export runs/smoke-official-s0 --onnx given/model.onnx --to given")
    assert {path.name for path in (chain / "given").iterdir()} >= {
        "model.safetensors",
        "README.md",
        "model.onnx",
    }
    assert "differ by at most" in lines[-1]
    there = Run(chain / "runs" / "smoke-official-s0").weights
    (chain / "mine").mkdir()
    (chain / "mine" / "README.md").write_text("mine")
    for line in (
        "--to mine --onnx mine.onnx",
        f"--onnx {there.relative_to(chain)}",
        "--onnx given",
    ):
        assert main(f"export runs/smoke-official-s0 {line}".split()) == 2
    assert not (chain / "mine.onnx").exists()
    assert (chain / "given" / "model.safetensors").read_bytes() == there.read_bytes()


def test_finding_a_learning_rate_leaves_a_picture_and_no_run(
    in_chain: Callable, chain: Path
) -> None:
    before = set((chain / "runs").iterdir())
    lines = in_chain(
        "find-lr smoke --width 16 --limit-classes 2 --split official --steps 12 --workers 0"
    )
    assert lines[0] == "runs/find-lr-smoke-official-s0.png"
    assert set((chain / "runs").iterdir()) - before == {
        chain / "runs" / "find-lr-smoke-official-s0.png"
    }
    assert "--max-learning-rate" in lines[1] or lines[1].startswith("no suggestion")


def test_a_suggested_learning_rate_comes_with_the_options_it_was_found_with() -> None:
    from tinylab.cli import _with_learning_rate
    from tinylab.recipes import named

    smoke, fast = named("smoke"), named("speedrun")
    changed = replace(smoke, batch_size=7, nesterov=not smoke.nesterov, mean=(0.1, 0.2, 0.3))
    for recipe in (changed, replace(fast, width=8), fast):
        words = _with_learning_rate(recipe, 0.0123456).split()
        again = parse(["train", *words]).recipe
        assert again.max_learning_rate == 0.012
        assert replace(again, max_learning_rate=recipe.max_learning_rate,
                       muon_learning_rate=recipe.muon_learning_rate) == recipe  # fmt: skip
        if recipe.optimizer == "muon":
            share = again.muon_learning_rate / recipe.muon_learning_rate
            assert share == pytest.approx(0.0123456 / recipe.max_learning_rate, rel=0.05)


def test_tracking_writes_every_epoch_for_tensorboard(in_chain: Callable, chain: Path) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="the extra 'track' is not installed",
    )
    in_chain(f"{TRAIN} --run runs/tracked --track tensorboard")
    events = accumulator.EventAccumulator(str(chain / "runs" / "tracked" / "tensorboard"))
    events.Reload()
    in_chain(
        f"{TRAIN} --run runs/tracked --track tensorboard"
    )  # finished: told once more, shown once
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("top1/test")]
    assert shown == [
        (1, pytest.approx(Run(chain / "runs" / "tracked").summary["test_top1"], rel=1e-6))
    ]


def test_ctrl_c_in_a_command_without_a_run_is_one_line(
    sample_zip: Path, subprocess_environment: dict[str, str], tmp_path: Path
) -> None:
    """Interrupted while decoding: 130, and no half-made data folder."""
    code = (
        "import os, signal, sys\n"
        "from tinylab.data import dataset\n"
        "from tinylab.cli import main\n"
        "dataset._decode = lambda *_: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [
        sys.executable,
        "-c",
        code,
        "prepare",
        "--source",
        str(sample_zip),
        "--workers",
        "1",
        "--data",
        "data",
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=subprocess_environment,
        cwd=tmp_path,
        timeout=120,
    )
    assert done.returncode == 128 + signal.SIGINT, done.stderr
    assert done.stderr.splitlines()[-1] == "tinylab: stopped"
    assert "Traceback" not in done.stderr
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
def test_terminating_preparation_leaves_nothing(
    sample_zip: Path, tmp_path: Path, subprocess_environment: dict[str, str]
) -> None:
    slow = (
        "import sys, time; from tinylab.data import dataset; from tinylab.cli import main\n"
        "def write(*arguments):\n    open('writing', 'w').close(); time.sleep(30)\n"
        "dataset._write_images = write; sys.exit(main(['prepare', '--source', sys.argv[1], '--data', 'data']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", slow, str(sample_zip)],
        cwd=tmp_path,
        env=subprocess_environment,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "writing").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143, err
    assert len(err.decode().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.lock", "writing"]


@pytest.mark.parametrize(
    ("environment", "tells"),
    [
        ({}, True),
        ({"RANK": "some batch system's", "LOCAL_RANK": "3"}, True),
        ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}, False),
        (
            {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "0"},
            True,
        ),  # the first on the second machine
    ],
)
def test_of_torchruns_processes_one_on_each_machine_complains(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    environment: dict,
    tells: bool,
) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "nope"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == tells

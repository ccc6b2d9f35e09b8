"""The command line: every command end to end, exit statuses, one line for what users do wrong."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest

from tinylab.cli import COMMANDS, main
from tinylab.options import GROUPS
from tinylab.recipe import Recipe
from tinylab.run.folder import Run

TINY = ["--epochs", "1", "--width", "8", "--device", "cpu", "--precision", "fp32"]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, sample_zip: Path) -> Path:
    """A working folder with prepared made-up data and a finished run."""
    folder = tmp_path_factory.mktemp("desk")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        assert main(["prepare", "--source", str(sample_zip), "--data", "data"]) == 0
        assert main(["train", "smoke", *TINY, "--data", "data", "--run", "runs/a"]) == 0
    return folder


@pytest.fixture(autouse=True)
def _here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "desk" in request.fixturenames:
        monkeypatch.chdir(request.getfixturevalue("desk"))


def test_every_command_works(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "runs/a", "--precision", "fp32"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["test_correct"] == Run(desk / "runs/a").summary["test_correct"]
    assert main(["evaluate", "runs/a", "--tta", "flip", "--precision", "fp32"]) == 0
    flipped = json.loads(capsys.readouterr().out.splitlines()[-1])["test_top1"]
    assert flipped == Run(desk / "runs/a").summary["flip_tta_top1"]
    assert main(["explain", "runs/a", "--count", "2", "--sample", "4"]) == 0
    assert "test images are wrong" in capsys.readouterr().out
    assert main(["report", "runs/a"]) == 0
    assert (desk / "runs/a/report.html").stat().st_size > 100_000
    assert main(["predict", "runs/a", "runs/a/figures/samples.png", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(answer["top"]) == 5
    picture = "runs/a/figures/samples.png"
    assert main(["predict", "runs/a", picture, picture, "--gradcam", "maps"]) == 0
    assert sorted(path.name for path in Path("maps").iterdir()) == ["samples-2.png", "samples.png"]
    assert main(["predict", "runs/a", "--test", "maps", "--csv", "answers.csv"]) == 0
    with open("answers.csv", newline="") as file:
        rows = [*csv.DictReader(file)]
    assert [row["file"] for row in rows] == ["samples-2.png", "samples.png"]
    assert main(["export", "runs/a"]) == 0
    assert (desk / "runs/a/export/README.md").exists()
    assert main(["find-lr", "smoke", "--data", "data", "--steps", "10", "--width", "8"]) == 0
    for path, expected in (("data", "as it was prepared"), ("runs/a", "as they were written")):
        assert main(["verify", path]) == 0
        assert expected in capsys.readouterr().out
    assert main(["train", "smoke", *TINY, "--data", "data", "--run", "runs/a"]) == 0
    assert "is finished; this is its log" in capsys.readouterr().out


def test_the_course_runs_schedule_is_printed(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["schedule", "published"]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert len(rows) == 9030
    with open(repository / "results" / "reference" / "published_run.csv", newline="") as file:
        logged = [float(row["lr_at_epoch_start"]) for row in csv.DictReader(file)]
    assert [float(row["learning_rate"]) for row in rows[::301]] == logged


def test_the_summary_is_the_table_and_nothing_else(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["summary"]) == 0
    table = (repository / "results" / "reference" / "model_summary.txt").read_text()
    assert capsys.readouterr().out.split() == table.split()


WRONG = {
    "nope": "unknown command 'nope'",
    "train": "which recipe?",
    "train nope": "unknown recipe 'nope'",
    "train smoke --data nowhere": "no data set in nowhere: `tinylab prepare",
    "train smoke --data data --epochs 0": "epochs",
    "train smoke --data data --seed -1": "seed must be",
    "train smoke --data data --batch-size 9999": "batch-size 9999 is more than",
    "train smoke --data data --run data/x": "is inside the data folder",
    "train smoke --data data --run runs/a --epochs 2": "holds another run",
    "train accurate --data data --batch-size 64 --workers 2": "workers run albumentations",
    "evaluate nowhere": "missing",
    "explain runs/a --count -1": "count must be from 0 to 400",
    "explain runs/a --stage layer9": "layer9",
    "report runs/a --out runs/a/run.json": "is a record of the run",
    "predict runs/a": "which images?",
    "predict runs/a runs/a/run.json": "is not a picture",
    "predict runs/a x.png --csv x.csv": "or --test FOLDER --csv OUT",
    "predict runs/a --test data --csv x.csv": "data holds no pictures (.jpeg, .jpg, .png,",
    "predict runs/a x.png --top 0": "top must be",
    "export runs/a --onnx data/x.onnx": "data is a data folder",
    "export runs/a --to x --hub a/b/c": "x is not pushed: Repo id must be",
    "schedule published --images 0": "images must be from 1",
    "summary --width 0": "width from 1",
    "prepare --source nowhere --data other": "the source is nowhere",
    "train smoke --data runs/a/run.json": "no data set in runs/a/run.json",
    "train smoke --lr 0.1": "unknown option --lr: did you mean --max-learning-rate?",
    "train smoke --epoch=3": "unknown option --epoch: did you mean --epochs?",
    "verify nowhere": "nowhere does not exist: name a data folder, an archive or a run",
    "verify runs": "runs holds runs: name one of them",
    "evaluate runs/a --unknown 1": "unknown option --unknown",
}


@pytest.mark.parametrize("line", WRONG)
def test_what_users_do_wrong_is_said_and_ends_with_2(
    desk: Path, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in desk.rglob("*")}
    assert main(line.split()) == 2
    error = capsys.readouterr().err
    assert WRONG[line] in " ".join(error.replace("│", " ").split())
    assert "Traceback" not in error
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_there(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert COMMANDS[command].__doc__.split(":")[0][:30] in capsys.readouterr().out
    assert main(["--help"]) == 0
    assert command in capsys.readouterr().out


def test_help_of_a_recipes_options_is_in_groups_and_short_first(
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = [name for group in GROUPS.values() for name in group]
    assert sorted(names) == sorted(field.name for field in fields(Recipe))
    assert main(["train", "accurate", "--help"]) == 0
    short = capsys.readouterr().out
    assert main(["train", "accurate", "--help-all"]) == 0
    whole = capsys.readouterr().out
    assert len(short.splitlines()) < len(whole.splitlines()) / 2
    assert max(map(len, whole.splitlines())) <= 79
    for name in set(names) - {"name"}:
        assert f"{name.replace('_', '-')}" in whole
    assert "--max-learning-rate X   Peak" in short
    assert "[1.0]" in short  # this recipe's, not another's


@pytest.mark.parametrize("closed", ["1", "2"])
def test_without_stdout_or_stderr_the_work_goes_on(
    desk: Path, closed: str, subprocess_environment: dict[str, str]
) -> None:
    train = f"train smoke {' '.join(TINY)} --data data --run runs/closed{closed}"
    command = f"exec {sys.executable} -m tinylab {train} {closed}>&-"
    done = subprocess.run(["sh", "-c", command], env=subprocess_environment, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert Run(Path(f"runs/closed{closed}")).finished


def test_a_run_elsewhere_asks_for_its_data(
    desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["explain", str(desk / "runs/a")]) == 2
    assert "its data was in data, which is not here: name the data folder with --data" in (
        capsys.readouterr().err
    )


def test_help_is_quick_and_loads_nothing_heavy(subprocess_environment: dict[str, str]) -> None:
    code = (
        "import sys; from tinylab.cli import main; main(['--help']);"
        "heavy = {'torch', 'matplotlib', 'albumentations', 'scipy', 'sklearn', 'huggingface_hub'};"
        "assert not heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], env=subprocess_environment, check=True)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_with_their_status_and_the_run_continues(
    desk: Path, subprocess_environment: dict[str, str], tmp_path: Path, number: int, status: int
) -> None:
    command = [sys.executable, "-m", "tinylab", "train", "smoke", *TINY, "--epochs", "40"]
    command += ["--data", "data", "--run", str(tmp_path / "run")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=subprocess_environment, **pipes)
    while not (tmp_path / "run" / "metrics.jsonl").exists():  # an epoch is done
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.kill(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert "stopping after this step" in out
    assert "the same command continues" in err
    assert Run(tmp_path / "run").trained

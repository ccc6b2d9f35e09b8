"""Run folders that the code of commit 863a091 wrote go on working, finished or not."""

import json
import shutil
from pathlib import Path

import pytest
from golden import digest
from publish import PAGES, publish_run

from tinylab.cli import main
from tinylab.data.archive import CONTENT_SHA256
from tinylab.exceptions import UserError
from tinylab.run.folder import Run

HERE = Path(__file__).parent / "old_runs"
CONTINUE = [
    "train", "cpu", "--epochs", "3", "--width", "2", "--batch-size", "60", "--micro-batch", "20",
    "--device", "cpu", "--precision", "fp32", "--data", "data", "--run", "unfinished",
]  # fmt: skip
OLD_RESULT = {
    "weights": "805259008c3f8093f172fb5f3873d7c434e2f6b69edecf0da572430b790ded6a",
    "predictions": "bb183d15132e84a520c35948be2afb6f49e5429afe697a36630495aa6022eb99",
}
"""What the old code ended with, stopped or not, as `golden.digest` has it."""


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, sample_zip: Path) -> Path:
    """A folder with the data that the old runs were made on, and a copy of them."""
    folder = tmp_path_factory.mktemp("old")
    shutil.copytree(HERE, folder, dirs_exist_ok=True)
    assert main(["prepare", "--source", str(sample_zip), "--data", str(folder / "data")]) == 0
    return folder


def test_a_finished_run_opens_explains_reports_exports_and_publishes(
    desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(desk)
    run = Run(Path("finished"))
    for command in ("verify", "evaluate", "explain", "report", "export"):
        assert main([command, "finished"]) == 0, command
        printed = capsys.readouterr().out
        if command == "verify":
            assert "finished, 7 files as they were written" in printed
        if command == "evaluate":
            result = json.loads(printed.splitlines()[-1])
            assert abs(result["test_correct"] - run.summary["test_correct"]) <= 2
    assert main(["predict", "finished", "finished/figures/samples.png"]) == 0
    assert (desk / "finished/report.html").stat().st_size > 100_000
    assert main(["predict", "finished/export", "finished/figures/samples.png"]) == 0

    for page, parts in PAGES.items():
        (desk / page).parent.mkdir(exist_ok=True)
        (desk / page).write_text("".join(f"<!-- {part} -->\n<!-- /{part} -->\n" for part in parts))
    with pytest.raises(UserError, match="made-up shapes"):
        publish_run(run, desk)
    run.write("run.json", run.identity | {"content_sha256": CONTENT_SHA256})
    publish_run(run, desk)
    published = json.loads((desk / "results/finished/summary.json").read_text())
    assert published["model_sha256"] == run.summary["model_sha256"]
    assert "results/finished" in (desk / "docs/results.md").read_text()


@pytest.mark.numerical
def test_an_unfinished_run_continues_as_it_would_have(
    desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(desk)
    old = Run(Path("unfinished"))
    assert main(["verify", "unfinished"]) == 0
    assert "2 whole checkpoints, the newest after step 3 of epoch 2" in capsys.readouterr().out
    began = old.environment
    assert main(CONTINUE) == 0
    assert "continuing unfinished in epoch 2 after 3 of its steps" in capsys.readouterr().out
    assert [row["epoch"] for row in old.history] == [1, 2, 3]
    assert old.summary["stops"] == 1
    assert old.environment["earlier"] == [began]
    assert old.history[2]["train_loss"] == pytest.approx(2.1639, abs=0.005)
    assert main([*CONTINUE[:-1], "fresh"]) == 0
    if digest(Path("fresh")).items() >= OLD_RESULT.items():  # not on a CPU that rounds otherwise
        assert digest(old.folder).items() >= OLD_RESULT.items()

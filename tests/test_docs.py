"""The docs' examples run as they stand on the page."""

import re
import runpy
import shlex
from pathlib import Path

import pytest

from tinylab.cli import main
from tinylab.run.folder import Run

BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.mark.slow
def test_change_something(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (repository / "docs" / "change-something.md").read_text()
    for number, (language, code) in enumerate(BLOCK.findall(page)):
        if language == "bash":
            for line in code.splitlines():
                program, *arguments = shlex.split(line)
                assert program == "tinylab"
                assert main(arguments) == 0, line
            continue
        named = re.match(r"# (\w+\.py)\n", code)
        file = tmp_path / (named[1] if named else f"block{number}.py")
        file.write_text(code)
        if not named:
            runpy.run_path(str(file))
    runs = {path.name: Run(path) for path in Path("runs").iterdir() if path.is_dir()}
    assert set(runs) == {
        "base-0", "base-1", "trivial-0", "trivial-1", "resnet34", "weighted-0", "digits",
        "digits-tuned",
    }  # fmt: skip
    assert all(run.finished for run in runs.values())
    assert runs["resnet34"].summary["parameters"] > 21_000_000
    assert "TrivialAugmentWide" in runs["trivial-1"].identity["transform"]
    assert "weight[0] = 2" in runs["weighted-0"].identity["loss"]
    assert runs["digits"].identity["classes"] == 10
    tuned, scratch = runs["digits-tuned"].summary, runs["digits"].summary
    assert tuned["train_loss"] != scratch["train_loss"]

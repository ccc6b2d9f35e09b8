"""The network in weights/, which needs neither training nor the data set."""

import json
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_sample_images

from tinylab.cli import main
from tinylab.run.folder import Run
from tinylab.run.weights import PRETRAINED, read_init
from tinylab.share.predict import load

PHOTOGRAPH = Path(load_sample_images().filenames[0]).with_name("china.jpg")


def test_predict_export_and_evaluate_take_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["predict", "pretrained", str(PHOTOGRAPH), "--json"]) == 0
    (best, *_) = json.loads(capsys.readouterr().out)["top"]
    assert best["name"] == "beacon"  # wrong, as the class list has no temple
    assert not Path("runs").exists()
    assert main(["export", "pretrained"]) == 0
    run = Run(Path("runs/pretrained"))
    assert (run.summary["test_correct"], run.summary["test_top1"]) == (21252, 64.4)
    card = (run.folder / "export/README.md").read_text()
    assert "64.40 %" in card
    assert "rounded to float16" in card
    assert "take no number on the official split with it" in card
    assert run.weights.read_bytes() == PRETRAINED.read_bytes()
    assert PRETRAINED.stat().st_size < 23e6
    loaded, metadata = load(run.folder)
    weights, digest = read_init(Path("pretrained"))
    assert digest == run.summary["model_sha256"]
    assert torch.equal(loaded.fc.weight, weights["fc.weight"].float())
    assert len(metadata["names"]) == 200


def test_lost_predictions_are_computed_again(
    small_dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train = ["train", "smoke", "--epochs", "1", "--batch-size", "14", "--precision", "fp32"]
    assert main([*train, "--data", str(small_dataset.folder), "--run", "run"]) == 0
    run = Run(Path("run"))
    before = run.predictions
    (run.folder / "predictions.npz").unlink()
    assert main(["explain", "run", "--count", "0", "--sample", "0"]) == 0
    for name, values in run.predictions.items():
        assert (values == before[name]).all(), name

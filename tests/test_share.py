"""A run's network on pictures, as ONNX, with its model card and its page."""

import copy
import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tinylab.data.archive import CONTENT_SHA256, SAMPLE_SHA256
from tinylab.data.split import make_split
from tinylab.exceptions import UserError
from tinylab.explain.analysis import analyse_run
from tinylab.figures.scores import wilson
from tinylab.run.folder import Run
from tinylab.run.weights import normalised
from tinylab.share.card import MARK, model_card, write_hand_over
from tinylab.share.onnx import export_onnx
from tinylab.share.predict import load, predict
from tinylab.share.report import page

HOSTILE = "<script>alert(1)</script> | [x](http://evil.example) \n# heading \u202e\x1b[31m{{ 7 }}"


@pytest.fixture
def run(finished_run: Run, tmp_path: Path) -> Run:
    """A copy of a finished run, to be changed."""
    return Run(Path(shutil.copytree(finished_run.folder, tmp_path / "run")))


@pytest.fixture
def explained(run: Run, tiny_dataset) -> Run:
    rows = make_split(tiny_dataset, "merged")
    model, _ = load(run.folder)
    analysis = analyse_run(run, tiny_dataset, rows, model, count=2, sample=6, faithful=2)
    list(analysis.save(run))
    return run


def test_predictions_of_another_run_are_refused(run: Run, tiny_dataset) -> None:
    rows, good = make_split(tiny_dataset, "merged"), run.predictions
    logits = good["logits"]
    bad = ({"rows": good["rows"][::-1]}, {"logits": logits[:, :2]}, {"logits": logits * np.nan})
    for each in bad:
        np.savez(run.folder / "predictions.npz", **good | each)
        with pytest.raises(UserError, match="does not fit the run"):
            analyse_run(run, tiny_dataset, rows, None, count=0, sample=0)


# --- The network ----------------------------------------------------------------------------------


def test_predictions_are_the_networks(run: Run, tiny_dataset) -> None:
    model, metadata = load(run.folder)
    rows = run.predictions["rows"]
    logits = run.predictions["logits"].astype(np.float64)
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    answers = predict(model, metadata, tiny_dataset.images[rows], top=2)
    for answer, shares in zip(answers, expected, strict=True):
        order = np.argsort(-shares, kind="stable")[:2]
        assert [each["wnid"] for each in answer] == [tiny_dataset.wnids[i] for i in order]
        assert [each["probability"] for each in answer] == pytest.approx(shares[order], abs=2e-3)
    assert predict(model, metadata, np.empty((0, 64, 64, 3), np.uint8)) == []
    with pytest.raises(ValueError, match="float32"):
        predict(model, metadata, np.zeros((1, 64, 64, 3), np.float32))


def test_weights_are_found_in_runs_folders_and_files(run: Run, tmp_path: Path) -> None:
    write_hand_over(run, tmp_path / "export")
    networks = [load(each)[0] for each in (run.folder, run.weights, tmp_path / "export")]
    for network in networks[1:]:
        assert torch.equal(network.fc.weight, networks[0].fc.weight)
    for path, problem in ((tmp_path / "no", "does not exist"), (tmp_path, "holds no run")):
        with pytest.raises(UserError, match=problem):
            load(path)


def test_weights_that_are_not_the_runs_are_refused(run: Run) -> None:
    run.write("run.json", run.identity | {"class_order_sha256": "0" * 64})
    with pytest.raises(UserError, match="has other classes"):
        load(run.folder)
    run.weights.write_bytes(run.weights.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(UserError, match="is damaged"):
        load(run.folder)


@pytest.mark.slow
@pytest.mark.numerical
def test_onnx_gives_the_networks_logits(run: Run, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model, metadata = load(run.folder)
    path = tmp_path / "model.onnx"
    result = export_onnx(model, metadata, path)
    assert result["same_top1"]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    pixels = np.random.default_rng(1).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    inputs = normalised(metadata)(torch.from_numpy(pixels)).contiguous()
    (logits,) = session.run(["logits"], {"images": inputs.numpy()})
    with torch.inference_mode():
        assert np.allclose(logits, model(inputs).numpy(), atol=1e-4)
    stored = session.get_modelmeta().custom_metadata_map
    assert json.loads(stored["names"]) == metadata["names"]
    assert b"/src/" not in path.read_bytes()
    with pytest.raises(UserError, match="is a folder"):
        export_onnx(model, metadata, tmp_path)


# --- The model card -------------------------------------------------------------------------------


def test_a_card_holds_what_was_measured(explained: Run) -> None:
    card = model_card(explained, explained.explanation, ["red", "green", "blue"])
    head = yaml.safe_load(card.split("---")[1])
    metrics = head["model-index"][0]["results"][0]["metrics"]
    summary = explained.summary
    assert [each["value"] for each in metrics] == [round(summary["test_top1"], 2), 100.0]
    assert f"| top-1 accuracy | **{summary['test_top1']:.2f} %** |" in card
    share = summary["test_top1"] / 100
    assert f"sampling error of {100 * (share * (1 - share) / 6) ** 0.5:.2f} points" in card
    assert "0 red, 1 green, 2 blue" in card
    assert "Not measured" not in card
    assert "trained on images that are not those of Tiny ImageNet" in card
    made_up = explained.identity | {"content_sha256": SAMPLE_SHA256}
    explained.write("run.json", made_up)
    assert "made-up shapes" in model_card(explained, explained.explanation)
    assert json.dumps(explained.recipe.mean[0]) in card


def test_what_was_not_measured_is_said(run: Run) -> None:
    run.write("run.json", run.identity | {"content_sha256": CONTENT_SHA256})
    card = model_card(run)
    assert card.count("Not measured") == 3
    assert "first 3 classes of Tiny ImageNet" in card
    assert "3 classes are another task than all 200" in card


def test_a_hand_over_is_whole_and_replaces_nobodys_files(run: Run, tmp_path: Path) -> None:
    paths = write_hand_over(run, tmp_path / "export")
    assert [path.name for path in paths] == ["model.safetensors", "classes.csv", "README.md"]
    assert paths[0].read_bytes() == run.weights.read_bytes()
    with open(paths[1], newline="") as file:
        assert list(csv.reader(file))[1] == ["0", "n90000001", "red"]
    assert MARK in paths[2].read_text()
    write_hand_over(run, tmp_path / "export")  # its own files it may replace
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("my thesis")
    with pytest.raises(UserError, match=r"holds another README\.md"):
        write_hand_over(run, tmp_path / "mine")


def test_the_weights_load_without_tinylab_by_the_published_lines(run: Run) -> None:
    """The docs' and the card's, of a network of any width."""
    page = Path(__file__).parents[1] / "docs" / "commands.md"
    for text in (page.read_text(), model_card(run)):
        (lines,) = [
            each for each in re.findall(r"```python\n(.*?)```", text, re.S) if "safe_open" in each
        ]
        lines = re.sub(r'"[\w./-]*model\.safetensors"', repr(str(run.weights)), lines)
        made = {}
        exec(lines, made)  # of this repository
        network, metadata = load(run.folder)
        images = torch.rand(2, 3, 64, 64)
        assert torch.allclose(made["model"](images), network(images), atol=1e-5)
        assert made["names"] == metadata["names"]


# --- The page -------------------------------------------------------------------------------------


def test_a_page_holds_the_runs_numbers_and_pictures(explained: Run) -> None:
    pictures = {path.stem: path.read_bytes() for path in explained.figures.glob("*.png")}
    text = page(explained, explained.explanation, pictures)
    assert text == page(explained, explained.explanation, pictures)
    assert text.startswith("<!DOCTYPE html>")
    assert f"{explained.summary['test_top1']:.2f}" in text
    assert text.count("data:image/png;base64,") >= len(pictures) - 2  # the same, shorter, or empty
    assert "<script" not in text
    assert not re.search(r"(src|href)=.?https?:", text)


def test_a_page_says_what_is_missing(explained: Run) -> None:
    bare = explained.explanation | {"localisation": None, "faithfulness": None}
    assert "tinylab explain" in page(explained, bare, {})
    broken = copy.deepcopy(explained.explanation)
    del broken["errors"]["calibration"]["before"]
    with pytest.raises(UserError, match="`tinylab explain` makes it anew"):
        page(explained, broken, {})


def test_foreign_text_stays_text(explained: Run) -> None:
    explanation = json.loads(
        json.dumps(explained.explanation).replace('"red"', json.dumps(HOSTILE))
    )
    for text in (
        page(explained, explanation, {}),
        model_card(explained, explanation, [HOSTILE] * 3),
    ):
        assert "<script>alert" not in text
        assert "\u202e" not in text
        assert "\x1b" not in text
        assert "\n# heading" not in text
    assert "](http" not in model_card(explained, explanation, [HOSTILE] * 3)


def test_wilson_against_its_formula() -> None:
    z, p, n = 1.959964, 0.3, 200
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    assert wilson(p, n) == pytest.approx((100 * (middle - half), 100 * (middle + half)), rel=1e-5)

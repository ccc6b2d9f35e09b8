"""The model card says what was measured and what was not; foreign text stays text; nobody's files are replaced."""

import csv
import hashlib
import json
import math
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tinylab.data.archive import CONTENT_SHA256
from tinylab.exceptions import UserError
from tinylab.model import ResNet18
from tinylab.recipe import Recipe
from tinylab.recipes import published
from tinylab.run.folder import Run
from tinylab.run.weights import weights_file
from tinylab.share.card import FILES, MARK, model_card, write_hand_over
from tinylab.share.predict import load, normalised, predict

NASTY = (
    '<script>alert(1)</script> | [x](http://evil.example) `code` "quoted" \n# heading \u202e\x1b[31m'
    + "y" * 300
)


@pytest.fixture
def run(finished_run: Run, tmp_path: Path) -> Run:
    """A copy of a finished run, to be changed."""
    return Run(Path(shutil.copytree(finished_run.folder, tmp_path / "run")))


@pytest.fixture
def real(run: Run) -> Run:
    """The run, pretending to be of Tiny ImageNet."""
    run.write("run.json", run.identity | {"content_sha256": CONTENT_SHA256})
    return run


def explained(**changes: object) -> dict:
    """What explain.json may hold."""
    share = {"mean": 0.781, "low": 0.762, "high": 0.8}
    sides = {"one": {"name": "red"}, "other": {"name": "blue"}}
    group = {
        "boxes": "all",
        "answers": "wrong",
        "class": "actual",
        "images": 1234,
        "hit": share,
        "centre_hit": share,
    }
    return {
        "errors": {
            "best": [{"name": "green", "top1": 91.25}],
            "worst": [{"name": "red", "top1": 12.5}],
            "pairs": [{**sides, "count": 17, "one_as_other": 9, "other_as_one": 8}],
            "calibration": {
                "bins": 15,
                "temperature": 1.2345,
                "before": {"ece": 0.0921, "mean_confidence": 0.61},
                "after": {"ece": 0.0123},
            },
        },
        "label_conflicts": {"tested": 14, "wrong": 9},
        "localisation": {
            "method": "gradcam", "stage": "layer4", "scored": 1987,
            "groups": [group | {"energy": share | {"mean": 0.65}, "uniform": None}],
        },
    } | changes  # fmt: skip


def head(card: str) -> dict:
    """The YAML of a card."""
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def python_blocks(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


# --- What it says -----------------------------------------------------------------------------------------------------


def test_the_numbers_are_the_run_s(real: Run) -> None:
    summary = real.summary
    card = model_card(real)
    assert f"**{summary['test_top1']:.2f} %**" in card
    assert f"| top-5 accuracy | {summary['test_top5']:.2f} % |" in card
    assert f"{summary['test_loss']:.3f}" in card
    assert f"| test images | {summary['test_images']:,} |" in card
    assert f"{summary['train_images']:,} images of 3 classes, {real.recipe.epochs} epochs" in card
    share = summary["test_top1"] / 100
    assert (
        f"sampling error of {100 * math.sqrt(share * (1 - share) / summary['test_images']):.2f} points"
        in card
    )
    for sha256 in (real.identity["split_sha256"], CONTENT_SHA256):
        assert sha256 in card
    for words in ("After the last epoch, never the best one", "one network, seed 0", "no test-time augmentation",
                  "computed in fp32", "3 classes are another task than all 200",
                  "other test images than the official one",
                  "merged: training and validation images pooled"):  # fmt: skip
        assert words in card
    environment = real.environment
    assert f"| torch | {environment['torch']} |" in card
    assert f"{summary['flip_tta_top1']:.2f} %" in card


def test_the_head_is_what_hubs_read(real: Run) -> None:
    said = head(model_card(real))
    assert (said["library_name"], said["pipeline_tag"]) == ("pytorch", "image-classification")
    (model,) = said["model-index"]
    (result,) = model["results"]
    assert [each["value"] for each in result["metrics"]] == [
        pytest.approx(real.summary[name], abs=0.005) for name in ("test_top1", "test_top5")
    ]
    assert all("last epoch" in each["name"] for each in result["metrics"])
    assert result["dataset"] == {
        "name": "Tiny ImageNet",
        "type": "tiny-imagenet",
        "split": "merged, test images, 3 classes",
    }
    assert "tiny-imagenet" in said["tags"]


def test_other_data_does_not_pass_for_tiny_imagenet(run: Run) -> None:
    card = model_card(run)
    assert "another data set than the published Tiny ImageNet" in card.split("## Result")[0]
    assert "datasets" not in head(card)
    assert "tiny-imagenet" not in str(head(card))
    assert "web photographs" not in card
    assert "another task than all 200" not in card


@pytest.mark.parametrize(
    ("protocol", "words"), [("official", "the data set's own"), ("select", "not a final number")]
)
def test_the_protocol_is_explained(real: Run, protocol: str, words: str) -> None:
    real.write("summary.json", real.summary | {"protocol": protocol})
    card = model_card(real)
    assert words in card
    assert "other test images than the official one" not in card


def test_what_was_not_measured_is_said_not_to_be(run: Run) -> None:
    run.write(
        "summary.json", {key: value for key, value in run.summary.items() if key != "flip_tta_top1"}
    )
    card = model_card(run)
    for what in (
        "the accuracy of each class",
        "calibration",
        "the agreement of its class activation maps",
    ):
        assert f"Not measured: {what}" in card
    assert "(apart) | not measured |" in card
    assert "other seeds, other splits, other data | not measured" in card
    assert not re.search(r"\b(None|nan|null)\b(?!\])", card.split("## How to use it")[0])


def test_what_explain_found_out_is_in_it(run: Run) -> None:
    card = model_card(run, explained())
    assert "Not measured" not in card
    for words in ("Best classes (top-1): green 91.2 %", "Worst classes (top-1): red 12.5 %", "red and blue (17)",
                  "14 test images have a twin", "9 of them are answered wrongly", "calibration error is 9.2% (15 bins)",
                  "temperature of 1.234 have 1.2%", "61.0% on average", "Grad-CAM at layer4, 1,987 test images",
                  "| all | wrong | actual | 1,234 | 78.1 % (76.2 to 80.0) | 78.1 % (76.2 to 80.0) "
                  "| 65.0 % (76.2 to 80.0) | none |"):  # fmt: skip
        assert words in card, words


@pytest.mark.parametrize("key", ["errors", "label_conflicts", "localisation"])
@pytest.mark.parametrize("value", [None, [], 5, "text", {}, {"groups": 5, "best": {}, "calibration": [1]},
                                   {"groups": [5, None, {"images": 3}], "pairs": [None, {"count": 1}], "worst": [3],
                                    "calibration": {"before": {"ece": "x"}, "bins": "many"}}])  # fmt: skip
def test_records_of_anybody_are_read_with_care(run: Run, key: str, value: object) -> None:
    assert "## Limits" in model_card(run, explained(**{key: value}))


def test_foreign_text_stays_text(run: Run) -> None:
    run.write("environment.json", dict.fromkeys(run.environment, NASTY))
    run.write("run.json", run.identity | {"split_sha256": NASTY})
    run.write("summary.json", run.summary | {"protocol": NASTY})
    extra = explained()
    for part in (
        extra["errors"]["best"][0],
        extra["errors"]["worst"][0],
        extra["errors"]["pairs"][0]["one"],
    ):
        part["name"] = NASTY
    extra["localisation"] |= {"method": NASTY, "stage": NASTY}
    extra["localisation"]["groups"][0] |= {"boxes": NASTY, "answers": NASTY, "class": NASTY}
    card = model_card(run, extra, [NASTY, "good"])
    body = card.split("---\n", 2)[2]
    assert "alert" in body  # it is shown
    for mark in ("<script", "](http", "`code`", "\n# heading", "http://evil", "\x1b", "\u202e"):
        assert mark not in body
    assert "<" not in re.sub(r"</?details>|</?summary>|<!-- [\w ]+ -->", "", body)
    (result,) = head(card)["model-index"][0]["results"]
    assert result["dataset"]["split"].startswith("<script>")  # in quotes, and nothing but a text
    tables = [line for line in body.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in tables} <= {3, 9}


def test_the_recipe_is_in_it(run: Run) -> None:
    (said,) = re.findall(r"```json\n(.*?)\n```", model_card(run), re.DOTALL)
    assert json.loads(said) == json.loads(json.dumps(asdict(run.recipe)))
    mean = ", ".join(f"{value:g}" for value in run.recipe.mean)
    assert f"less mean ({mean})" in model_card(run)


def test_classes_are_listed_in_their_order(run: Run) -> None:
    assert "0 red, 1 green, 2 blue" in model_card(run, names=["red", "green", "blue"])
    assert "Its classes" not in model_card(run)


def test_runs_that_are_not_finished_have_no_card(run: Run) -> None:
    (run.folder / "summary.json").unlink()
    with pytest.raises(UserError, match="not finished"):
        model_card(run)


# --- Its code works ---------------------------------------------------------------------------------------------------


def test_the_lines_for_tinylab_work(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    model, about = load(run.folder)
    write_hand_over(run, about, tmp_path / "new")
    monkeypatch.chdir(tmp_path / "new")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("picture.jpg", quality=100, subsampling=0)
    (block,) = python_blocks(
        Path("README.md").read_text()
    )  # of a narrow network, which torchvision does not have
    found: dict = {}
    exec(block, found)
    assert found["answers"] == predict(model, about, np.asarray(Image.open("picture.jpg"))[None])
    assert "another width than this network's 16" in Path("README.md").read_text()


@pytest.mark.slow
def test_the_lines_for_torchvision_work(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = replace(published(), epochs=run.recipe.epochs)
    torch.manual_seed(0)
    put_wide(run, wide)
    model, about = load(run.folder)
    write_hand_over(run, about, tmp_path / "new")
    monkeypatch.chdir(tmp_path / "new")
    found: dict = {}
    exec(python_blocks(Path("README.md").read_text())[1], found)
    inputs = normalised(about)(torch.randint(0, 256, (3, 64, 64, 3), dtype=torch.uint8))
    with torch.inference_mode():
        torch.testing.assert_close(found["model"](inputs), model(inputs), atol=1e-4, rtol=1e-5)
    assert found["names"] == about["names"]


def put_wide(run: Run, recipe: Recipe) -> None:
    """Makes the run one of a network of full width, with made-up weights."""
    about = load(run.folder)[1]
    content = weights_file(
        ResNet18(3), recipe, tuple(about["wnids"]), tuple(about["names"]), {}, "0" * 64
    )
    run.weights.write_bytes(content)
    run.write("recipe.json", asdict(recipe))
    run.write("summary.json", run.summary | {"model_sha256": hashlib.sha256(content).hexdigest()})


# --- Handing over -----------------------------------------------------------------------------------------------------


def test_weights_classes_and_card_are_handed_over(run: Run, tmp_path: Path) -> None:
    _, about = load(run.folder)
    paths = write_hand_over(run, about, tmp_path / "new" / "folder")
    assert [path.name for path in paths] == list(FILES)
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == sorted(FILES)
    assert paths[0].read_bytes() == run.weights.read_bytes()
    rows = list(csv.reader(paths[1].open(newline="")))
    assert rows == [["index", "wnid", "name"], ["0", "n90000001", "red"], ["1", "n90000002", "green"],
                    ["2", "n90000003", "blue"]]  # fmt: skip
    assert "0 red, 1 green, 2 blue" in paths[2].read_text()
    assert "Not measured: calibration" in paths[2].read_text()
    assert load(tmp_path / "new" / "folder")[1] == about


def test_what_was_explained_since_is_in_the_next_card(run: Run, tmp_path: Path) -> None:
    _, about = load(run.folder)
    write_hand_over(run, about, tmp_path / "new")
    rest = {
        "model_sha256": run.summary["model_sha256"],
        "tested": 6,
        "wrong": 1,
        "method": "gradcam",
    }
    run.write("explain.json", explained() | rest | {"images": [], "figures": []})
    card = write_hand_over(run, about, tmp_path / "new")[2].read_text()
    assert "Not measured" not in card
    assert card == model_card(run, run.explanation, about["names"])
    run.write(
        "explain.json",
        explained() | rest | {"images": [], "figures": [], "model_sha256": "of other weights"},
    )
    assert (
        "Not measured: calibration" in write_hand_over(run, about, tmp_path / "new")[2].read_text()
    )


@pytest.mark.parametrize("name", FILES)
def test_nobody_s_files_are_replaced(run: Run, tmp_path: Path, name: str) -> None:
    _, about = load(run.folder)
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / name).write_text("somebody's")
    with pytest.raises(
        UserError, match=rf"holds another {re.escape(name)}: choose an empty folder"
    ):
        write_hand_over(run, about, folder)
    assert [path.read_text() for path in folder.iterdir()] == ["somebody's"]


def test_the_run_folder_itself_is_left_alone(run: Run) -> None:
    with pytest.raises(UserError, match=r"holds another model\.safetensors"):
        write_hand_over(run, load(run.folder)[1], run.folder)


def test_names_that_a_spreadsheet_would_compute(run: Run, tmp_path: Path) -> None:
    about = {"wnids": ["n1", "n2", "n3"], "names": ["=1+1", 'a,"b', "+x\ny"]}
    rows = list(csv.reader(write_hand_over(run, about, tmp_path / "new")[1].open(newline="")))
    assert [row[2] for row in rows[1:]] == ["'=1+1", 'a,"b', "'+x\ny"]


def test_damaged_weights_are_not_handed_over(run: Run, tmp_path: Path) -> None:
    _, about = load(run.folder)
    content = bytearray(run.weights.read_bytes())
    content[-1] ^= 1
    run.weights.write_bytes(content)
    with pytest.raises(UserError, match="is damaged"):
        write_hand_over(run, about, tmp_path / "new")
    run.weights.unlink()
    with pytest.raises(UserError, match="No such file"):
        write_hand_over(run, about, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_folders_that_cannot_be_written(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot (copy|read|write)"):
        write_hand_over(run, load(run.folder)[1], tmp_path / "file" / "new")


def test_every_card_carries_the_mark(run: Run) -> None:
    assert model_card(run).count(MARK) == 1

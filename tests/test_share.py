"""A run's network on pictures, as ONNX, with its model card and its page."""

import copy
import csv
import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import assert_same
from huggingface_hub import HfApi, ModelCard, RepoUrl
from PIL import Image

from tinylab.data.archive import CONTENT_SHA256, SAMPLE_SHA256
from tinylab.data.split import make_split
from tinylab.exceptions import UserError
from tinylab.explain.analysis import analyse_run
from tinylab.figures.scores import wilson
from tinylab.run.folder import Run
from tinylab.run.weights import normalised
from tinylab.share.card import FILES, MARK, model_card, push, write_hand_over
from tinylab.share.onnx import export_onnx
from tinylab.share.predict import load, predict, predict_folder
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
    assert [path.name for path in paths] == [*FILES]
    assert paths[0].read_bytes() == run.weights.read_bytes()
    config = {"classes": 3, "width": 16, "id2label": {"0": "red", "1": "green", "2": "blue"}}
    assert json.loads(paths[1].read_text()) == {"architectures": ["ResNet18"]} | config
    with open(paths[2], newline="") as file:
        assert list(csv.reader(file))[1] == ["0", "n90000001", "red"]
    assert MARK in paths[3].read_text()
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


def test_a_fresh_process_loads_an_export_with_the_models_file_alone(
    run: Run, tmp_path: Path, repository: Path, subprocess_environment: dict[str, str]
) -> None:
    """Offline, and what was loaded is saved and loaded once more."""
    write_hand_over(run, tmp_path / "export")
    (tmp_path / "alone").mkdir()
    shutil.copy(repository / "src/tinylab/model.py", tmp_path / "alone/model.py")
    code = (
        "import sys, torch; from model import ResNet18\n"
        "network = ResNet18.from_pretrained('../export')\n"
        "network.save_pretrained('../saved')\n"
        "again = ResNet18.from_pretrained('../saved')\n"
        "assert not network.training and not any('tinylab' in name for name in sys.modules)\n"
        "torch.save([each.state_dict() for each in (network, again)], 'states.pt')"
    )
    environment = subprocess_environment | {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code]
    subprocess.run(command, cwd=tmp_path / "alone", env=environment, check=True)
    for state in torch.load(tmp_path / "alone/states.pt", weights_only=True):
        assert_same(state, load(run.folder)[0].state_dict())
    assert "pytorch_model_hub_mixin" in (tmp_path / "saved/README.md").read_text()


def test_an_export_is_pushed_to_the_hub(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed = {}

    def upload_folder(_api: HfApi, *, folder_path: Path, **options) -> None:
        pushed.update(options, files=sorted(path.name for path in folder_path.iterdir()))

    made = lambda _api, repository, exist_ok: RepoUrl(f"https://huggingface.co/{repository}")  # noqa: E731
    write_hand_over(run, tmp_path / "export")
    monkeypatch.setattr(HfApi, "create_repo", made)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    assert push(tmp_path / "export", "somebody/net") == "https://huggingface.co/somebody/net"
    assert (pushed["repo_id"], pushed["files"]) == ("somebody/net", sorted(FILES))
    assert sorted(pushed["allow_patterns"]) == sorted(FILES)
    card = ModelCard.load(tmp_path / "export/README.md")  # as the Hub reads it
    assert [each.metric_value for each in card.data.eval_results] == [
        round(run.summary[name], 2) for name in ("test_top1", "test_top5")
    ]


def test_without_a_network_the_push_is_one_line(tmp_path: Path, subprocess_environment) -> None:
    code = "from pathlib import Path; from tinylab.share.card import push; push(Path('x'), 'a/b')"
    environment = subprocess_environment | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert "UserError: x is not pushed: " in done.stderr.splitlines()[-1]
    assert "hf auth login" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("options", [{}, {"pretrained": False, "classes": 7, "width": 4}])
def test_torch_hub_loads_the_network(repository: Path, options: dict) -> None:
    network = torch.hub.load(str(repository), "resnet18", source="local", **options)
    assert network.fc.out_features == options.get("classes", 200)
    assert not network.training
    if not options:
        (path,) = (repository / "weights").glob("*/model.safetensors")
        assert_same(network.state_dict(), load(path)[0].state_dict())


def test_a_folder_of_pictures_is_answered_by_file(run: Run, tiny_dataset, tmp_path: Path) -> None:
    rows = run.predictions["rows"]
    (tmp_path / "test/images").mkdir(parents=True)
    for row, kind in zip(rows, itertools.cycle(("png", "BMP"))):
        picture = Image.fromarray(tiny_dataset.images[row])
        picture.save(tmp_path / f"test/images/test_{row}.{kind}")
    (tmp_path / "test/images/._test_0.png").write_bytes(b"not a picture")
    model, metadata = load(run.folder)
    found = predict_folder(model, metadata, tmp_path / "test")
    assert found == predict_folder(model, metadata, tmp_path / "test/images")
    expected = run.predictions["logits"].argmax(axis=1)
    answers = {int(re.sub(r"\D", "", name)): wnid for name, wnid in found}
    assert [answers[row] for row in rows] == [tiny_dataset.wnids[i] for i in expected]
    assert found == sorted(found)


# --- The page -------------------------------------------------------------------------------------


def test_a_page_holds_the_runs_numbers_and_pictures(explained: Run) -> None:
    pictures = explained.explanation["figures"]
    text = page(explained, explained.explanation)
    assert text == page(explained, explained.explanation)
    assert text.startswith("<!DOCTYPE html>")
    assert f"{explained.summary['test_top1']:.2f}" in text
    assert text.count("data:image/png;base64,") >= len(pictures) - 2  # the same, shorter, or empty
    assert "<script" not in text
    assert not re.search(r"(src|href)=.?https?:", text)


def test_a_page_says_what_is_missing(explained: Run) -> None:
    (explained.folder / "outside.png").write_bytes(explained.weights.read_bytes())
    bare = {"localisation": None, "faithfulness": None, "figures": ["../outside", "curves"]}
    text = page(explained, explained.explanation | bare)
    assert "tinylab explain" in text
    assert text.count("data:image/png;base64,") == 1
    broken = copy.deepcopy(explained.explanation)
    del broken["errors"]["calibration"]["before"]
    with pytest.raises(UserError, match="`tinylab explain` makes it anew"):
        page(explained, broken)


def test_foreign_text_stays_text(explained: Run) -> None:
    explanation = json.loads(
        json.dumps(explained.explanation).replace('"red"', json.dumps(HOSTILE))
    )
    for text in (page(explained, explanation), model_card(explained, explanation, [HOSTILE] * 3)):
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

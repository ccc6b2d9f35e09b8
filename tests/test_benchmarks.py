"""The benchmarks run, compare like with like, and end in a line of JSON that hangs together."""

import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import measuring
import numpy as np
import pytest
import torch
from PIL import Image

from tinylab.data.dataset import Dataset
from tinylab.recipes import published
from tinylab.run.environment import choose

timm = pytest.importorskip("timm")

Start = Callable[..., tuple[str, dict]]


@pytest.fixture
def start(
    sample_dataset: Dataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Start:
    """Run a benchmark on made-up data; give all it printed and its last line, decoded."""

    def call(name: str, *options: str) -> tuple[str, dict]:
        usual = ("--device", "cpu", "--data", str(sample_dataset.folder)) if name != "cpu" else ()
        monkeypatch.setattr(sys, "argv", [f"bench_{name}.py", "--quick", *usual, *options])
        importlib.import_module(f"bench_{name}").main()
        text = capsys.readouterr().out
        return text, json.loads(text.splitlines()[-1])

    return call


def assert_rates(result: dict, names: set[str]) -> None:
    """Every rate is a speed, and each ratio is the first row's median by that row's."""
    rates, ratios = result["images_per_second"], result["ratios"]
    assert set(rates) == names
    medians = [rate["median"] for rate in rates.values()]
    assert all(0 < rate["min"] <= rate["median"] <= rate["max"] for rate in rates.values())
    expected = [medians[0] / median for median in medians]
    assert list(ratios.values()) == pytest.approx(expected, abs=0.006)


def test_loader_compares_ours_with_torchvision_and_timm(start: Start) -> None:
    _, result = start("loader")
    assert_rates(result, {"ours, batched", "ours, albumentations", "ImageFolder", "timm"})
    assert (result["images"], result["images_batched"]) == (200, 420)
    assert "anew" in result["jpeg_files"]


@pytest.mark.slow
def test_step_compares_ours_with_the_plain_loop_and_timm(start: Start) -> None:
    _, result = start("step")
    assert_rates(result, {"ours", "plain", "timm"})
    rates = [result[f"{name}_images_per_second"]["median"] for name in ("epoch", "bare")]
    assert result["epoch_share_of_bare"] == pytest.approx(rates[0] / rates[1], rel=0.01)


@pytest.mark.slow
def test_throughput_keeps_its_rows_in_a_table(start: Start, tmp_path: Path) -> None:
    options = ("--csv", str(tmp_path / "throughput.csv"))
    _, result = start("throughput", *options)
    assert result["complete"]
    rows = [(row["layout"], row["status"]) for row in result["rows"]]
    assert rows == [("NHWC", "ok"), ("NCHW", "ok")]
    assert all(row["images_per_second"] > 0 for row in result["rows"])
    before = (tmp_path / "throughput.csv").read_bytes()
    text, again = start("throughput", *options)
    assert again["complete"]
    assert " images/s" not in text  # nothing is measured twice
    assert (tmp_path / "throughput.csv").read_bytes() == before


@pytest.mark.slow
def test_explain_compares_batches_with_one_by_one(start: Start) -> None:
    _, result = start("explain")
    library = {f"library, {how}" for how in ("one by one", "batched", "averaged")}
    assert_rates(result, {"ours", *library})
    assert result["precision"] == "fp32"


def test_cpu_shares_follow_from_speeds_and_sizes(start: Start) -> None:
    text, result = start("cpu", "--precision", "fp32")
    peak = result["rows"].pop("plain product")["gflops"]["median"]
    parts = ("forward, backward", "whole step")
    sizes = [f"{part}, {side} px" for part in parts for side in (32, 48, 64)]
    assert list(result["rows"]) == [*sizes, "tests, 64 px"]
    per_image = {}
    for name, row in result["rows"].items():
        keys = ("images_per_second", "gflops", "share_of_product")
        rate, gflops, share = (row[key]["median"] for key in keys)
        per_image[name] = 16 * gflops / rate  # width 16 has a sixteenth of the arithmetic
        assert share == pytest.approx(gflops / peak, abs=1e-3)
        if name.startswith("whole step"):
            step = result["batch"] / rate
            assert 0 < row["optimizer_seconds"]["median"] + row["average_seconds"]["median"] < step
        else:
            assert "optimizer_seconds" not in row
    assert list(per_image.values()) == pytest.approx([3.3325, 7.498, 13.33] * 2 + [4.443], rel=1e-3)
    assert result["skipped_steps"] == 0
    assert text.count(": met") + text.count(": missed") == len(result["targets"]) == 4


def test_data_that_is_not_there_is_refused_and_without_any_the_images_are_made_up(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit, match="2"):
        start("explain", "--data", str(tmp_path / "none"))
    assert "no data set" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    dataset, name = measuring.find_data(None, tmp_path)
    assert (len(dataset), name) == (600, "made-up images")


def test_contenders_take_turns(capsys: pytest.CaptureFixture) -> None:
    order = []
    contenders = {"a": lambda: order.append("a") or 1.0, "b": lambda: order.append("b") or 2.0}
    rounds = measuring.take_turns(contenders, 3)
    assert order == ["a", "b"] * 3
    assert rounds == {"a": [1.0] * 3, "b": [2.0] * 3}
    assert measuring.is_steady([measuring.spread([90.0, 100.0])])
    assert not measuring.is_steady([measuring.spread([50.0, 100.0])])
    assert "factor of 2.0" in capsys.readouterr().out


def test_imagefolder_gets_the_published_augmentation() -> None:
    """On a chart of columns, rows and 255: flips, crops of the padded image, a hole of the mean."""
    from bench_loader import torchvision_transform

    rows, columns = np.mgrid[:64, :64]
    chart = np.stack([columns, rows, np.full((64, 64), 255)], axis=2).astype(np.uint8)
    recipe = replace(published(), mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255))
    transform = torchvision_transform(recipe)
    torch.manual_seed(0)
    draws = [transform(Image.fromarray(chart)) for _ in range(400)]
    assert all(draw.shape == (3, 64, 64) and draw.dtype == torch.float32 for draw in draws)
    holes = [draw[2] < 128 for draw in draws]
    assert {int(hole.sum()) for hole in holes} == {0, 32 * 32}
    assert sum(bool(hole.any()) for hole in holes) == pytest.approx(280, abs=40)
    whole = [draw.round() for draw, hole in zip(draws, holes, strict=True) if not hole.any()]
    flipped = [draw for draw in whole if draw[0, 0, 20] > draw[0, 0, 40]]
    assert len(flipped) / len(whole) == pytest.approx(0.7, abs=0.15)
    assert {float(draw[1, 10, 0]) for draw in whole} == {float(row) for row in range(7, 14)}
    shifted_up = next(draw for draw in whole if draw[1, 10, 0] == 7)
    assert shifted_up[1, :5, 0].tolist() == [3, 2, 1, 0, 1], "the padding does not mirror"


def test_every_loader_delivers_each_image_once_as_the_network_wants_it(
    sample_dataset: Dataset, tmp_path: Path
) -> None:
    """On images of one grey each, which no augmentation but timm's changes in most pixels."""
    import bench_loader as loader

    compute, recipe = choose("cpu"), published()
    rows, greys = np.arange(0, 600, 20), np.arange(8, 248, 8)
    plain = replace(sample_dataset, images=np.zeros((600, 64, 64, 3), dtype=np.uint8))
    plain.images[rows] = greys[:, None, None, None]
    loader.write_image_folder(plain, rows, tmp_path)
    batched = replace(recipe, augmentation="batched")
    contenders = {
        "batched": loader.our_loader(plain, rows, batched, compute),
        "albumentations": loader.our_loader(plain, rows, recipe, compute),
        "ImageFolder": loader.image_folder(tmp_path, recipe, compute),
        "timm": loader.timm_loader(tmp_path, recipe, compute),
    }
    for name, contender in contenders.items():
        with contender.open(0) as begin:
            for _ in range(2):  # a second pass, too
                images = torch.cat(list(begin()))
                assert images.shape == (30, 3, 64, 64)
                assert images.dtype == torch.float32
                medians = (images.flatten(1).median(dim=1).values * 0.278 + 0.442) * 255
                if name == "timm":
                    assert 0 <= medians.min() < 100 < medians.max() <= 256, "not of 0..1"
                else:
                    np.testing.assert_allclose(medians.sort().values, greys, atol=1.5)


def test_the_peers_train_the_same_network_and_its_arithmetic_is_as_stated() -> None:
    import torchvision
    from bench_step import with_small_stem
    from torch.utils.flop_counter import FlopCounterMode

    from tinylab.model import ResNet18
    from tinylab.recipe import GFLOP_PER_IMAGE

    ours = ResNet18()
    peers = torchvision.models.resnet18(num_classes=200), timm.create_model("resnet18", False)
    peers[1].reset_classifier(200)
    for network in (ours, *map(with_small_stem, peers)):
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            network.eval()(torch.zeros(1, 3, 64, 64))
        assert 3 * counter.get_total_flops() == pytest.approx(GFLOP_PER_IMAGE * 1e9, rel=0.001)
        shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
        assert shapes == {name: tensor.shape for name, tensor in ours.state_dict().items()}

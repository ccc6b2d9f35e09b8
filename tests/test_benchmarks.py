"""The benchmarks run, compare like with like, and end in a line of JSON whose numbers make sense."""

import collections
import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from tinylab.data.dataset import Dataset, open_dataset
from tinylab.recipes import published
from tinylab.run.environment import choose

timm = pytest.importorskip("timm")

Start = Callable[..., tuple[str, dict]]


@pytest.fixture
def start(
    repository: Path, sample_dataset: Dataset, subprocess_environment: dict[str, str]
) -> Start:
    """Runs a benchmark on the made-up data; gives all it printed and its last line, decoded."""

    def call(name: str, *options: str) -> tuple[str, dict]:
        command = [sys.executable, str(repository / "benchmarks" / f"bench_{name}.py")]
        command += ["--quick", "--device", "cpu", "--data", str(sample_dataset.folder), *options]
        environment = subprocess_environment | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout, json.loads(done.stdout.splitlines()[-1])

    return call


@pytest.fixture
def benchmark_module(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], ModuleType]:
    """Imports a benchmark as a module, for this test alone."""
    monkeypatch.syspath_prepend(repository / "benchmarks")
    return lambda name: importlib.import_module(f"bench_{name}")


def assert_rates(rows: dict[str, dict], ratios: dict[str, float]) -> None:
    """Every rate is a speed, and each ratio is the first row's median by that row's."""
    medians = [row["images_per_second"]["median"] for row in rows.values()]
    for row in rows.values():
        rate = row["images_per_second"]
        assert 0 < rate["min"] <= rate["median"] <= rate["max"]
    assert list(ratios.values()) == pytest.approx(
        [medians[0] / median for median in medians], abs=0.006
    )


def test_loader_compares_ours_with_torchvision_and_timm(start: Start) -> None:
    text, result = start("loader")
    assert set(result["loaders"]) == {
        "ours, batched",
        "ours, accurate",
        "ours, albumentations",
        "ImageFolder",
        "timm",
    }
    assert_rates(result["loaders"], result["ratios"])
    assert result["images"] == 200
    assert result["images_batched"] == 420
    assert result["reached"] == (result["ratios"]["ImageFolder"] >= 5)
    assert "encoded anew" in text


@pytest.mark.slow
def test_step_compares_ours_with_the_plain_loop_and_timm(start: Start) -> None:
    _, result = start("step")
    assert set(result["loops"]) == {"ours", "ours, accurate", "plain", "timm"}
    assert_rates(result["loops"], result["ratios"])
    assert result["loader_epoch_share_of_bare"] > 0
    assert result["share_of_peak"] == pytest.approx(
        result["loops"]["ours"]["images_per_second"]["median"]
        * 13.33e9
        / (result["matmul_tflops"] * 1e12),
        rel=0.01,
    )


@pytest.mark.slow
def test_throughput_keeps_its_rows_in_a_table(start: Start, tmp_path: Path) -> None:
    _, result = start("throughput", "--csv", str(tmp_path / "throughput.csv"))
    assert result["complete"]
    assert [(row["layout"], row["status"]) for row in result["rows"]] == [
        ("NHWC", "ok"),
        ("NCHW", "ok"),
    ]
    assert all(float(row["images_per_second"]) > 0 for row in result["rows"])
    text, again = start("throughput", "--csv", str(tmp_path / "throughput.csv"))
    assert again["rows"] == result["rows"]
    assert "images/s" not in text.rpartition("{")[0].replace("images_per_second", ""), (
        "nothing is measured twice"
    )


@pytest.mark.slow
def test_explain_compares_batches_with_one_by_one(start: Start) -> None:
    text, result = start("explain")
    assert set(result["ways"]) == {
        "ours",
        "library, one by one",
        "library, batched",
        "library, averaged",
    }
    assert_rates(result["ways"], result["ratios"])
    assert result["precision"] == "fp32"
    metric = result["box_metric"]
    assert (metric["images"], metric["width"]) == (4, 16)
    assert (
        set(metric["ways"])
        == set(metric["seconds"])
        == {"ours", "library, batched", "library, one by one"}
    )
    assert_rates(metric["ways"], metric["ratios"])
    for name, seconds in metric["seconds"].items():
        assert seconds == pytest.approx(
            4 / metric["ways"][name]["images_per_second"]["median"], rel=0.01, abs=0.006
        )
    assert "box metric of 4 images" in text


def test_the_box_metric_s_peers_see_the_same_images_and_classes(
    benchmark_module: Callable, monkeypatch: pytest.MonkeyPatch, sample_dataset: Dataset
) -> None:
    explain = benchmark_module("explain")
    asked: dict[str, list] = {"ours": [], "library": []}
    gradcam, library = explain.gradcam, explain.library

    def note(inputs: torch.Tensor, classes: torch.Tensor, way: str) -> None:
        asked[way] += [
            (round(image.double().sum().item(), 3), index)
            for image, index in zip(inputs, classes.tolist(), strict=True)
        ]

    def ours(model, inputs, classes, *rest, **options) -> dict:
        note(inputs, classes, "ours")
        return gradcam(model, inputs, classes, *rest, **options)

    def theirs(cams, inputs, classes, batch) -> None:
        note(inputs, classes, "library")
        library(cams, inputs, classes, batch)

    monkeypatch.setattr("tinylab.explain.localisation.gradcam", ours)
    monkeypatch.setattr(explain, "library", theirs)
    rows = np.arange(0, 600, 17)
    explain.measure_boxes(sample_dataset, rows, choose("cpu", "fp32"), 1, 0)
    expected = collections.Counter(asked["ours"])
    assert len(rows) < expected.total() <= 2 * len(rows), "two maps for a wrong answer"
    found = collections.Counter(asked["library"])
    assert found.total() == 2 * 2 * len(rows), "batched and one by one"
    assert set(found) == set(expected)


@pytest.mark.slow
def test_scaling_measures_each_size_in_a_process_of_its_own(start: Start) -> None:
    _, result = start("scaling")
    assert [size["images"] for size in result["by_images"]] == [80, 320]
    assert [size["train_images"] + size["test_images"] for size in result["by_images"]] == [80, 320]
    assert [size["classes"] for size in result["by_classes"]] == [2]
    for size in result["by_images"] + result["by_classes"]:
        assert set(size["seconds"]) == {"open", "split", "load", "train", "evaluate"}
        assert all(0 < took < 100 for took in size["seconds"].values())
        assert size["peak_private_bytes"] <= size["peak_resident_bytes"] < 4e9
    assert set(result["fits"]) == {"open", "split", "load", "train", "evaluate"}


def test_data_that_is_not_there_is_refused_in_one_line(repository: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(repository / "benchmarks" / "bench_explain.py"),
        "--data",
        str(tmp_path / "none"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no data set" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_tiny_imagenet_the_images_are_made_up(
    benchmark_module: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    dataset, archive, words = benchmark_module("loader").find_data(None, tmp_path)
    assert len(dataset) == 600
    assert archive.is_file()
    assert "made-up" in words


def test_contenders_take_turns(benchmark_module: Callable) -> None:
    order = []
    rounds = benchmark_module("loader").alternate(
        {"a": lambda: order.append("a") or 1.0, "b": lambda: order.append("b") or 2.0}, 3
    )
    assert order == ["a", "b"] * 3
    assert rounds == {"a": [1.0] * 3, "b": [2.0] * 3}


@pytest.mark.parametrize(("slowest", "steady"), [(90.0, True), (50.0, False)])
def test_rounds_that_disagree_are_pointed_out(
    benchmark_module: Callable, capsys: pytest.CaptureFixture, slowest: float, steady: bool
) -> None:
    loader = benchmark_module("loader")
    assert (
        loader.is_steady([loader.spread([10.0, 10.0]), loader.spread([slowest, 100.0])]) is steady
    )
    assert ("factor of 2.0" in capsys.readouterr().out) is not steady


def test_imagefolder_gets_the_published_augmentation(benchmark_module: Callable) -> None:
    """On a chart of columns, rows and 255: flips, crops of the padded image, and one 32 x 32 hole of the mean."""
    rows, columns = np.mgrid[:64, :64]
    chart = np.stack([columns, rows, np.full((64, 64), 255)], axis=2).astype(np.uint8)
    recipe = replace(published(), mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255))
    transform = benchmark_module("loader").torchvision_transform(recipe)
    torch.manual_seed(0)
    draws = [transform(Image.fromarray(chart)) for _ in range(400)]
    assert all(draw.shape == (3, 64, 64) and draw.dtype == torch.float32 for draw in draws)
    holes = [draw[2] < 128 for draw in draws]
    assert {int(hole.sum()) for hole in holes} == {0, 32 * 32}
    assert sum(bool(hole.any()) for hole in holes) == pytest.approx(280, abs=40)
    whole = [draw.round() for draw, hole in zip(draws, holes, strict=True) if not hole.any()]
    flipped = [draw for draw in whole if draw[0, 0, 20] > draw[0, 0, 40]]
    assert len(flipped) / len(whole) == pytest.approx(0.7, abs=0.15)
    assert {float(draw[1, 10, 0]) for draw in whole} == {
        float(10 + shift) for shift in range(-3, 4)
    }
    shifted_up = next(draw for draw in whole if draw[1, 10, 0] == 7)
    assert shifted_up[1, :5, 0].tolist() == [3, 2, 1, 0, 1], "the padding does not mirror"


def test_peers_get_the_archive_s_files_only_if_they_are_the_images(
    benchmark_module: Callable, sample_dataset: Dataset, sample_zip: Path, tmp_path: Path
) -> None:
    loader, rows = benchmark_module("loader"), np.array([0, 70, 599])
    assert (
        loader.write_image_folder(sample_dataset, rows, sample_zip, tmp_path / "own")
        == "the archive's own"
    )
    assert "anew" in loader.write_image_folder(sample_dataset, rows, None, tmp_path / "anew")
    for folder in ("own", "anew"):
        names = {
            path.relative_to(tmp_path / folder).as_posix()
            for path in (tmp_path / folder).rglob("*.JPEG")
        }
        assert names == {
            f"{sample_dataset.wnids[sample_dataset.labels[row]]}/{row}.JPEG" for row in rows
        }
    swapped = replace(sample_dataset, images=np.ascontiguousarray(sample_dataset.images[::-1]))
    with pytest.raises(loader.UserError, match="not the one"):
        loader.write_image_folder(swapped, rows, sample_zip, tmp_path / "swapped")


def test_every_loader_delivers_each_image_once_as_the_network_wants_it(
    benchmark_module: Callable, sample_dataset: Dataset, tmp_path: Path
) -> None:
    """On images of one grey each, which no augmentation but timm's changes in most of their pixels."""
    loader, compute, recipe = benchmark_module("loader"), choose("cpu"), published()
    rows, greys = np.arange(0, 600, 20), np.arange(8, 248, 8)
    plain = replace(sample_dataset, images=np.zeros((600, 64, 64, 3), dtype=np.uint8))
    plain.images[rows] = greys[:, None, None, None]
    loader.write_image_folder(plain, rows, None, tmp_path)
    contenders = {
        "batched": loader.our_loader(plain, rows, replace(recipe, augmentation="batched"), compute),
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
                found = (images.flatten(1).median(dim=1).values * 0.278 + 0.442) * 255
                if name == "timm":
                    assert 0 <= found.min() < 100 < found.max() <= 256, "not on the scale of 0..1"
                else:
                    np.testing.assert_allclose(found.sort().values, greys, atol=1.5)


def test_the_peers_train_the_same_network_and_its_arithmetic_is_as_stated(
    benchmark_module: Callable,
) -> None:
    import torchvision
    from torch.utils.flop_counter import FlopCounterMode

    from tinylab.model import ResNet18

    step, ours = benchmark_module("step"), ResNet18()
    peers = (
        torchvision.models.resnet18(num_classes=200),
        timm.create_model("resnet18", num_classes=200),
    )
    for network in (ours, *map(step.with_small_stem, peers)):
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            network.eval()(torch.zeros(1, 3, 64, 64))
        assert 3 * counter.get_total_flops() == pytest.approx(step.TRAINING_FLOP, rel=0.001)
        shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
        assert shapes == {name: tensor.shape for name, tensor in ours.state_dict().items()}


def test_a_part_of_the_data_set_opens_as_a_data_set(
    benchmark_module: Callable, sample_dataset: Dataset, tmp_path: Path
) -> None:
    part = open_dataset(
        benchmark_module("scaling").write_part(sample_dataset, 3, 12, tmp_path / "part")
    )
    assert np.bincount(part.labels).tolist() == [12, 12, 12]
    assert part.wnids == sample_dataset.wnids[:3]
    assert part.train_count == 30
    for row in (0, 20, 35):
        same = (sample_dataset.images == part.images[row]).all(axis=(1, 2, 3))
        assert sample_dataset.labels[same].tolist() == [part.labels[row]]
    whole = benchmark_module("scaling").write_part(sample_dataset, 10, 60, tmp_path / "whole")
    assert whole == sample_dataset.folder


def test_the_exponent_tells_linear_from_quadratic_and_constant(benchmark_module: Callable) -> None:
    def size(images: int) -> dict:
        took = {
            "open": 0.001,
            "split": 1e-6 * images,
            "load": 2e-9 * images**2,
            "train": 1e-3 * images,
            "evaluate": 1.0,
        }
        return {"images": images, "train_images": images, "test_images": images, "seconds": took}

    fits = benchmark_module("scaling").fits([size(images) for images in (1000, 4000, 16000)])
    assert [fits[name]["exponent"] for name in ("open", "split", "load", "train", "evaluate")] == [
        0,
        1,
        2,
        1,
        0,
    ]
    assert fits["train"]["seconds_per_image"] == pytest.approx(1e-3)
    assert fits["train"]["seconds_for_none"] == pytest.approx(0, abs=1e-6)


def test_the_peak_of_memory_is_this_process_s_own(benchmark_module: Callable) -> None:
    """A small program started by one that holds 300 MB must not report them."""
    scaling = benchmark_module("scaling")
    if not scaling.memory_line("VmHWM"):
        pytest.skip("Linux only")
    with scaling.Memory() as before:
        time.sleep(0.1)
    with scaling.Memory() as memory:
        ballast = np.ones(300_000_000, dtype=np.uint8)
        script = "import sys; sys.path.insert(0, sys.argv[1]); import bench_scaling; print(bench_scaling.peak_resident())"
        command = [sys.executable, "-c", script, str(Path(scaling.__file__).parent)]
        started = int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    assert scaling.peak_resident() > started + 200_000_000
    assert memory.private - before.private > 250_000_000
    assert ballast.sum() == 300_000_000

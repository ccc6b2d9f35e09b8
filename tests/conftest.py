"""Data sets and recipes that the tests share: small, made up, and computed on one thread, so that equal means equal."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import tinylab
from tinylab.data.dataset import Dataset, open_dataset, prepare
from tinylab.data.synthetic import write_sample
from tinylab.model import ResNet18
from tinylab.recipe import Recipe
from tinylab.recipes import accurate, smoke
from tinylab.run.folder import Run
from tinylab.training.train import train

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--soak", action="store_true", help="the full amount of every test of reliability"
    )
    parser.addoption("--table", metavar="FILE", help="write the table of the tests of reliability")
    parser.addoption(
        "--readme", metavar="FILE", help="the page whose part on reliability is rewritten, too"
    )


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout that the tests belong to."""
    return REPOSITORY


@pytest.fixture(scope="session")
def subprocess_environment() -> dict[str, str]:
    """Environment of a child process that imports the same tinylab, from any folder, and computes on one thread."""
    source = str(Path(tinylab.__file__).resolve().parents[1])
    return os.environ | {"PYTHONPATH": source, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="session")
def sample_zip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The made-up archive that `tinylab sample` writes."""
    path = tmp_path_factory.mktemp("sample") / "sample.zip"
    write_sample(path)
    return path


@pytest.fixture(scope="session")
def sample_dataset(sample_zip: Path) -> Dataset:
    """The made-up archive, prepared: 10 classes x 60 images, memory-mapped. Read only; copy the folder to change it."""
    return prepare(sample_zip, sample_zip.parent / "data", workers=1, progress=False)


@pytest.fixture(scope="session")
def small_dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Two made-up classes of 20 images in a folder, for other processes: `merged` makes 28 training, 12 test images."""
    folder = tmp_path_factory.mktemp("small")
    return prepare(
        write_sample(folder / "a.zip", classes=2, per_class=20),
        folder / "data",
        workers=1,
        progress=False,
    )


@pytest.fixture(scope="session")
def real_dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Tiny ImageNet itself: data/tiny-imagenet if that is prepared, else prepared from the archive once per session."""
    ready = REPOSITORY / "data" / "tiny-imagenet"
    source = os.environ.get("TINY_IMAGENET") or REPOSITORY / "data" / "tiny-imagenet-200.zip"
    if (ready / "meta.json").exists():
        dataset = open_dataset(ready)
    elif Path(source).exists():
        dataset = prepare(source, tmp_path_factory.mktemp("real") / "tiny-imagenet", progress=False)
    else:
        pytest.skip(
            "no Tiny ImageNet here: set TINY_IMAGENET or put data/tiny-imagenet-200.zip in place"
        )
    assert dataset.is_tiny_imagenet, f"{dataset.folder} is not the published data"
    return dataset


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Three classes of 6 noisy images in memory, told apart by their colour; 5 of each are official training images.

    `merged` makes 12 training and 6 test images of them.
    """
    rng = np.random.default_rng(0)
    labels = np.concatenate([np.repeat(np.arange(3), 5), np.arange(3)]).astype(np.int16)
    images = rng.integers(0, 100, (18, 64, 64, 3), dtype=np.uint8)
    images[np.arange(18), :, :, labels] += 100
    images.flags.writeable = False
    return Dataset(
        folder=tmp_path_factory.mktemp("tiny"),
        images=images,
        labels=labels,
        boxes=np.tile(np.array([8, 8, 55, 55], dtype=np.uint8), (18, 1)),
        wnids=("n90000001", "n90000002", "n90000003"),
        names=("red", "green", "blue"),
        train_count=15,
        content_sha256="0" * 64,
    )


@pytest.fixture(scope="session")
def narrow() -> Recipe:
    """Two epochs of a network a quarter as wide: on `tiny_dataset` 3 steps each, of 5, 5 and 2 images."""
    return replace(smoke(), name="narrow", epochs=2, batch_size=5, width=16)


@pytest.fixture(scope="session")
def train_tiny(tiny_dataset: Dataset, narrow: Recipe) -> Callable[..., Run]:
    """`train` on `tiny_dataset` in fp32 on the CPU: the same bits on every call. Takes the folder and any option."""

    def call(folder: Path, recipe: Recipe = narrow, **options) -> Run:
        settings = {"device": "cpu", "precision": "fp32", "workers": 0, "quiet": True} | options
        return train(recipe, tiny_dataset, folder=folder, **settings)

    return call


@pytest.fixture(scope="session")
def finished_run(train_tiny: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on `tiny_dataset` that nothing disturbed. Read only."""
    return train_tiny(tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture(scope="session")
def rich(narrow: Recipe) -> Recipe:
    """The `accurate` recipe's ingredients and a ramp, on a narrow network: 2 epochs of 3 steps of 4 images."""
    shape = {"name": "rich", "epochs": 2, "batch_size": 4, "width": 16, "ramp": ((32, 0.5),)}
    mixing = {
        "cutmix_probability": 0.3,
        "mixup_probability": 0.2,
        "resizemix_probability": 0.2,
        "unmixed_share": 0.0,
    }
    return replace(
        accurate(), **shape, **mixing, max_learning_rate=0.05, ema_decay=0.6, ema_bn_batches=2
    )


@pytest.fixture(scope="session", params=["sgd", "muon"])
def rich_reference(
    request: pytest.FixtureRequest,
    train_tiny: Callable[..., Run],
    rich: Recipe,
    tmp_path_factory: pytest.TempPathFactory,
) -> Run:
    """An undisturbed rich run with either optimiser."""
    return train_tiny(
        tmp_path_factory.mktemp("rich") / "run", replace(rich, optimizer=request.param)
    )


class Exact(ResNet18):
    """The network in double precision, whatever precision it is asked for. In single precision a
    CPU's rounding flips a ReLU now and then, and a gradient behind it changes by far more."""

    def float(self) -> "Exact":
        return self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.double())


def without_seconds(record: dict) -> dict:
    """What of an epoch's or a run's record is the same in two equal runs: all but the clocks and what holds them."""
    clocks = ("seconds", "images_per_second", "model_sha256", "stops")
    return {
        name: value for name, value in record.items() if not any(word in name for word in clocks)
    }


def assert_equal_runs(run: Run, reference: Run) -> None:
    """Weights, batch-norm statistics, predictions and metrics are equal in every bit."""
    from tinylab.run.weights import load_weights

    ours, theirs = (load_weights(each.weights)[0].state_dict() for each in (run, reference))
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different, f"weights differ: {different[:5]}"
    for name, values in reference.predictions.items():
        np.testing.assert_array_equal(run.predictions[name], values)
    assert [without_seconds(row) for row in run.history] == [
        without_seconds(row) for row in reference.history
    ]
    assert without_seconds(run.summary) == without_seconds(reference.summary)


def assert_same(first: object, second: object, where: str = "") -> None:
    """Equal in every bit, tensors and plain values, however nested."""
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), where
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first:
            assert_same(first[key], second[key], f"{where}/{key}")
    elif isinstance(first, list | tuple):
        assert len(first) == len(second), where
        for number, pair in enumerate(zip(first, second, strict=True)):
            assert_same(*pair, f"{where}/{number}")
    else:
        assert first == second, where

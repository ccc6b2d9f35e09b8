"""Data sets and recipes that the tests share: small, made up, and computed on one thread, so that
equal means equal."""

import importlib
import operator
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_flatten_with_path

import tinylab
from tinylab.data.dataset import Dataset, open_dataset, prepare
from tinylab.data.synthetic import write_sample
from tinylab.model import ResNet18
from tinylab.recipe import Recipe
from tinylab.recipes import accurate, smoke
from tinylab.run.environment import Compute, choose
from tinylab.run.folder import Run
from tinylab.run.weights import load_weights
from tinylab.training.train import train

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="every test of reliability in full")
    parser.addoption("--table", metavar="FILE", help="the page that gets the reliability table")


@pytest.fixture(scope="session", autouse=True)
def _like_in_a_terminal() -> None:
    """One thread, and Ctrl-C, which a shell's background jobs ignore."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def compute() -> Compute:
    return choose("cpu", "fp32")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout that the tests belong to."""
    return REPOSITORY


@pytest.fixture(scope="session")
def subprocess_environment() -> dict[str, str]:
    """Return what a child process needs to import the same tinylab, and one thread."""
    source = str(Path(tinylab.__file__).resolve().parents[1])
    return os.environ | {"PYTHONPATH": source, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="session")
def sample_zip(tmp_path_factory) -> Path:
    """The made-up archive that `tinylab sample` writes."""
    return write_sample(tmp_path_factory.mktemp("sample") / "sample.zip")


@pytest.fixture(scope="session")
def sample_dataset(sample_zip) -> Dataset:
    """The made-up archive, prepared: 10 classes x 60 images. Read only."""
    return prepare(sample_zip, sample_zip.parent / "data", workers=1, progress=False)


@pytest.fixture(scope="session")
def small_dataset(tmp_path_factory) -> Dataset:
    """Two made-up classes of 20 images in a folder: 28 training and 12 test images."""
    folder = tmp_path_factory.mktemp("small")
    archive = write_sample(folder / "a.zip", classes=2, per_class=20)
    return prepare(archive, folder / "data", workers=1, progress=False)


@pytest.fixture(scope="session")
def real_dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Tiny ImageNet itself: data/tiny-imagenet, or else prepared from the archive."""
    ready = REPOSITORY / "data" / "tiny-imagenet"
    source = Path(os.environ.get("TINY_IMAGENET") or f"{ready}-200.zip")
    if (ready / "meta.json").exists():
        dataset = open_dataset(ready)
    elif source.exists():
        dataset = prepare(source, tmp_path_factory.mktemp("real") / "tiny-imagenet", progress=False)
    else:
        pytest.skip("no Tiny ImageNet: set TINY_IMAGENET or put data/tiny-imagenet-200.zip there")
    assert dataset.is_tiny_imagenet
    return dataset


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory) -> Dataset:
    """Three classes of 6 noisy images in memory, told apart by their colour; 5 of each are official
    training images. `merged` makes 12 training and 6 test images of them."""
    rng = np.random.default_rng(0)
    labels = np.concatenate([np.repeat(np.arange(3), 5), np.arange(3)]).astype(np.int16)
    images = rng.integers(0, 100, (18, 64, 64, 3), dtype=np.uint8)
    images[np.arange(18), :, :, labels] += 100
    images.flags.writeable = False
    return Dataset(
        folder=tmp_path_factory.mktemp("tiny"), images=images, labels=labels,
        boxes=np.tile(np.array([8, 8, 55, 55], dtype=np.uint8), (18, 1)),
        wnids=("n90000001", "n90000002", "n90000003"), names=("red", "green", "blue"),
        train_count=15, content_sha256="0" * 64,
    )  # fmt: skip


@pytest.fixture(scope="session")
def narrow() -> Recipe:
    """Two epochs, on `tiny_dataset` of 3 steps each, of 5, 5 and 2 images."""
    return replace(smoke(), name="narrow", epochs=2, batch_size=5, width=16)


@pytest.fixture(scope="session")
def train_tiny(tiny_dataset, narrow) -> Callable[..., Run]:
    """`train` on `tiny_dataset` in fp32 on the CPU: the same bits on every call."""

    def call(folder: Path, recipe: Recipe = narrow, **options) -> Run:
        settings = {"device": "cpu", "precision": "fp32", "workers": 0, "quiet": True} | options
        return train(recipe, tiny_dataset, folder=folder, **settings)

    return call


@pytest.fixture(scope="session")
def finished_run(train_tiny, tmp_path_factory) -> Run:
    """A run on `tiny_dataset` that nothing disturbed. Read only."""
    return train_tiny(tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture(scope="session")
def rich(narrow) -> Recipe:
    """`accurate`'s ingredients and a ramp, on a narrow network: 2 epochs of 3 steps of 4 images."""
    return replace(
        accurate(), name="rich", epochs=2, batch_size=4, width=16, ramp=((32, 0.5),),
        cutmix_probability=0.3, mixup_probability=0.2, resizemix_probability=0.2, unmixed_share=0.0,
        max_learning_rate=0.05, ema_decay=0.6, ema_bn_batches=2,
    )  # fmt: skip


@pytest.fixture(scope="session", params=["sgd", "muon"])
def rich_reference(request, train_tiny, rich, tmp_path_factory) -> Run:
    """A rich run with either optimiser that nothing disturbed. Read only."""
    recipe = replace(rich, optimizer=request.param)
    return train_tiny(tmp_path_factory.mktemp("rich") / "run", recipe)


@pytest.fixture
def at_each(monkeypatch) -> Callable[[Callable[[str], None]], None]:
    """Call a function after each step ("step") and before each batch of a test, with its title."""
    module = importlib.import_module("tinylab.training.train")

    def install(hook: Callable[[str], None]) -> None:
        step, watched = module.train_step, module.watched

        def hooked_step(*arguments, **options) -> None:
            step(*arguments, **options)
            hook("step")

        def hooked_batches(batches, title, *rest) -> Iterator:
            for batch in watched(batches, title, *rest):
                hook(title)
                yield batch

        monkeypatch.setattr(module, "train_step", hooked_step)
        monkeypatch.setattr(module, "watched", hooked_batches)

    return install


class Exact(ResNet18):
    """The network in float64: fp32 rounding flips a ReLU now and then, which changes gradients."""

    def float(self) -> "Exact":
        return self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.double())


def without_seconds(record: dict) -> dict:
    """Return what of a record is the same in two equal runs: all but clocks and what holds them."""
    clocks = ("seconds", "images_per_second", "model_sha256", "stops")
    return {key: value for key, value in record.items() if not any(each in key for each in clocks)}


def assert_equal_runs(run: Run, reference: Run) -> None:
    """Weights, batch-norm statistics, predictions and metrics are equal in every bit."""
    assert_same(*(load_weights(each.weights)[0].state_dict() for each in (run, reference)))
    for name, values in reference.predictions.items():
        np.testing.assert_array_equal(run.predictions[name], values)
    ours, theirs = ([*each.history, each.summary] for each in (run, reference))
    assert [without_seconds(row) for row in ours] == [without_seconds(row) for row in theirs]


def assert_same(first: object, second: object) -> None:
    """Equal in every bit, tensors and plain values, however nested."""
    (ours, structure), (theirs, other) = (tree_flatten_with_path(each) for each in (first, second))
    assert structure == other
    for (path, value), (_, expected) in zip(ours, theirs, strict=True):
        equal = torch.equal if isinstance(value, torch.Tensor) else operator.eq
        assert equal(value, expected), path

"""Custom transforms, networks, losses and first weights: what a researcher brings along."""

import json
import random
import signal
from dataclasses import replace
from functools import partial
from itertools import count, product
from pathlib import Path

import albumentations
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.transforms import TrivialAugmentWide

from tinylab.cli import main
from tinylab.custom import CustomTransform, build_custom, gflop_per_image, load_custom, source_text
from tinylab.data.augment import Stream, generator, mix_batch, mixing_of
from tinylab.data.loader import Batch, make_loader
from tinylab.data.split import make_split
from tinylab.exceptions import Stopped, UserError
from tinylab.explain.gradcam import gradcam, stages_of
from tinylab.recipe import training_petaflop
from tinylab.run.folder import Run
from tinylab.run.weights import load_weights, read_weights
from tinylab.training.step import batch_loss

CPU = torch.device("cpu")
COMPOSE = albumentations.Compose(
    [albumentations.RandomCrop(48, 48), albumentations.Resize(64, 64)]
)  # fmt: skip


def noisy(image: np.ndarray) -> np.ndarray:
    """Draw from all three global generators; works on arrays only."""
    image = image[:: random.choice((-1, 1))].astype(np.int64)
    image += np.random.randint(0, 40, image.shape) + int(torch.randint(40, ()))
    return image.clip(0, 255).astype(np.uint8)


def vgg(classes: int) -> nn.Module:
    """Work in place, draw in training, and have no stages, batch norm or `fc`."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2), nn.ReLU(inplace=True), nn.Dropout(0.5),
        nn.Conv2d(16, 24, 3, stride=2), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, classes),
    )  # fmt: skip


def focal(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Weigh each image by what its label lacks in probability (Lin et al. 2017)."""
    right = logits.softmax(dim=1).gather(1, labels[:, None])[:, 0]
    return ((1 - right) ** 2 * F.cross_entropy(logits, labels, reduction="none")).mean()


@pytest.mark.parametrize(
    "transform", [TrivialAugmentWide(), COMPOSE, noisy], ids=["PIL", "A", "np"]
)
def test_a_transform_draws_by_seed_epoch_and_position_alone(
    tiny_dataset, narrow, transform
) -> None:
    recipe, rows = replace(narrow, batch_size=4), make_split(tiny_dataset, "merged").train

    def batches(workers: int = 0, **ranks: int) -> list[Batch]:
        own = CustomTransform(transform)
        loader = make_loader(tiny_dataset, rows, recipe, 5, CPU, workers, transform=own, **ranks)
        found = [list(loader.epoch(epoch, start=epoch - 1)) for epoch in (1, 2)]
        loader.close()
        return found[0] + found[1]

    plain, helped = batches(), batches(workers=2)
    shares = [batches(rank=rank, ranks=2) for rank in (0, 1)]
    for one, other, *parts in zip(plain, helped, *shares, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.images, torch.cat([part.images for part in parts]))
    assert not torch.equal(plain[0].images, plain[3].images), "another epoch draws anew"

    # ---- the second image of the second step, by hand ----
    order = generator(5, Stream.ORDER, 1).permutation(len(rows))
    row, rng = rows[order[5]], generator(5, Stream.AUGMENT, 1, 5)
    if transform is COMPOSE:
        transform.set_random_state(rng, random.Random(int(rng.integers(2**63))))
        expected = transform(image=tiny_dataset.images[row])["image"]
    else:
        seed = int(rng.integers(2**32))
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        image = tiny_dataset.images[row]
        expected = transform(image if transform is noisy else Image.fromarray(image))
    assert np.array_equal(plain[1].images[1], np.asarray(expected))


def test_a_recipe_mixes_what_an_own_transform_returns(tiny_dataset, rich) -> None:
    recipe = replace(rich, cutmix_probability=0.4, mixup_probability=0.4)
    rows = make_split(tiny_dataset, "merged").train
    loader = make_loader(tiny_dataset, rows, recipe, 1, CPU, transform=CustomTransform(np.flipud))
    ways = set()
    for epoch, step in product((1, 2), range(3)):
        batch, rng = loader.batch(epoch, step), generator(1, Stream.MIX, epoch, step)
        own, way = loader.rows_at(epoch, step), mixing_of(recipe, rng, epoch)
        images = torch.from_numpy(tiny_dataset.images[own][:, ::-1].copy())
        ways.add(way)
        if way:
            images, share = mix_batch(images, images.roll(1, 0), way, recipe, rng)
            assert batch.share == share
            assert batch.partners.tolist() == np.roll(tiny_dataset.labels[own], 1).tolist()
        assert torch.equal(batch.images, images)
        assert batch.labels.tolist() == tiny_dataset.labels[own].tolist()
    assert len(ways) > 1


def test_what_is_no_transform_network_or_loss_is_refused_in_a_line(tmp_path) -> None:
    def broken(image: Image.Image) -> None:
        raise OSError("no such\nfont")

    with pytest.raises(
        UserError, match=r"the transform fails: OSError: no such font \(line \d+ of"
    ):
        CustomTransform(broken)
    with pytest.raises(UserError, match=r"returns uint8 \(32, 64, 3\): uint8 \(64, 64, 3\) is"):
        CustomTransform(lambda image: np.asarray(image)[:32])
    with pytest.raises(UserError, match=r"of 2 images the network makes \(2, 7\): \(2, 3\) is"):
        build_custom(lambda classes: vgg(7), 3)
    with pytest.raises(UserError, match="the network cannot be used: TypeError"):
        build_custom(lambda: vgg(7), 3)

    file = tmp_path / "mine.py"
    file.write_text("import math\n\nhalf = 1 / 0\n")
    for reference, said in (
        ("mine.py", "no FILE:NAME"), (f"{tmp_path}/none.py:x", "does not exist"),
        (f"{file}:half", r"ZeroDivisionError: division by zero \(line 3 of"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            load_custom(reference)
    (tmp_path / "json.py").write_text("one = 1\n")
    with pytest.raises(UserError, match="has the name of another module: rename it"):
        load_custom(f"{tmp_path}/json.py:one")
    file.write_text("one = 1\n")
    with pytest.raises(UserError, match="nothing to call that is named one"):
        load_custom(f"{file}:one")


def test_an_own_loss_is_the_mean_over_the_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, generator=generator)
    labels, partners = torch.tensor([0, 1, 2, 3, 0, 1]), torch.tensor([3, 3, 3, 0, 0, 0])
    mixed = Batch(logits, labels, partners, 0.7)
    found = batch_loss(logits, mixed, 0.1, focal) / 6
    assert found == pytest.approx(0.7 * focal(logits, labels) + 0.3 * focal(logits, partners))
    smooth = partial(F.cross_entropy, label_smoothing=0.1)
    assert batch_loss(logits, mixed, 0.0, smooth) == pytest.approx(batch_loss(logits, mixed, 0.1))


def test_a_run_with_own_parts_is_recorded_and_continues_exactly(
    train_tiny, rich, at_each, tmp_path
) -> None:
    own = {"transform": noisy, "model": vgg, "loss": focal, "recipe": rich}
    whole = train_tiny(tmp_path / "whole", **own)
    assert whole.identity["model"] == source_text(vgg)
    assert "stride=2), nn.ReLU" in whole.identity["model"]
    assert whole.summary["parameters"] == sum(each.numel() for each in vgg(3).parameters())
    convolutions = 31 * 31 * 16 * 27 + 15 * 15 * 24 * 144 + 24 * 3
    assert gflop_per_image(vgg(3)) == pytest.approx(3 * 2 * convolutions / 1e9)
    petaflop = training_petaflop(rich, 12, 6e-9 * convolutions)
    assert whole.summary["train_petaflop"] == petaflop

    steps = count(1)

    def hook(title: str) -> None:
        if title == "step" and next(steps) == 4:
            signal.raise_signal(signal.SIGINT)

    at_each(hook)
    with pytest.raises(Stopped):
        train_tiny(tmp_path / "run", **own)
    torch.manual_seed(99)  # dropout must not depend on what was drawn before
    with pytest.raises(UserError, match=r"holds another run \(loss [0-9a-f]{12} -> None\)"):
        train_tiny(tmp_path / "run", **own | {"loss": None})
    continued = train_tiny(tmp_path / "run", **own, workers=1)
    for name, values in whole.predictions.items():
        assert np.array_equal(continued.predictions[name], values)
    with pytest.raises(UserError, match="is not tinylab's: name it with --model FILE:NAME"):
        load_weights(whole.weights)
    assert_equal_runs_of_own(continued, whole)


def assert_equal_runs_of_own(run: Run, reference: Run) -> None:
    ours, theirs = (
        load_weights(each.weights, make=vgg)[0].state_dict() for each in (run, reference)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_maps_of_a_network_without_stages_are_its_last_convolutions() -> None:
    network, inputs = build_custom(vgg, 3, seed=1).eval(), torch.randn(2, 3, 64, 64)
    assert stages_of(network) == ("3",)
    maps = gradcam(network, inputs, torch.tensor([2, 0]))["3"]
    assert maps.shape == (2, 15, 15)
    for image, target, found in zip(inputs, (2, 0), maps, strict=True):
        seen = network[:4](image[None]).detach().requires_grad_()
        after = network[6:](F.relu(seen).mean(dim=(2, 3)))
        (gradient,) = torch.autograd.grad(after[0, target], seen)
        expected = (gradient.mean(dim=(2, 3), keepdim=True) * seen).sum(dim=1).relu()[0]
        expected = (expected / expected.max().clamp(min=1e-30)).detach().numpy()
        np.testing.assert_allclose(found, expected, atol=1e-5)
    with pytest.raises(UserError, match="no convolution: `tinylab explain --count 0 --sample 0`"):
        gradcam(nn.Sequential(nn.Flatten(), nn.Linear(3 * 64**2, 3)), inputs, torch.tensor([2, 0]))


def test_first_weights_are_those_that_fit(
    train_tiny, finished_run, narrow, at_each, tmp_path, capfd
) -> None:
    """Two of three classes: all but the last layer is taken, and the record says of what file."""
    seen, module = [], __import__("tinylab.training.train", fromlist=["train"])
    state_of = module.new_state

    def new_state(*arguments, **options):
        state = state_of(*arguments, **options)
        seen.append({name: value.clone() for name, value in state.model.state_dict().items()})
        return state

    monkeypatch = pytest.MonkeyPatch()
    with monkeypatch.context() as patched:
        patched.setattr(module, "new_state", new_state)
        how = {"limit_classes": 2, "init": finished_run.folder, "quiet": False}
        run = train_tiny(tmp_path / "run", replace(narrow, batch_size=4), **how)
        train_tiny(tmp_path / "new", replace(narrow, batch_size=4), limit_classes=2)
    assert "init: 120 of 122 tensors; new: fc.weight, fc.bias\n" in capfd.readouterr().out
    before = read_weights(finished_run.weights)[0]
    for name, value in seen[0].items():
        assert torch.equal(value, seen[1][name] if name.startswith("fc.") else before[name]), name
    assert run.identity["init_sha256"] == finished_run.summary["model_sha256"]
    with pytest.raises(UserError, match=r"another run \(init_sha256 [0-9a-f]{12} -> None\)"):
        train_tiny(run.folder, replace(narrow, batch_size=4), limit_classes=2)
    with pytest.raises(UserError, match="nothing of --init fits this network"):
        train_tiny(tmp_path / "vgg", model=vgg, init=finished_run.weights)


def test_every_command_takes_an_own_network(small_dataset, tmp_path, monkeypatch, capsys) -> None:
    """And asks for it where it is missing."""
    monkeypatch.chdir(tmp_path)
    here = Path(__file__)
    (tmp_path / "mine.py").write_text(here.read_text().replace("from conftest", "# from conftest"))
    train = [
        "train", "accurate", "--epochs", "1", "--batch-size", "14", "--device", "cpu", "--data",
        str(small_dataset.folder), "--run", "run", "--transform", "mine.py:noisy", "--loss",
        "mine.py:focal", "--model", "mine.py:vgg",
    ]  # fmt: skip
    assert main(train) == 0
    for command in (
        ["evaluate", "run"], ["explain", "run", "--sample", "5", "--count", "2"], ["report", "run"],
        ["predict", "run", "run/figures/samples.png", "--gradcam", "maps"],
        ["export", "run", "--onnx", "run.onnx"],
    ):  # fmt: skip
        if command[0] not in ("report", "export"):
            capsys.readouterr()
            assert main(command) == 2
            error = capsys.readouterr().err
            assert "--model FILE:NAME" in error
            assert error.count("\n") == 1
        assert main([*command, "--model", "mine.py:vgg"]) == 0, command
    assert (tmp_path / "run.onnx").exists()
    explained = json.loads((tmp_path / "run/explain.json").read_text())
    assert "augmentation" not in explained["figures"], "an own transform is not run from its record"
    assert explained["localisation"]["stage"] == "3"
    card = (tmp_path / "run/export/README.md").read_text()
    assert "def vgg(classes: int)" in card
    assert "ResNet" not in card
    for page in ("run/report.html",):
        assert "ResNet-18" not in (tmp_path / page).read_text()

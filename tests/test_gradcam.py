"""Which images are explained, and whether the maps are Grad-CAM's."""

import copy
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import Exact
from torch import nn

from tinylab.data.dataset import Dataset
from tinylab.exceptions import UserError
from tinylab.explain.gradcam import STAGES, gradcam
from tinylab.explain.mistakes import explain, misclassified, softmax
from tinylab.explain.sampling import bootstrap, sample
from tinylab.model import ResNet18

CLASSES = 6
TARGETS = torch.tensor([0, 5, 2, 2, 4])


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks this small only wait for each other's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def model() -> ResNet18:
    torch.manual_seed(1)
    network = ResNet18(classes=CLASSES, width=4)
    with torch.no_grad():
        for _ in range(
            3
        ):  # batch-norm statistics of its own, so that eval mode differs from train mode
            network.train()(2 * torch.randn(16, 3, 32, 32) + 1)
    return network.eval()


@pytest.fixture
def exact(model: ResNet18) -> Exact:
    network = Exact(CLASSES, width=4)
    network.load_state_dict(model.state_dict())
    return network.eval()


@pytest.fixture
def inputs() -> torch.Tensor:
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def by_hand(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> dict[str, np.ndarray]:
    """Maps from their definition, in double precision, one image and one stage at a time."""
    model, inputs = copy.deepcopy(model).double(), inputs.double()
    maps: dict[str, list[np.ndarray]] = {stage: [] for stage in STAGES}
    for image, target in zip(inputs, targets, strict=True):
        for stage in STAGES:
            seen = []
            handle = getattr(model, stage).register_forward_hook(
                lambda _, __, output, seen=seen: seen.append(output)
            )
            logit = model(image[None])[0, target]
            handle.remove()
            (gradient,) = torch.autograd.grad(logit, seen[0])
            weights = gradient[0].mean(dim=(1, 2), keepdim=True)
            summed = torch.relu((weights * seen[0][0].detach()).sum(dim=0))
            summed = summed - summed.min()
            maps[stage].append((summed / summed.max() if summed.any() else summed).numpy())
    return {stage: np.stack(values) for stage, values in maps.items()}


def equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray], atol: float = 1e-5) -> bool:
    return one.keys() == other.keys() and all(
        np.allclose(one[stage], other[stage], atol=atol) for stage in one
    )


@pytest.mark.numerical
def test_maps_equal_their_definition_at_every_stage(exact: Exact, inputs: torch.Tensor) -> None:
    inputs = torch.cat([inputs, inputs.flip(1)], dim=3).repeat(
        1, 1, 2, 1
    )  # 64 x 64, as the data set has it
    maps = gradcam(exact, inputs, TARGETS)
    sides = {"layer1": 64, "layer2": 32, "layer3": 16, "layer4": 8}
    assert {stage: values.shape for stage, values in maps.items()} == {
        s: (5, n, n) for s, n in sides.items()
    }
    assert equal(maps, by_hand(exact, inputs, TARGETS))
    for values in maps.values():
        assert values.dtype == np.float32
        assert values.min() == 0
        assert set(values.max(axis=(1, 2)).tolist()) <= {0.0, 1.0}
        assert values.any()


def test_each_image_is_explained_for_its_own_target(model: ResNet18, inputs: torch.Tensor) -> None:
    same_image = inputs[:1].expand(2, -1, -1, -1)
    maps = gradcam(model, same_image, torch.tensor([0, 1]))
    assert not np.allclose(maps["layer4"][0], maps["layer4"][1], atol=0.05)


@pytest.mark.numerical
@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_batches_equal_one_by_one(exact: Exact, inputs: torch.Tensor, batch_size: int) -> None:
    each = zip(inputs.split(1), TARGETS.split(1), strict=True)
    alone = [gradcam(exact, image, target) for image, target in each]
    together = gradcam(exact, inputs, TARGETS, batch_size=batch_size)
    expected = {stage: np.concatenate([maps[stage] for maps in alone]) for stage in STAGES}
    assert equal(together, expected)
    for i, j in itertools.combinations(range(len(inputs)), 2):
        for maps in expected.values():
            assert not np.allclose(maps[i], maps[j], atol=0.05), "to mix them up would not show"


def test_stages_may_be_asked_for_in_any_order(model: ResNet18, inputs: torch.Tensor) -> None:
    everything = gradcam(model, inputs, TARGETS)
    some = gradcam(model, inputs, TARGETS, stages=("layer4", "layer2"))
    assert some.keys() == {"layer2", "layer4"}
    assert equal(some, {stage: everything[stage] for stage in some})


@pytest.mark.parametrize("stages", [STAGES, ("layer4",)])
def test_model_is_left_as_it_was(
    model: ResNet18, inputs: torch.Tensor, stages: tuple[str, ...]
) -> None:
    model.train()
    model.layer2.eval()
    model.fc.weight.requires_grad_(False)
    model.conv1.weight.grad = torch.full_like(model.conv1.weight, 3.0)
    modes = {name: module.training for name, module in model.named_modules()}
    asks = {name: weight.requires_grad for name, weight in model.named_parameters()}
    state = copy.deepcopy(model.state_dict())

    gradcam(model, inputs, TARGETS, stages)

    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: weight.requires_grad for name, weight in model.named_parameters()} == asks
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    gradients = {
        name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None
    }
    assert gradients.keys() == {"conv1.weight"}
    assert (gradients["conv1.weight"] == 3).all()
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    assert not any(getattr(module, name) for module in model.modules() for name in hooks)
    assert not inputs.requires_grad
    assert inputs.grad is None


def test_train_mode_and_frozen_weights_change_nothing(
    model: ResNet18, inputs: torch.Tensor
) -> None:
    plain = gradcam(model, inputs, TARGETS)
    assert equal(gradcam(model.train(), inputs, TARGETS), plain)
    assert equal(gradcam(model.requires_grad_(False), inputs, TARGETS), plain)


@pytest.mark.parametrize(
    "surroundings",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)],
)
def test_surroundings_change_nothing(model: ResNet18, inputs: torch.Tensor, surroundings) -> None:
    plain = gradcam(model, inputs, TARGETS)
    with surroundings():
        assert equal(gradcam(model, inputs.clone(), TARGETS), plain)
        assert equal(
            gradcam(model, inputs.clone(), TARGETS, ("layer4",)), {"layer4": plain["layer4"]}
        )
        assert equal(
            gradcam(copy.deepcopy(model), inputs.clone(), TARGETS, ("layer4",)),
            {"layer4": plain["layer4"]},
        )


def test_wrappers_are_taken_off(model: ResNet18, inputs: torch.Tensor) -> None:
    plain = gradcam(model, inputs, TARGETS)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    assert equal(gradcam(averaged, inputs, TARGETS), plain)
    assert equal(gradcam(torch.compile(averaged), inputs, TARGETS), plain)
    last = {"layer4": plain["layer4"]}
    assert equal(gradcam(torch.compile(averaged), inputs, TARGETS, ("layer4",)), last)
    averaged.module.fc.weight.data.neg_()
    assert not equal(gradcam(averaged, inputs, TARGETS, ("layer4",)), last), (
        "the average's own weights count"
    )


def test_the_last_stage_alone_asks_for_no_gradient_below_it(
    model: ResNet18, inputs: torch.Tensor
) -> None:
    asked = []

    def note(_: nn.Module, arguments: tuple, output: torch.Tensor) -> None:
        asked.append((arguments[0].requires_grad, output.requires_grad))

    model.layer3.register_forward_hook(note)  # goes to the copy, too
    gradcam(model, inputs, TARGETS, stages=("layer4",))
    assert asked == [(False, False)]


def test_sample_is_a_beginning_of_one_permutation() -> None:
    everything = sample(100, None, seed=3)
    assert sorted(everything.tolist()) == list(range(100))
    assert np.array_equal(sample(100, 10, seed=3), everything[:10])
    assert np.array_equal(sample(100, 1000, seed=3), everything)
    assert not np.array_equal(sample(100, None, seed=4), everything)
    assert sample(100, 0).shape == (0,)
    with pytest.raises(UserError, match="count must be 0 or more, not -1"):
        sample(100, -1)


def test_bootstrap_agrees_with_scipy_and_with_theory() -> None:
    rng = np.random.default_rng(0)
    skewed, shares = rng.exponential(size=300), (rng.random(300) < 0.3).astype(float)
    found = bootstrap({"skewed": skewed, "shares": shares, "difference": skewed - shares}, seed=1)
    for name, values in {"skewed": skewed, "shares": shares, "difference": skewed - shares}.items():
        theirs = scipy.stats.bootstrap(
            (values,), np.mean, n_resamples=9999, method="percentile", rng=rng
        )
        width = theirs.confidence_interval.high - theirs.confidence_interval.low
        assert found[name]["mean"] == pytest.approx(values.mean(), rel=1e-12)
        assert found[name]["low"] == pytest.approx(theirs.confidence_interval.low, abs=0.06 * width)
        assert found[name]["high"] == pytest.approx(
            theirs.confidence_interval.high, abs=0.06 * width
        )
        assert width == pytest.approx(2 * 1.96 * values.std() / np.sqrt(300), rel=0.06)


def test_bootstrap_samples_whole_images() -> None:
    """The interval of a difference is that of paired values; that of two constants is the
    constant."""
    values = np.random.default_rng(0).random(50)
    found = bootstrap({"one": values, "other": values + 0.1, "difference": (values + 0.1) - values})
    assert found["difference"] == pytest.approx({"mean": 0.1, "low": 0.1, "high": 0.1}, abs=1e-12)
    assert found["other"]["low"] - found["one"]["low"] == pytest.approx(0.1, abs=1e-12)
    assert all(each["low"] <= each["mean"] <= each["high"] for each in found.values())
    assert found == bootstrap(
        {"one": values, "other": values + 0.1, "difference": (values + 0.1) - values}
    )
    assert found["one"] != bootstrap({"one": values}, seed=1)["one"]
    assert bootstrap({"single": np.array([0.25])})["single"] == {
        "mean": 0.25,
        "low": 0.25,
        "high": 0.25,
    }
    assert bootstrap({"none": np.empty(0)}) == {"none": None}


def test_bootstrap_intervals_cover_the_truth() -> None:
    """Of 100 samples of 80 images, about 95."""
    shares = np.random.default_rng(1).random((100, 80)) < 0.7
    found = bootstrap({str(i): sample for i, sample in enumerate(shares)})
    assert 88 <= sum(each["low"] <= 0.7 <= each["high"] for each in found.values()) <= 99


def test_bad_requests(model: ResNet18, inputs: torch.Tensor) -> None:
    with pytest.raises(UserError, match="unknown layer 'layer5'; there are: layer1"):
        gradcam(model, inputs, TARGETS, stages=("layer5",))
    with pytest.raises(UserError, match="there are: layer1"):
        gradcam(model, inputs, TARGETS, stages=("fc",))
    with pytest.raises(ValueError, match=r"5 images, targets \[0\]"):
        gradcam(model, inputs, TARGETS[:1])
    for outside in (-1, CLASSES):
        with pytest.raises(ValueError, match=rf"3, {outside}\]$"):
            gradcam(model, inputs, torch.tensor([0, 1, 2, 3, outside]))


def test_misclassified_draws_wrong_ones_only_and_always_the_same() -> None:
    rng = np.random.default_rng(3)
    labels = np.repeat(np.arange(20), 50)
    logits = rng.normal(size=(1000, 20)).astype(np.float16)
    logits[np.arange(1000), labels] += 2
    ten = misclassified(logits, labels, 10)
    assert len(set(ten.tolist())) == 10
    assert (logits[ten].argmax(axis=1) != labels[ten]).all()
    assert np.array_equal(ten, misclassified(logits, labels, 10))
    assert np.array_equal(ten, misclassified(logits, labels, 500)[:10])
    assert not np.array_equal(ten, misclassified(logits, labels, 10, seed=1))
    assert len(set(labels[ten].tolist())) > 4, "the draw must reach beyond the first classes"
    all_wrong = misclassified(logits, labels, 1000)
    assert set(all_wrong.tolist()) == set(np.flatnonzero(logits.argmax(axis=1) != labels).tolist())


def test_misclassified_with_nothing_to_draw() -> None:
    logits, labels = np.eye(3), np.arange(3)
    assert misclassified(logits, labels, 10).shape == (0,)
    assert misclassified(-logits, labels, 0).shape == (0,)


def test_softmax_of_stored_logits() -> None:
    logits = np.array([[60000, 59000, -60000], [1, 1, 1]], dtype=np.float16)
    assert np.allclose(softmax(logits), [[1, 0, 0], [1 / 3, 1 / 3, 1 / 3]])
    values = np.random.default_rng(0).normal(size=(4, 7)).astype(np.float16)
    assert np.allclose(softmax(values), torch.from_numpy(values).double().softmax(dim=1).numpy())


BOX = (8, 16, 31, 55)  # wider than high it is not: swapped axes would show


def colour_data(**changed) -> dict:
    """Six images, each black but for one red rectangle; two are answered rightly (0: red), four
    wrongly."""
    images = np.zeros((6, 64, 64, 3), np.uint8)
    x0, y0, x1, y1 = BOX
    images[:, y0 : y1 + 1, x0 : x1 + 1, 0] = 200
    arrays = {
        "images": images,
        "labels": np.array([0, 0, 1, 1, 2, 2], np.int16),
        "boxes": np.array([BOX, BOX, BOX, BOX, (40, 0, 63, 63), (5, 5, 5, 5)], np.uint8),
        "wnids": ("n01", "n02", "n03"),
        "names": ("red", "green", "blue"),
    } | changed
    return {
        "dataset": Dataset(folder=Path(), train_count=6, content_sha256="0" * 64, **arrays),
        "rows": np.array([5, 0, 2, 4, 3]),
        "logits": np.tile(np.array([2, 0, 1], np.float16), (5, 1)),
        "normalise": lambda images: images.permute(0, 3, 1, 2).float() / 255,
    }


class ColourNetwork(nn.Module):
    """Its logits are the mean red, green and blue, times `scale`: where a colour is, there is its
    evidence."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.layer1, self.layer2 = nn.AvgPool2d(1), nn.AvgPool2d(2)
        self.layer3, self.layer4 = nn.AvgPool2d(2), nn.AvgPool2d(2)
        self.fc = nn.Linear(3, 3, bias=False)
        with torch.no_grad():
            self.fc.weight.copy_(scale * torch.eye(3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.layer4(self.layer3(self.layer2(self.layer1(images)))).mean(dim=(2, 3)))


def test_explanation_says_what_was_seen_and_where() -> None:
    data = colour_data()
    explanation = explain(ColourNetwork(), **data, count=10)
    assert (explanation.tested, explanation.wrong, len(explanation.entries)) == (5, 4, 4)
    rows = [entry["row"] for entry in explanation.entries]
    assert sorted(rows) == [2, 3, 4, 5]
    assert np.array_equal(explanation.images, data["dataset"].images[rows])
    entries = {entry["row"]: entry for entry in explanation.entries}

    right_place = entries[2]
    red, green, _ = np.exp([2, 0, 1]) / np.exp([2, 0, 1]).sum()
    assert right_place["predicted"] == {
        "wnid": "n01",
        "name": "red",
        "probability": pytest.approx(red, abs=1e-6),
    }
    assert right_place["actual"] == {
        "wnid": "n02",
        "name": "green",
        "probability": pytest.approx(green, abs=1e-6),
    }
    assert right_place["box"] == list(BOX)
    assert right_place["box_area"] == pytest.approx(24 * 40 / 64**2, abs=1e-4)
    first = right_place["stages"]["layer1"]
    assert first == {
        "size": [64, 64],
        "mean": pytest.approx(24 * 40 / 64**2, abs=1e-4),
        "energy_in_box": 1.0,
    }
    assert right_place["stages"]["layer4"]["size"] == [8, 8]
    assert 0.75 < right_place["stages"]["layer4"]["energy_in_box"] < 1, (
        "enlarging blurs the edge, no more"
    )
    assert right_place["actual_map"]["energy_in_box"] is None, "there is no green"
    assert entries[4]["stages"]["layer1"]["energy_in_box"] == 0, (
        "the network looked beside this box"
    )
    assert entries[5]["stages"]["layer1"]["energy_in_box"] is None, (
        "a box of one pixel says nothing"
    )


def test_the_actual_class_has_a_map_of_its_own() -> None:
    data = colour_data()
    data["dataset"].images[:, 40:, 40:, 1] = 100  # green: the actual class of rows 2 and 3
    explanation = explain(ColourNetwork(), **data, count=10)
    rows = [entry["row"] for entry in explanation.entries]
    own = explanation.actual_maps[rows.index(2)]
    assert own.shape == (8, 8)
    assert np.array_equal(np.argwhere(own == 1), [[y, x] for y in (5, 6, 7) for x in (5, 6, 7)])
    assert explanation.maps["layer4"][rows.index(2)][2:7, 1:4].all(), (
        "the predicted class's map shows red"
    )
    assert explanation.entries[rows.index(2)]["actual_map"]["energy_in_box"] < 0.1
    labelled = gradcam(
        ColourNetwork(),
        data["normalise"](torch.from_numpy(data["dataset"].images[[2]])),
        torch.tensor([1]),
    )
    assert np.array_equal(own, labelled["layer4"][0])


def test_explanation_is_json_and_reproducible() -> None:
    first, second = (
        explain(ColourNetwork(), **colour_data(), count=2, seed=4).to_json() for _ in range(2)
    )
    assert json.loads(json.dumps(first, allow_nan=False)) == first == second
    told = (first["seed"], first["method"], first["explained_class"], len(first["images"]))
    assert told == (4, "gradcam", "predicted", 2)


def test_nothing_wrong_gives_an_empty_explanation() -> None:
    data = colour_data(labels=np.zeros(6, np.int16))
    explanation = explain(ColourNetwork(), **data)
    assert (explanation.tested, explanation.wrong, explanation.entries, explanation.maps) == (
        5,
        0,
        [],
        {},
    )
    assert explanation.images.shape == (0, 64, 64, 3)


def test_weak_maps_are_scaled_fully_and_empty_ones_stay_empty() -> None:
    image, red = torch.zeros(1, 3, 64, 64), torch.tensor([0])
    image[:, 0, 10:30, 10:30] = 1
    weak = gradcam(ColourNetwork(scale=1e-4), image, red)
    assert np.allclose(weak["layer1"], gradcam(ColourNetwork(), image, red)["layer1"], atol=1e-3)
    assert weak["layer1"].max() == 1
    against = gradcam(ColourNetwork(scale=-1), image, red)
    assert all(not maps.any() for maps in against.values())

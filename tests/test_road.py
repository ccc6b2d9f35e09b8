"""ROAD: a map of what the network needs beats random maps, and nothing around it changes."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from pytorch_grad_cam.metrics.road import NoisyLinearImputer, ROADCombined, neighbors_weights
from pytorch_grad_cam.utils.model_targets import ClassifierOutputSoftmaxTarget
from torch import nn
from torch.nn import functional

from tinylab.data.dataset import Dataset
from tinylab.exceptions import UserError
from tinylab.explain.gradcam import gradcam
from tinylab.explain.road import ORDERS, faithfulness, ranks
from tinylab.explain.sampling import sample


class CornerNetwork(nn.Module):
    """Sees the upper left quarter only: the first class's logit grows with its brightness."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1, self.layer2 = nn.AvgPool2d(1), nn.AvgPool2d(2)
        self.layer3, self.layer4 = nn.AvgPool2d(2), nn.AvgPool2d(2)
        self.fc = nn.Linear(3, 2, bias=False)
        with torch.no_grad():
            self.fc.weight.copy_(torch.tensor([[4.0, 4.0, 4.0], [-4.0, -4.0, -4.0]]))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        seen = torch.zeros_like(images)
        half = images.shape[2] // 2
        seen[:, :, :half, :half] = images[:, :, :half, :half]
        return self.fc(self.layer4(self.layer3(self.layer2(self.layer1(seen)))).mean(dim=(2, 3)))


def quarter(images: torch.Tensor) -> torch.Tensor:
    """Images uint8 (n, 64, 64, 3) for the network, float32 (n, 3, 16, 16): to fill in 4,096 pixels
    takes long."""
    return functional.avg_pool2d(images.permute(0, 3, 1, 2).float() / 255, 4)


def data(count: int = 6, images: np.ndarray | None = None) -> dict:
    """Dark images, each with a bright patch in the corner that the network sees, and another
    elsewhere."""
    if images is None:
        images = np.full((count, 64, 64, 3), 20, np.uint8)
        images[:, 8:24, 8:24] = 240
        images[:, 40:56, 40:56] = 240
    labels, boxes = np.zeros(count, np.int16), np.zeros((count, 4), np.uint8)
    return {
        "dataset": Dataset(Path(), images, labels, boxes, (), (), count, "0" * 64),
        "rows": np.arange(count),
        "logits": np.tile(np.array([2, -2], np.float16), (count, 1)),
        "normalise": quarter,
        "stage": "layer2",
    }


def test_a_map_of_what_matters_beats_random_ones() -> None:
    found = faithfulness(CornerNetwork(), **data(), count=6)
    assert found["difference"]["low"] > 0.02
    assert found["combined"]["mean"] > found["random_combined"]["mean"]
    assert found["difference"]["mean"] == pytest.approx(
        found["combined"]["mean"] - found["random_combined"]["mean"]
    )
    for kind in ("map", "random"):
        assert all(
            len(found[kind][order]) == 9
            for order in ("most_relevant_first", "least_relevant_first")
        )
    # At the 90th percentile a tenth of the pixels goes: the map's tenth is what the network sees, a
    # random one is not.
    assert (
        found["map"]["most_relevant_first"][-1] < found["random"]["most_relevant_first"][-1] - 0.05
    )
    area = [
        np.mean(found["map"][order]) for order in ("least_relevant_first", "most_relevant_first")
    ]
    assert found["combined"]["mean"] == pytest.approx((area[0] - area[1]) / 2)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_it_is_seeded_and_leaves_the_generators_and_the_network_as_they_were() -> None:
    model = CornerNetwork().train()
    model.layer4.eval()
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    first = faithfulness(model, **data(2), count=2)
    drawn = (torch.rand(1).item(), np.random.rand(), random.random())
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    assert drawn == (torch.rand(1).item(), np.random.rand(), random.random())
    torch.manual_seed(4)
    second = faithfulness(model, **data(2), count=2)
    assert first | {"seconds": 0} == second | {"seconds": 0}
    assert model.training
    assert not model.layer4.training, "each part as it was"
    assert model.fc.weight.grad is None
    other = faithfulness(model, **data(2), count=2, seed=1)
    assert other["random"] != first["random"]


def test_no_more_images_than_there_are() -> None:
    assert faithfulness(CornerNetwork(), **data(2), count=200)["images"] == 2


def test_no_image_is_no_number() -> None:
    found = faithfulness(CornerNetwork(), **data(2), count=0)
    assert found["map"] == found["random"] == {order: [None] * 9 for order in ORDERS}
    assert (found["images"], found["combined"], found["difference"]) == (0, None, None)


def test_ranks_leave_no_ties() -> None:
    maps, ties = (
        torch.zeros(3, 8, 8),
        torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)),
    )
    maps[0, 2, 3] = 1
    maps[1] = torch.arange(64).view(8, 8) / 64
    found = torch.from_numpy(ranks(maps.numpy(), ties.numpy()))
    assert np.array_equal(found.flatten(1).sort(dim=1).values, np.tile(np.arange(64) / 64, (3, 1)))
    assert found[0, 2, 3] == found[0].max()
    assert torch.equal(found[1], maps[1])
    assert torch.equal(found[2].flatten().argsort(), ties[2].flatten().argsort())
    rest = torch.arange(64) != 2 * 8 + 3
    assert torch.equal(found[0].flatten()[rest].argsort(), ties[0].flatten()[rest].argsort())


def test_a_map_that_says_nothing_is_as_good_as_a_random_one() -> None:
    """It is one: equal pixels go in the order of the random map, and the noise that fills them in
    is the same."""
    nothing = data() | {
        "logits": np.tile(np.array([-2, 2], np.float16), (6, 1))
    }  # what the network sees speaks against
    found = faithfulness(CornerNetwork(), **nothing, count=6)
    assert found["map"] == found["random"]
    assert found["difference"] == {"mean": 0, "low": 0, "high": 0}


@pytest.mark.numerical
def test_combined_is_the_library_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """ROADCombined of the same maps, both without noise; of maps without equal pixels, which it
    cannot rank."""
    monkeypatch.setattr(NoisyLinearImputer.__init__, "__defaults__", (0.0, neighbors_weights))
    rng = np.random.default_rng(0)
    maps = rng.random((3, 16, 16), np.float32)
    monkeypatch.setattr("tinylab.explain.road.gradcam", lambda *_, **__: {"layer1": maps})
    monkeypatch.setattr("tinylab.explain.road.sample", lambda *_: np.arange(3))
    images = rng.integers(0, 255, (3, 64, 64, 3), dtype=np.uint8)
    logits = np.array([[1, 0], [0, 1], [1, 0]], np.float16)
    what = data(3, images) | {"logits": logits, "stage": "layer1"}
    found = faithfulness(CornerNetwork(), **what, count=3)
    targets = [ClassifierOutputSoftmaxTarget(int(row.argmax())) for row in logits]
    theirs = ROADCombined()(quarter(torch.from_numpy(images)), maps, targets, CornerNetwork())
    assert np.abs(theirs).min() > 1e-4
    assert found["combined"]["mean"] == pytest.approx(float(theirs.mean()), abs=1e-6)


def test_the_predicted_class_is_watched_in_images_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The rows that were drawn and their own logits, in batches of any size."""
    seen = []

    def noted(
        network: nn.Module, inputs: torch.Tensor, classes: torch.Tensor, *rest, **options
    ) -> dict:
        seen.extend(zip(inputs, classes.tolist(), strict=True))
        return gradcam(network, inputs, classes, *rest, **options)

    monkeypatch.setattr("tinylab.explain.road.gradcam", noted)
    monkeypatch.setattr("tinylab.explain.road.BATCH", 2)
    monkeypatch.setattr("tinylab.explain.road.PERCENTILES", (50, 90))
    what = data(10)
    images = what["dataset"].images
    images += np.arange(10, dtype=np.uint8)[:, None, None, None]
    what |= {"rows": np.arange(4, 10), "logits": np.eye(2, dtype=np.float16)[[0, 0, 1, 0, 1, 1]]}
    found = faithfulness(CornerNetwork(), **what, count=5)
    assert found["images"] == len(seen) == 5
    assert found["percentiles"] == [50, 90]
    for position, (pixels, index) in zip(sample(6, 5).tolist(), seen, strict=True):
        assert torch.equal(
            pixels, quarter(torch.from_numpy(what["dataset"].images[[4 + position]]))[0]
        )
        assert index == [0, 0, 1, 0, 1, 1][position]


@pytest.mark.parametrize(
    "surroundings",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)],
)
def test_surroundings_and_wrappers_change_nothing(surroundings) -> None:
    model = CornerNetwork()
    plain = faithfulness(model, **data(2)) | {"seconds": 0}
    with surroundings():
        wrapped = faithfulness(torch.optim.swa_utils.AveragedModel(model), **data(2))
    assert wrapped | {"seconds": 0} == plain


def test_unknown_layers_are_refused() -> None:
    with pytest.raises(UserError, match="unknown layer 'fc'"):
        faithfulness(CornerNetwork(), **(data() | {"stage": "fc"}))
    with pytest.raises(UserError, match="count must be 0 or more, not -1"):
        faithfulness(CornerNetwork(), **data(), count=-1)

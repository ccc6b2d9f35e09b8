"""The network is torchvision's ResNet-18 but for its stem, and its file is readable by others and
refuses strangers."""

import dataclasses
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
import torchvision
from torch import nn

from tinylab.exceptions import UserError
from tinylab.model import BasicBlock, ResNet18, build_model, summary
from tinylab.recipe import Recipe
from tinylab.recipes import RECIPES, accurate, named, published
from tinylab.run.weights import load_weights, weights_file

WNIDS, NAMES = ("n1", "n2", "n3"), ("cat", "dog", "hen, biddy")


def write_weights(path: Path, model: nn.Module, recipe: Recipe) -> Path:
    path.write_bytes(weights_file(model, recipe, WNIDS, NAMES, {"test_top1": 12.5}, "c0ffee"))
    return path


def test_the_summary_is_the_published_one_character_for_character(repository: Path) -> None:
    assert summary() == (repository / "results" / "reference" / "model_summary.txt").read_text()


def test_the_network_has_the_published_number_of_parameters() -> None:
    assert sum(parameter.numel() for parameter in ResNet18().parameters()) == 11_271_432


@pytest.mark.numerical
def test_logits_equal_torchvisions_with_the_same_weights() -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(num_classes=200)
    theirs.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    theirs.maxpool = nn.Identity()
    for module in theirs.modules():  # as after training: nothing is 0, 1 or symmetric
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean):
                nn.init.normal_(tensor, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    ours = ResNet18()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        for training in (False, True):
            expected, logits = theirs.train(training)(images), ours.train(training)(images)
            assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-4)
            assert logits.std() > 0.1


def test_stage_four_still_sees_eight_by_eight() -> None:
    model, shapes = ResNet18(classes=3, width=2), []
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        stage.register_forward_hook(
            lambda _module, _inputs, output: shapes.append(tuple(output.shape[1:]))
        )
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 3)
    assert shapes == [(2, 64, 64), (4, 32, 32), (8, 16, 16), (16, 8, 8)]


def test_every_parameter_gets_a_gradient() -> None:
    torch.manual_seed(0)
    model = ResNet18(classes=5, width=16)
    nn.functional.cross_entropy(model(torch.randn(4, 3, 64, 64)), torch.arange(4)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_weights_are_a_function_of_the_seed_and_nothing_else(narrow: Recipe) -> None:
    torch.manual_seed(1)
    first = build_model(narrow, classes=3, seed=5).state_dict()
    torch.manual_seed(2)
    torch.rand(10)
    again, other = (build_model(narrow, classes=3, seed=seed).state_dict() for seed in (5, 6))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


def test_published_weights_are_pytorchs_own_to_the_last_bit(narrow: Recipe) -> None:
    torch.manual_seed(5)
    expected = ResNet18(classes=3, width=16).state_dict()
    model = build_model(narrow, classes=3, seed=5)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert {
        module.momentum for module in model.modules() if isinstance(module, nn.BatchNorm2d)
    } == {0.1}
    bound = (3 * 3 * 16) ** -0.5  # uniform by fan-in, written by hand
    weights = model.layer1[0].conv1.weight
    assert 0.98 * bound < weights.abs().max() <= bound


def test_he_initialisation_is_normal_by_fan_out(narrow: Recipe) -> None:
    model = build_model(replace(narrow, initialisation="kaiming"), classes=3, seed=5)
    plain = build_model(narrow, classes=3, seed=5).state_dict()
    convolutions = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            convolutions += 1
            weights, (height, width) = module.weight, module.kernel_size
            expected = (2 / (module.out_channels * height * width)) ** 0.5
            spread = (
                5 / (2 * weights.numel()) ** 0.5
            )  # five standard errors of a standard deviation
            assert weights.std().item() == pytest.approx(expected, rel=spread), name
            assert abs(weights.mean().item()) < 5 * expected / weights.numel() ** 0.5, name
            assert weights.is_contiguous(memory_format=torch.channels_last), name
    assert convolutions == 20
    values = model.layer4[1].conv2.weight.flatten()
    assert values.abs().max() > 3.5 * values.std()  # normal, not uniform
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, plain[name]) == (tensor.ndim != 4), name


def test_every_block_can_start_as_its_shortcut(narrow: Recipe) -> None:
    model = build_model(replace(narrow, zero_init_residual=True), classes=3, seed=5)
    plain = build_model(narrow, classes=3, seed=5).state_dict()
    different = {
        name for name, tensor in model.state_dict().items() if not torch.equal(tensor, plain[name])
    }
    assert different == {
        f"layer{stage}.{block}.bn2.weight" for stage in (1, 2, 3, 4) for block in (0, 1)
    }
    blocks = [module for module in model.modules() if isinstance(module, BasicBlock)]
    for block in blocks:
        images = torch.randn(2, block.conv1.in_channels, 8, 8)
        shortcut = images if block.downsample is None else block.downsample(images)
        assert torch.equal(block(images), shortcut.relu())


def test_batch_norm_takes_its_momentum_from_the_recipe(narrow: Recipe) -> None:
    model = build_model(replace(narrow, bn_momentum=0.3), classes=3, seed=5)
    layers = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(layers) == 20
    assert {layer.momentum for layer in layers} == {0.3}
    images = torch.randn(4, 3, 16, 16) + 5
    model(images)
    assert torch.allclose(
        layers[0].running_mean, 0.3 * model.conv1(images).mean((0, 2, 3)), atol=1e-6
    )


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_weights_of_every_recipe_can_be_loaded(tmp_path: Path, name: str) -> None:
    recipe = replace(named(name), width=16)
    model = build_model(recipe, classes=3, seed=0)
    loaded, metadata = load_weights(write_weights(tmp_path / "model.safetensors", model, recipe))
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.state_dict().items())
    assert metadata["recipe"]["name"] == name


def test_weights_whose_recipe_is_older_or_newer_than_this_version_can_be_loaded(
    tmp_path: Path, narrow: Recipe
) -> None:
    path = write_weights(tmp_path / "whole", build_model(narrow, 3, seed=0), narrow)
    with safetensors.safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for known in ({"width": 16}, json.loads(metadata["recipe"]) | {"unheard_of": 1}):
        safetensors.torch.save_file(
            tensors, tmp_path / "other", metadata | {"recipe": json.dumps(known)}
        )
        assert load_weights(tmp_path / "other")[1]["recipe"] == known


@pytest.mark.parametrize("recipe", [published(), accurate()], ids=["published", "accurate"])
def test_global_randomness_is_left_alone(recipe: Recipe) -> None:
    torch.manual_seed(0)
    expected = torch.rand(4)
    torch.manual_seed(0)
    build_model(replace(recipe, width=16), classes=3, seed=5)
    summary(classes=3, width=2)
    assert torch.equal(torch.rand(4), expected)


def test_the_model_computes_in_channels_last_memory(narrow: Recipe) -> None:
    model, layouts = build_model(narrow, classes=3, seed=0), []
    assert model.layer2[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    model.layer4.register_forward_hook(
        lambda _module, _inputs, output: layouts.append(
            output.is_contiguous(memory_format=torch.channels_last)
        )
    )
    for images in (torch.randn(2, 3, 64, 64), torch.randn(2, 64, 64, 3).permute(0, 3, 1, 2)):
        model(images)
    assert layouts == [True, True]


@pytest.mark.skipif(
    not hasattr(os, "fork"), reason="what may crash does so in a fork of this process"
)
@pytest.mark.parametrize("width", [1, 4, 8, 13, 16])
def test_a_narrow_network_trains_without_crashing(width: int) -> None:
    """oneDNN's channels-last kernels for fewer than 16 channels write where they should not (torch
    2.15, fp32)."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            model = ResNet18(classes=3, width=width)
            for count in (1, 12, 5):
                for _ in range(3):
                    model(torch.randn(count, 64, 64, 3).permute(0, 3, 1, 2)).sum().backward()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_the_summary_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Total params" in summary(classes=3, width=2)
    assert capsys.readouterr() == ("", "")


def test_weights_survive_the_file(tmp_path: Path, narrow: Recipe) -> None:
    model = build_model(narrow, classes=3, seed=0)
    model(torch.randn(4, 3, 64, 64))  # moves the batch-norm statistics
    loaded, metadata = load_weights(write_weights(tmp_path / "model.safetensors", model, narrow))
    assert not loaded.training
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert metadata["wnids"] == list(WNIDS)
    assert metadata["names"] == list(NAMES)
    assert metadata["metrics"] == {"test_top1": 12.5}
    assert metadata["recipe"] == json.loads(json.dumps(dataclasses.asdict(narrow)))


def test_others_can_read_the_file_without_this_project(tmp_path: Path, narrow: Recipe) -> None:
    path = write_weights(tmp_path / "model.safetensors", build_model(narrow, 3, seed=0), narrow)
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["wnids"]) == list(WNIDS)
    assert json.loads(metadata["mean"]) == [0.442] * 3
    assert json.loads(metadata["std"]) == [0.278] * 3
    assert json.loads(metadata["content_sha256"]) == "c0ffee"


def test_a_file_that_is_no_weights_file_is_refused(tmp_path: Path, narrow: Recipe) -> None:
    whole = write_weights(tmp_path / "whole", build_model(narrow, 3, seed=0), narrow).read_bytes()
    wider = ResNet18(classes=3, width=6).state_dict()
    with safetensors.safe_open(tmp_path / "whole", framework="pt") as file:
        metadata = file.metadata()
    strangers = {
        "empty": b"",
        "text": b"these are not weights, but a text that is longer than a header's length",
        "cut": whole[:-1],
        "no metadata": safetensors.torch.save({"fc.weight": torch.zeros(3, 4)}),
        "other shapes": safetensors.torch.save(wider, metadata),
        "other names": safetensors.torch.save({"fc.weight": torch.zeros(3, 4)}, metadata),
        "broken metadata": safetensors.torch.save(wider, metadata | {"recipe": "{"}),
        "strange metadata": safetensors.torch.save(wider, metadata | {"recipe": "[]"}),
    }
    for name, data in strangers.items():
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(UserError, match="does not hold weights that tinylab wrote"):
            load_weights(path)
    with pytest.raises(UserError, match="weights"):
        load_weights(tmp_path)  # a folder


def test_missing_weights_mean_an_unfinished_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.safetensors is missing: the run is not finished"):
        load_weights(tmp_path / "model.safetensors")


def test_rounded_weights_are_widened_and_a_wrong_hash_is_refused(
    tmp_path: Path, narrow: Recipe
) -> None:
    model = build_model(narrow, 3, seed=0)
    path = write_weights(tmp_path / "whole", model, narrow)
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    half = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in model.state_dict().items()
    }
    safetensors.torch.save_file(half, tmp_path / "half", metadata)
    loaded = load_weights(tmp_path / "half")[0].state_dict()
    for name, tensor in half.items():
        assert torch.equal(loaded[name], tensor.to(loaded[name].dtype))
    with pytest.raises(UserError, match="is damaged: it is not the file"):
        load_weights(path, "0" * 64)


def test_the_committed_network_is_the_record_s(repository: Path) -> None:
    (path,) = (repository / "weights").glob("*/model.safetensors")
    assert path.stat().st_size < 23e6
    model, metadata = load_weights(path)
    summary = json.loads((repository / "results" / path.parent.name / "summary.json").read_text())
    assert metadata["metrics"]["test_correct"] == summary["test_correct"]
    assert len(metadata["wnids"]) == model.fc.out_features == 200

"""A run is a function of its recipe, data and seed: however often it is stopped and continued."""

import csv
import importlib
import json
import re
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import assert_equal_runs
from torch.nn import functional as F

from tinylab.data.loader import make_loader
from tinylab.data.split import make_split
from tinylab.exceptions import RecipeFailed, Stopped, UserError
from tinylab.model import build_model
from tinylab.recipe import Recipe
from tinylab.recipes import published, smoke
from tinylab.run import checkpoint, environment
from tinylab.run.folder import Run
from tinylab.run.weights import load_weights
from tinylab.training import progress as progress_module
from tinylab.training import warm_up as warm_up_module
from tinylab.training.optim import schedule

train_module = importlib.import_module("tinylab.training.train")


def stop_at(at_each: Callable, moment: int, signals: tuple[int, ...] = (signal.SIGINT,)) -> None:
    """Send this process the signals after so many moments: steps, and batches of tests."""
    moments = iter(range(moment))

    def hook(_title: str) -> None:
        if next(moments, None) == moment - 1:
            for number in signals:
                signal.raise_signal(number)

    at_each(hook)


def normalised(images: np.ndarray | torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """Return the network's input for uint8 (B, 64, 64, 3), written out."""
    images = torch.as_tensor(images) / 255
    return ((images - torch.tensor(recipe.mean)) / torch.tensor(recipe.std)).permute(0, 3, 1, 2)


def test_two_runs_are_equal(train_tiny, finished_run, rich_reference, tmp_path) -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    assert_equal_runs(train_tiny(tmp_path / "again"), finished_run)
    assert_equal_runs(train_tiny(tmp_path / "rich", rich_reference.recipe), rich_reference)
    other = train_tiny(tmp_path / "other", seed=1)
    assert other.history[0]["train_loss"] != finished_run.history[0]["train_loss"]


def test_workers_do_not_change_a_bit(train_tiny, finished_run, at_each, tmp_path) -> None:
    stop_at(at_each, 2)
    with pytest.raises(Stopped, match="in epoch 1 after 2 steps; the same command continues"):
        train_tiny(tmp_path / "run", workers=2)
    assert_equal_runs(train_tiny(tmp_path / "run", workers=1), finished_run)


def test_training_against_a_plain_loop(tiny_dataset, narrow, train_tiny, tmp_path) -> None:
    """SGD with Nesterov momentum and weight decay by hand; small steps do not magnify rounding."""
    recipe = replace(narrow, max_learning_rate=2e-3, weight_decay=0.5)
    run = train_tiny(tmp_path / "run", recipe)
    rows = make_split(tiny_dataset, "merged").train
    loader = make_loader(tiny_dataset, rows, recipe, 0, torch.device("cpu"), 0)
    model = build_model(recipe, classes=3, seed=0).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    velocities = [torch.zeros_like(parameter) for parameter in model.parameters()]
    rates = iter(schedule(recipe, len(rows)))
    for epoch in (1, 2):
        losses, correct = [], 0
        for batch in loader.epoch(epoch):
            logits = model(normalised(batch.images, recipe))
            loss = F.cross_entropy(logits, batch.labels)
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            _, learning_rate, momentum = next(rates)
            with torch.no_grad():
                moved = zip(model.parameters(), gradients, velocities, strict=True)
                for parameter, gradient, velocity in moved:
                    pull = gradient + 0.5 * parameter
                    velocity.mul_(momentum).add_(pull)
                    parameter -= learning_rate * (pull + momentum * velocity)
            losses += [loss.item()] * len(batch.labels)
            correct += int((logits.argmax(dim=1) == batch.labels).sum())
        row = run.history[epoch - 1]
        assert row["train_loss"] == pytest.approx(np.mean(losses), rel=1e-3)
        assert row["train_top1"] == pytest.approx(100 * correct / 12)
    trained = load_weights(run.weights)[0].state_dict()
    for name, parameter in model.named_parameters():
        way = parameter.detach() - before[name]
        assert (trained[name] - parameter.detach()).norm() < 0.1 * way.norm(), name
    for name, buffer in model.named_buffers():
        assert torch.allclose(trained[name], buffer, rtol=1e-2, atol=1e-3), name


def test_tests_now_and_then_change_no_weight(train_tiny, rich, tmp_path, capsys) -> None:
    recipe = replace(rich, epochs=4)
    always = train_tiny(tmp_path / "always", recipe)
    run = train_tiny(tmp_path / "seldom", recipe, test_every=3, quiet=False)
    assert ["test_top1" in row for row in run.history] == [False, False, True, True]
    assert [row["eval_seconds"] > 0 for row in run.history] == [False, False, True, True]
    assert capsys.readouterr().out.count("  test: average loss") == 2
    for name in ("epoch", "learning_rate", "train_loss", "train_top1", "train_top5"):
        assert [row[name] for row in run.history] == [row[name] for row in always.history]
    np.testing.assert_array_equal(run.predictions["logits"], always.predictions["logits"])
    assert run.summary["flip_tta_top1"] == always.summary["flip_tta_top1"]


@pytest.mark.slow
def test_a_compiled_run(train_tiny, narrow, tmp_path) -> None:
    recipe = replace(narrow, drop_last=True, batch_size=6)  # one shape, one graph
    run, eager = (train_tiny(tmp_path / f"{each}", recipe, compiled=each) for each in (True, False))
    assert run.identity["compiled"] is True
    losses = [each.history[0]["train_loss"] for each in (run, eager)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert not any(name.startswith("_") for name in load_weights(run.weights)[0].state_dict())


def test_a_finished_folder_holds_what_it_should(finished_run, narrow) -> None:
    assert {path.name for path in finished_run.folder.iterdir()} == {
        "recipe.json", "run.json", "environment.json", "metrics.jsonl", "checkpoints",
        "model.safetensors", "predictions.npz", "summary.json", "SHA256SUMS",
    }  # fmt: skip
    saved, _ = checkpoint.load(finished_run.checkpoints)
    only_for_clocks = {*finished_run.environment} - {*saved["environment"]}
    assert only_for_clocks == {"compile_cache", "earlier_runs"}
    lines = (finished_run.folder / "metrics.jsonl").read_text().splitlines()
    rates = [rate for _, rate, _ in schedule(narrow, 12)]
    for number, line in enumerate(lines, start=1):
        row = json.loads(line)
        assert set(row) == {
            "epoch", "learning_rate", "train_loss", "train_top1", "train_top5", "test_loss",
            "test_top1", "test_top5", "test_correct", "test_total", "train_seconds",
            "train_cpu_seconds", "eval_seconds", "images_per_second", "skipped_steps",
        }  # fmt: skip
        assert row["learning_rate"] == rates[3 * (number - 1)]
        assert (row["epoch"], row["test_total"], row["train_top5"]) == (number, 6, 100)


def test_the_published_learning_rates(repository, tiny_dataset, tmp_path, monkeypatch) -> None:
    """A run of 30 epochs x 301 steps, but for the network."""

    def step(state, *_, **__) -> None:
        state.optimizer.step()
        state.scheduler.step()
        state.totals += 1
        state.step += 1

    loader = SimpleNamespace(
        steps=301, close=lambda: None, epoch=lambda *_: (None for _ in range(301))
    )
    monkeypatch.setattr(train_module, "train_step", step)
    monkeypatch.setattr(train_module, "make_loader", lambda *_, **__: loader)
    history = train_module.train(
        replace(published(), width=1, batch_size=12), tiny_dataset, folder=tmp_path / "run",
        device="cpu", precision="fp32", test_every=30, quiet=True,
    ).history  # fmt: skip
    with open(repository / "results" / "reference" / "published_run.csv", newline="") as file:
        logged = [float(row["lr_at_epoch_start"]) for row in csv.DictReader(file)]
    assert [row["learning_rate"] for row in history] == logged


def test_the_summary_follows_from_the_predictions(finished_run, tiny_dataset) -> None:
    summary, predictions = finished_run.summary, finished_run.predictions
    assert set(summary) == {
        "recipe", "protocol", "classes", "seed", "epochs", "train_images", "test_images",
        "train_loss", "train_top1", "test_loss", "test_top1", "test_top5", "test_correct",
        "flip_tta_top1", "parameters", "model_sha256", "set_up_seconds", "train_petaflop",
        "muon_petaflop", "train_seconds", "train_cpu_seconds", "eval_seconds", "stops",
        "time_to_accuracy_seconds", "cold_time_to_accuracy_seconds", "images_per_second",
        "skipped_steps",
    }  # fmt: skip
    rows, labels = make_split(tiny_dataset, "merged").test, predictions["labels"]
    np.testing.assert_array_equal(predictions["rows"], rows)
    np.testing.assert_array_equal(labels, tiny_dataset.labels[rows])
    assert predictions["logits"].dtype == np.float16
    logits = predictions["logits"].astype(np.float64)
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(6), labels]
    correct = int((logits.argmax(axis=1) == labels).sum())
    assert (summary["test_correct"], summary["test_top5"]) == (correct, 100)
    assert summary["test_top1"] == pytest.approx(100 * correct / 6)
    assert summary["test_loss"] == pytest.approx(losses.mean(), rel=1e-5)
    for name in ("train_loss", "train_top1", "test_loss", "test_top1", "test_top5", "test_correct"):
        assert summary[name] == finished_run.history[-1][name]
    expected = {"train_images": 12, "test_images": 6, "classes": 3, "epochs": 2, "stops": 0}
    assert summary.items() >= expected.items()


def test_the_weights_give_the_predictions_again(finished_run, rich_reference, tiny_dataset) -> None:
    for run in (finished_run, rich_reference):
        network, metadata = load_weights(run.weights)
        inputs = normalised(tiny_dataset.images[run.predictions["rows"]], run.recipe)
        with torch.inference_mode():
            logits, of_mirror_images = network(inputs), network(inputs.flip(3))
        np.testing.assert_allclose(run.predictions["logits"].astype(np.float32), logits, atol=0.02)
        hits = (logits + of_mirror_images).argmax(dim=1).numpy() == run.predictions["labels"]
        assert run.summary["flip_tta_top1"] == pytest.approx(100 * hits.mean())
        assert metadata["metrics"]["test_correct"] == run.summary["test_correct"]
    saved, _ = checkpoint.load(rich_reference.checkpoints)
    assert torch.equal(network.conv1.weight, saved["average"]["module.conv1.weight"])
    assert not torch.equal(network.conv1.weight, saved["model"]["conv1.weight"])


def test_a_test_without_memory_costs_no_epoch(train_tiny, at_each, tmp_path, finished_run) -> None:
    steps = []

    def hook(title: str) -> None:
        steps.append(title)
        if title == "test" and len(steps) == 4:
            raise RuntimeError("CUDA out of memory")

    at_each(hook)
    with pytest.raises(RecipeFailed, match="out of memory on cpu"):
        train_tiny(tmp_path / "run")
    assert_equal_runs(train_tiny(tmp_path / "run"), finished_run)
    assert steps.count("step") == 6  # two epochs of three: none is trained twice


def test_other_code_continues_a_run_only_if_told_to(
    train_tiny, at_each, tmp_path, monkeypatch, capfd
) -> None:
    """U7: half of a run by one augmentation, half by another, recorded as one."""
    folders = {"folder": tmp_path / "run", "mirror": tmp_path / "mirror"}
    stop_at(at_each, 2)
    with pytest.raises(Stopped):
        train_tiny(**folders)
    before = environment.SOURCE_SHA256
    monkeypatch.setattr(environment, "SOURCE_SHA256", "e" * 64)
    for folder in (folders["folder"], tmp_path / "a new machine's"):
        with pytest.raises(UserError, match=r"other code .* another --run.* --continue-anyway"):
            train_tiny(folder, mirror=folders["mirror"])
    run = train_tiny(**folders, continue_anyway=True, quiet=False)
    told = f"results may differ\n  source_sha256: {before[:12]} -> {'e' * 12}\n"
    assert told in capfd.readouterr().out
    earlier = [each["source_sha256"] for each in run.environment["earlier"]]
    assert [*earlier, run.environment["source_sha256"]] == [before, "e" * 64]
    monkeypatch.setattr(environment, "SOURCE_SHA256", "f" * 64)
    assert train_tiny(**folders).summary == run.summary  # a finished run is shown


def test_the_log_reads_like_the_published_one(train_tiny, tmp_path, monkeypatch, capfd) -> None:
    run = train_tiny(tmp_path / "run", quiet=False)
    out, err = capfd.readouterr()
    lines = [line for line in out.splitlines() if not line.startswith("this CPU trains")]
    device, precision, split, size, training, test, *_ = lines
    assert max(map(len, lines)) <= 79
    first = run.history[0]
    rate, loss = first["learning_rate"], first["train_loss"]
    correct, top1 = first["test_correct"], first["test_top1"]
    assert device.startswith("device: CPU (")
    assert precision == "precision: fp32: as asked for"
    assert split == "split: merged"
    assert size == "12 training and 6 test images, 3 classes, 3 steps an epoch"
    assert training.startswith(f"epoch 1/2: lr {rate:.5f}, loss {loss:.4f}, top-1 ")
    assert f"average loss {first['test_loss']:.4f}, accuracy {correct}/6 ({top1:.2f} %)" in test
    assert err == ""  # no progress bar where nobody watches

    def train_again(*_, **__) -> None:
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr(train_module, "train_step", train_again)
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*.*")}
    assert train_tiny(run.folder, quiet=False).summary == run.summary
    assert {path: path.stat().st_mtime_ns for path in before} == before
    out = capfd.readouterr().out
    assert f"{run.folder} is finished; this is its log\n{training}\n{test}\n" in out
    train_tiny(run.folder, quiet=True)
    assert capfd.readouterr() == ("", "")


def test_a_line_a_minute(train_tiny, rich, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(progress_module, "LINE_SECONDS", 0)
    train_tiny(tmp_path / "run", rich, quiet=False)
    text = capsys.readouterr().out
    line = r"^  epoch 1/2, step [123]/3: loss \d\.\d{4}, \d+ images/s, about \d+ min left$"
    assert len(re.findall(line, text, re.M)) == 3
    for title in ("test: 0 of 1", "test of mirror images: 0 of 1", "batch-norm statistics: 1"):
        assert f"\n  {title} batches\n" in text


def test_seconds_and_their_forecast(train_tiny, at_each, tmp_path, monkeypatch, capsys) -> None:
    """By a clock that moves by ten minutes at each step and each batch of a test."""
    now = [0]
    clock = SimpleNamespace(perf_counter=lambda: now[0], process_time=lambda: 2 * now[0])
    monkeypatch.setattr(train_module, "time", clock)
    monkeypatch.setattr(progress_module, "time", clock)
    at_each(lambda _: now.append(now.pop() + 600))
    stop_at(at_each, 1)
    with pytest.raises(Stopped):
        train_tiny(tmp_path / "run")
    run = train_tiny(tmp_path / "run", quiet=False)
    for name, seconds in (("train", 1800), ("train_cpu", 3600), ("eval", 600)):
        assert [row[f"{name}_seconds"] for row in run.history] == [seconds, seconds]
        assert run.summary[f"{name}_seconds"] == 2 * seconds
    assert (run.summary["time_to_accuracy_seconds"], run.summary["stops"]) == (3600 + 600, 1)
    # After three steps 9 images and the next epoch's, and 18 of tests at a third of the price.
    forecast = [line for line in capsys.readouterr().out.splitlines() if "CPU trains" in line]
    assert forecast == ["this CPU trains 0 images/s of 64 x 64 pixels: about 30 min"]


def test_a_stop_costs_no_bit(train_tiny, rich_reference, at_each, tmp_path, capsys) -> None:
    """One run, stopped at each kind of moment."""
    seen = []
    stops = {
        ("step", 1): (signal.SIGINT, "epoch 1 after 1 steps"),
        ("batch-norm statistics", 2): (signal.SIGTERM, "epoch 1 after 3 steps"),
        ("test", 2): (signal.SIGINT, "epoch 2 after 3 steps"),
        ("test of mirror images", 1): (signal.SIGTERM, "epoch 3 after 0 steps"),
    }

    def hook(title: str) -> None:
        seen.append(title)
        if (title, seen.count(title)) == moment:
            signal.raise_signal(stops[moment][0])

    at_each(hook)
    for moment, (number, where) in stops.items():
        seen.clear()
        with pytest.raises(Stopped, match=where) as stopped:
            train_tiny(tmp_path / "run", rich_reference.recipe, quiet=False)
        assert (seen[-1], stopped.value.signal) == (moment[0], number)
        assert capsys.readouterr().out.count("stopping after this step") == 1
        assert not Run(tmp_path / "run").finished
    moment = None
    seen.clear()
    run = train_tiny(tmp_path / "run", rich_reference.recipe, quiet=False)
    assert seen == ["test", "test of mirror images"]
    assert "continuing" in capsys.readouterr().out
    assert run.summary["stops"] == 4
    assert_equal_runs(run, rich_reference)


def test_a_recipe_trains_on_its_own_split(
    tiny_dataset, narrow, train_tiny, tmp_path, capsys
) -> None:
    own = replace(narrow, name="official", split="official")
    run = train_tiny(tmp_path / "run", own, quiet=False)
    assert run.identity["protocol"] == run.recipe.split == "official"
    assert run.summary["test_images"] == len(tiny_dataset) - tiny_dataset.train_count
    assert "split: official\n" in capsys.readouterr().out
    other = train_tiny(tmp_path / "other", own, split="merged", quiet=False)
    assert other.identity["protocol"] == other.recipe.split == "merged"
    assert "split: merged; official is for official\n" in capsys.readouterr().out


def test_a_second_signal_ends_at_once(train_tiny, at_each, tmp_path) -> None:
    stop_at(at_each, 1, (signal.SIGINT, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt) as stopped:
        train_tiny(tmp_path / "run")
    assert not isinstance(stopped.value, Stopped)
    assert checkpoint.load(tmp_path / "run" / "checkpoints") == (None, None)


def test_a_long_epoch_is_saved_within(train_tiny, at_each, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(train_module, "SAVE_SECONDS", 0)
    saved, folder = [], tmp_path / "run" / "checkpoints"
    at_each(lambda _: saved.append(checkpoint.load(folder)[0]))
    train_tiny(tmp_path / "run")
    assert [state["step"] for state in saved[1:5]] == [1, 2, 3, 0]


def test_a_mirror_continues_the_run(train_tiny, finished_run, at_each, tmp_path, capsys) -> None:
    """In a thread: Python allows signal handlers in the main one only."""
    mirror, run = tmp_path / "mirror", Run(tmp_path / "run")
    stop_at(at_each, 6)
    with pytest.raises(Stopped):
        train_tiny(run.folder, mirror=mirror)
    shutil.rmtree(run.checkpoints)
    options = {"mirror": mirror, "quiet": False}
    thread = threading.Thread(target=train_tiny, args=(run.folder,), kwargs=options)
    thread.start()
    thread.join()
    assert str(mirror) in capsys.readouterr().out
    assert_equal_runs(run, finished_run)


def test_a_run_of_an_older_version_continues(train_tiny, rich_reference, at_each, tmp_path) -> None:
    """It counted three kinds of skipped steps, no processor time, and totals by process."""
    run, recipe = Run(tmp_path / "run"), rich_reference.recipe
    stop_at(at_each, 2)
    with pytest.raises(Stopped):
        train_tiny(run.folder, recipe)
    state, _ = checkpoint.load(run.checkpoints)
    del state["epoch_cpu_seconds"], state["skipped"]
    halves = torch.stack([state["totals"] * 0.25, state["totals"] * 0.75])
    state |= {"skips": torch.zeros(3, dtype=torch.int64), "totals": halves}
    for _ in range(2):  # the newest, and the one before it
        checkpoint.save(run.checkpoints, state)
    assert_equal_runs(train_tiny(run.folder, recipe), rich_reference)
    assert "train_cpu_seconds" not in run.history[0]
    assert run.summary["train_cpu_seconds"] is None


@pytest.mark.parametrize(
    ("changes", "options", "named"),
    [
        ({}, {"seed": 1}, "seed 0 -> 1"),
        ({}, {"split": "official"}, "protocol merged -> official"),
        ({"epochs": 5}, {}, "epochs 2 -> 5"),
        ({"micro_batch": 2}, {}, "micro_batch None -> 2"),
    ],
)
def test_the_folder_of_another_run_is_refused(
    train_tiny, finished_run, narrow, changes, options, named
) -> None:
    with pytest.raises(UserError, match=rf"{named}.*choose another --run"):
        train_tiny(finished_run.folder, replace(narrow, **changes), **options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"seed": -1}, "seed"),
        ({"workers": 1000}, "workers"),
        ({"limit_classes": 1}, "limit-classes"),
        ({"split": "random"}, "split"),
        ({"precision": "fp16"}, "fp16"),
        ({"test_every": 0}, "test-every must be at least 1"),
        ({"mirror": Path("run/checkpoints")}, "the run's own folder: choose another --mirror"),
        ({"recipe": replace(smoke(), batch_size=13)}, "batch-size 13 is more than the 12 training"),
    ],
)
def test_an_impossible_run_is_refused_before_its_folder_is_made(
    train_tiny, tmp_path, monkeypatch, options, named
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=named):
        train_tiny(Path("run"), **options)
    assert list(tmp_path.iterdir()) == []


def test_a_compiler_that_fails_is_refused_in_one_line(train_tiny, tmp_path, monkeypatch) -> None:
    def fail(*_, **__) -> None:
        raise torch._dynamo.exc.TorchDynamoException("g++: no space\nand much more")

    monkeypatch.setattr(warm_up_module, "train_step", fail)
    line = r"^torch.compile fails here \(g\+\+: no space\): leave --compile out$"
    with pytest.raises(UserError, match=line):
        train_tiny(tmp_path / "run", compiled=True)
    assert not Run(tmp_path / "run").begun


@pytest.mark.parametrize(
    ("after", "look_seconds", "stops", "message"),
    [
        (1, 0, False, "not finite in epoch 2, up to step 2: .* lower max-learning-rate$"),
        (1, 60, False, "not finite in epoch 2, up to step 3: .* lower max-learning-rate$"),
        (3, 60, False, "^loss or weights are not finite in epoch 2, up to step 3: "),
        (3, 60, True, "^loss or weights are not finite in epoch 2, up to step 3: "),
    ],
)
def test_numbers_that_are_not_finite_end_the_run(
    train_tiny, finished_run, tmp_path, after, look_seconds, stops, message
) -> None:
    """Within an epoch, at its end, in the test, at a stop: after the last update no loss tells."""
    real, run = train_module.train_step, Run(tmp_path / "run")

    def poison(state, *arguments, **options) -> None:
        real(state, *arguments, **options)
        if (state.epoch, state.step) == (2, after):
            torch.nn.init.constant_(state.model.conv1.weight, float("nan"))
            if stops:
                signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(train_module, "train_step", poison)
        patched.setattr(progress_module, "LOOK_SECONDS", look_seconds)
        with pytest.raises(RecipeFailed, match=message):
            train_tiny(run.folder)
    saved, _ = checkpoint.load(run.checkpoints)
    assert (saved["epoch"], saved["step"], run.finished) == (2, 0, False)
    assert all(torch.isfinite(tensor).all() for tensor in saved["model"].values())
    assert_equal_runs(train_tiny(run.folder), finished_run)

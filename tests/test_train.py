"""A run is a function of its recipe, data and seed: however often it is stopped, killed or started again."""

import csv
import itertools
import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import assert_equal_runs
from reliability.harness import moments, send

from tinylab.data.dataset import Dataset
from tinylab.data.loader import Batch, TrainingBatches, evaluation_batch_size
from tinylab.data.split import make_split
from tinylab.exceptions import UserError
from tinylab.model import build_model
from tinylab.recipe import Recipe
from tinylab.run import checkpoint
from tinylab.run.environment import choose
from tinylab.run.folder import Run
from tinylab.run.weights import load_weights
from tinylab.training import train as train_module
from tinylab.training.step import TrainState, inference, new_state, train_step
from tinylab.training.train import Stopped, schedule, train

TrainTiny = Callable[..., Run]


@pytest.fixture
def at_moment(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], None]], None]:
    """Calls a function, with a number counted from 0, after every step and before every test batch."""
    return moments(monkeypatch)


# --- What a run computes ----------------------------------------------------------------------------------------------


def test_two_runs_are_equal_in_every_bit(
    train_tiny: TrainTiny, finished_run: Run, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    assert_equal_runs(train_tiny(tmp_path / "again"), finished_run)


def test_another_seed_is_another_run(
    train_tiny: TrainTiny, finished_run: Run, tmp_path: Path
) -> None:
    other = train_tiny(tmp_path / "other", seed=1)
    assert other.history[0]["train_loss"] != finished_run.history[0]["train_loss"]


def test_worker_processes_do_not_change_a_bit(
    train_tiny: TrainTiny, finished_run: Run, tmp_path: Path
) -> None:
    assert_equal_runs(train_tiny(tmp_path / "helped", workers=2), finished_run)


def test_training_against_a_plain_loop(
    tiny_dataset: Dataset, narrow: Recipe, train_tiny: TrainTiny, tmp_path: Path
) -> None:
    """The same optimisation written out: SGD with Nesterov momentum and weight decay by hand."""
    recipe = replace(
        narrow, max_learning_rate=2e-3, weight_decay=0.5
    )  # small steps: rounding is not blown up
    run = train_tiny(tmp_path / "run", recipe)
    rows = make_split(tiny_dataset, "merged").train
    batches = TrainingBatches(tiny_dataset, rows, recipe, seed=0)
    model = build_model(recipe, classes=3, seed=0).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    velocities = [torch.zeros_like(parameter) for parameter in model.parameters()]
    rates = iter(schedule(recipe, len(rows)))
    for epoch in (1, 2):
        losses, correct = [], 0
        for step in range(3):
            images, labels = batches[epoch, step]
            logits = model(((images / 255 - 0.442) / 0.278).permute(0, 3, 1, 2))
            loss = torch.nn.functional.cross_entropy(logits, labels)
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            _, learning_rate, momentum = next(rates)
            with torch.no_grad():
                for parameter, gradient, velocity in zip(
                    model.parameters(), gradients, velocities, strict=True
                ):
                    pull = gradient + 0.5 * parameter
                    velocity.mul_(momentum).add_(pull)
                    parameter -= learning_rate * (pull + momentum * velocity)
            losses += [loss.item()] * len(labels)
            correct += int((logits.argmax(dim=1) == labels).sum())
        row = run.history[epoch - 1]
        assert row["train_loss"] == pytest.approx(np.mean(losses), rel=1e-3)
        assert row["train_top1"] == pytest.approx(100 * correct / 12)
    trained = load_weights(run.weights)[0].state_dict()
    for name, parameter in model.named_parameters():
        way = parameter.detach() - before[name]
        assert (trained[name] - parameter.detach()).norm() < 0.1 * way.norm(), name
    for name, buffer in model.named_buffers():
        assert torch.allclose(trained[name], buffer, rtol=1e-2, atol=1e-3), name


def test_a_step_counts_losses_and_hits(narrow: Recipe) -> None:
    compute = choose("cpu", "fp32")
    state = new_state(narrow, classes=12, seed=0, steps_per_epoch=3, compute=compute)
    images = torch.randint(
        0, 256, (9, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    labels = torch.arange(9)
    expected = np.zeros(4)
    for count in (9, 4):
        with torch.no_grad():
            copy = build_model(narrow, classes=12, seed=0).train()
            copy.load_state_dict(state.model.state_dict())
            logits = (
                copy(((images[:count] / 255 - 0.442) / 0.278).permute(0, 3, 1, 2)).double().numpy()
            )
        ranking = np.argsort(-logits, axis=1)
        hits = ranking == labels[:count, None].numpy()
        losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(count), labels[:count]]
        expected += [losses.sum(), hits[:, 0].sum(), hits[:, :5].sum(), count]
        train_step(state, narrow, compute, Batch(images[:count], labels[:count]))
    assert state.totals.tolist() == pytest.approx(expected.tolist(), rel=1e-4)
    assert 0 < expected[2] < 13
    assert (state.step, state.skips.tolist()) == (2, [0, 0, 0])


def test_a_network_learns(train_tiny: TrainTiny, narrow: Recipe, tmp_path: Path) -> None:
    history = train_tiny(tmp_path / "run", replace(narrow, epochs=12)).history
    assert history[-1]["train_loss"] < 0.5 * history[0]["train_loss"]
    assert history[-1]["test_top1"] > 80


def test_one_step_in_all_is_a_run(
    tiny_dataset: Dataset, narrow: Recipe, train_tiny: TrainTiny, tmp_path: Path
) -> None:
    run = train_tiny(tmp_path / "run", replace(narrow, epochs=1, batch_size=8), limit_classes=2)
    assert run.finished
    assert run.summary["train_images"] == 8
    assert len(run.history) == 1


@pytest.mark.parametrize("epochs", [3, 4])
def test_very_few_steps_are_a_run(
    train_tiny: TrainTiny, narrow: Recipe, tmp_path: Path, epochs: int
) -> None:
    assert train_tiny(tmp_path / "run", replace(narrow, epochs=epochs, batch_size=12)).finished


def test_bf16_trains_too(train_tiny: TrainTiny, tmp_path: Path) -> None:
    run = train_tiny(tmp_path / "run", precision="bf16")
    assert run.identity["precision"] == "bf16"
    tensors = load_weights(run.weights)[0].state_dict().values()
    assert {tensor.dtype for tensor in tensors} == {torch.float32, torch.int64}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_a_step_never_waits_for_the_gpu(narrow: Recipe, precision: str) -> None:
    compute = choose("cuda", precision)
    state = new_state(narrow, classes=3, seed=0, steps_per_epoch=3, compute=compute)
    images = torch.zeros(5, 64, 64, 3, dtype=torch.uint8, device="cuda")
    labels = torch.zeros(5, dtype=torch.int64, device="cuda")
    for waits in ("default", "error"):  # the first step allocates and chooses algorithms
        torch.cuda.set_sync_debug_mode(waits)
        try:
            train_step(state, narrow, compute, Batch(images, labels))
        finally:
            torch.cuda.set_sync_debug_mode("default")


# --- What a run writes ------------------------------------------------------------------------------------------------


def test_a_finished_folder_holds_what_it_should(finished_run: Run) -> None:
    names = {path.name for path in finished_run.folder.iterdir()}
    assert names == {
        "recipe.json", "run.json", "environment.json", "metrics.jsonl", "checkpoints", "model.safetensors",
        "predictions.npz", "summary.json", "SHA256SUMS",
    }  # fmt: skip


def test_metrics_have_a_line_per_epoch(finished_run: Run, narrow: Recipe) -> None:
    lines = [
        json.loads(line)
        for line in (finished_run.folder / "metrics.jsonl").read_text().splitlines()
    ]
    assert lines == finished_run.history
    rates = [rate for _, rate, _ in schedule(narrow, 12)]
    for number, line in enumerate(lines, start=1):
        assert set(line) == {
            "epoch", "learning_rate", "train_loss", "train_top1", "train_top5", "test_loss", "test_top1", "test_top5",
            "test_correct", "test_total", "train_seconds", "train_cpu_seconds", "eval_seconds", "images_per_second",
            "skipped_steps",
        }  # fmt: skip
        assert line["epoch"] == number
        assert line["learning_rate"] == rates[3 * (number - 1)]
        assert line["test_top1"] == pytest.approx(100 * line["test_correct"] / 6)
        assert line["test_total"] == 6
        assert line["train_top5"] == 100  # of three classes
        assert line["train_seconds"] > 0
        assert line["images_per_second"] == pytest.approx(12 / line["train_seconds"], rel=0.05)


def test_the_published_learning_rates_stand_in_the_history(
    repository: Path, tiny_dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of 30 epochs x 301 steps, but for the network."""

    def step(state: train_module.TrainState, *_: object) -> None:
        state.optimizer.step()
        state.scheduler.step()
        state.totals += 1
        state.step += 1

    class Loader:
        steps = 301

        def close(self) -> None:
            pass

        def epoch(self, _epoch: int, start_step: int) -> Iterator:
            yield from [(None, None)] * (301 - start_step)

    from tinylab.recipes import published

    monkeypatch.setattr(train_module, "train_step", step)
    monkeypatch.setattr(train_module, "make_loader", lambda *_: Loader())
    monkeypatch.setattr(train_module, "_check", lambda *_: None)  # fewer images than a batch
    options = {"folder": tmp_path / "run", "device": "cpu", "precision": "fp32", "quiet": True}
    history = train(replace(published(), width=1), tiny_dataset, **options).history
    with open(repository / "results" / "reference" / "published_run.csv", newline="") as file:
        logged = [float(row["lr_at_epoch_start"]) for row in csv.DictReader(file)]
    assert [row["learning_rate"] for row in history] == logged


def test_the_summary_follows_from_the_predictions(finished_run: Run, tiny_dataset: Dataset) -> None:
    summary, predictions = finished_run.summary, finished_run.predictions
    rows = make_split(tiny_dataset, "merged")
    np.testing.assert_array_equal(predictions["rows"], rows.test)
    np.testing.assert_array_equal(predictions["labels"], tiny_dataset.labels[rows.test])
    assert predictions["logits"].dtype == np.float16
    logits = predictions["logits"].astype(np.float64)
    correct = int((logits.argmax(axis=1) == predictions["labels"]).sum())
    own = logits[np.arange(6), predictions["labels"]]
    assert summary["test_correct"] == correct
    assert summary["test_top1"] == pytest.approx(100 * correct / 6)
    assert summary["test_top5"] == 100
    assert summary["test_loss"] == pytest.approx(
        (np.log(np.exp(logits).sum(axis=1)) - own).mean(), rel=1e-5
    )
    last = finished_run.history[-1]
    for name in ("train_loss", "train_top1", "test_loss", "test_top1", "test_top5", "test_correct"):
        assert summary[name] == last[name]
    assert (summary["train_images"], summary["test_images"], summary["classes"]) == (12, 6, 3)
    assert (summary["epochs"], summary["seed"], summary["protocol"], summary["stops"]) == (
        2,
        0,
        "merged",
        0,
    )
    seconds = [row["train_seconds"] for row in finished_run.history]
    assert summary["train_seconds"] == pytest.approx(sum(seconds), abs=0.002)
    assert summary["time_to_accuracy_seconds"] == pytest.approx(
        sum(seconds) + last["eval_seconds"], abs=0.003
    )


def test_the_weights_give_the_predictions_again(
    finished_run: Run, tiny_dataset: Dataset, narrow: Recipe
) -> None:
    model, metadata = load_weights(finished_run.weights, tiny_dataset.wnids)
    images = torch.from_numpy(tiny_dataset.images[finished_run.predictions["rows"]])
    with torch.inference_mode():
        logits = model(((images / 255 - 0.421) / 0.278).permute(0, 3, 1, 2))
    np.testing.assert_allclose(
        finished_run.predictions["logits"].astype(np.float32), logits, atol=0.02
    )
    assert metadata["metrics"]["test_correct"] == finished_run.summary["test_correct"]


def test_the_log_reads_like_the_published_one(
    train_tiny: TrainTiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train_tiny(tmp_path / "run", quiet=False)
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].startswith("device: CPU (")
    assert "12 training and 6 test images, 3 classes, 3 steps an epoch" in lines[1]
    assert lines[2].startswith("this CPU trains ")
    first = run.history[0]
    assert lines[3].startswith(
        f"epoch 1/2  learning rate {first['learning_rate']:.6f}  loss {first['train_loss']:.4f}  "
    )
    correct, top1 = first["test_correct"], first["test_top1"]
    assert f"average loss {first['test_loss']:.4f}, accuracy {correct}/6 ({top1:.2f} %)" in lines[4]
    assert err == ""  # no progress bar where nobody watches


def test_a_quiet_run_prints_nothing(
    train_tiny: TrainTiny, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train_tiny(tmp_path / "run", quiet=True)
    assert capfd.readouterr() == ("", "")


def test_a_finished_run_returns_at_once_and_shows_its_log(
    train_tiny: TrainTiny,
    finished_run: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def trained_again(*_: object) -> None:
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr(train_module, "train_step", trained_again)
    before = {path: path.stat().st_mtime_ns for path in finished_run.folder.rglob("*.*")}
    again = train_tiny(finished_run.folder, quiet=False)
    out = capsys.readouterr().out
    assert again.summary == finished_run.summary
    assert "is finished" in out
    assert f"accuracy {finished_run.summary['test_correct']}/6" in out
    assert out.count("epoch ") == 2
    assert {path: path.stat().st_mtime_ns for path in before} == before


# --- Stopping and continuing ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(train_tiny: TrainTiny, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An undisturbed run that tests in small batches, as the disturbed ones do."""
    with pytest.MonkeyPatch.context() as patched:
        moments(patched)
        return train_tiny(tmp_path_factory.mktemp("reference") / "run")


def test_a_stop_between_the_last_epoch_and_the_end_costs_an_evaluation_only(
    train_tiny: TrainTiny,
    reference: Run,
    at_moment: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def killed(*_: object) -> None:
        raise RuntimeError("killed")

    at_moment(lambda _: None)
    with monkeypatch.context() as patched:
        patched.setattr(train_module, "_finish", killed)
        with pytest.raises(RuntimeError, match="killed"):
            train_tiny(tmp_path / "run")
    assert not Run(tmp_path / "run").finished
    done = []
    at_moment(done.append)
    assert_equal_runs(train_tiny(tmp_path / "run"), reference)
    assert len(done) == 4


@pytest.mark.parametrize("name", ["predictions.npz", "model.safetensors", "summary.json"])
def test_a_full_disk_at_the_very_end_can_be_repeated(
    train_tiny: TrainTiny,
    finished_run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    real = os.replace

    def full(source: Path, target: Path) -> None:
        if Path(target).name == name:
            raise OSError(28, "No space left on device")
        real(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(UserError, match=rf"{name}.*No space left"):
            train_tiny(tmp_path / "run")
    assert not Run(tmp_path / "run").finished
    assert_equal_runs(train_tiny(tmp_path / "run"), finished_run)


def test_a_second_signal_ends_at_once(
    train_tiny: TrainTiny, at_moment: Callable, tmp_path: Path
) -> None:
    at_moment(lambda now: [send(signal.SIGINT), send(signal.SIGINT)] if now == 1 else None)
    with pytest.raises(KeyboardInterrupt) as stopped:
        train_tiny(tmp_path / "run")
    assert not isinstance(stopped.value, Stopped)
    assert checkpoint.load(tmp_path / "run" / "checkpoints") == (None, None)


def test_a_long_epoch_is_saved_within(
    train_tiny: TrainTiny, at_moment: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "SAVE_SECONDS", 0)
    saved = []
    at_moment(lambda _: saved.append(checkpoint.load(tmp_path / "run" / "checkpoints")[0]))
    train_tiny(tmp_path / "run")
    assert [(state["epoch"], state["step"]) for state in saved[1:5]] == [
        (1, 1),
        (1, 2),
        (1, 3),
        (1, 3),
    ]


def test_seconds_are_of_one_epoch_and_add_up_over_a_stop(
    train_tiny: TrainTiny, at_moment: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0]

    def tick(_now: int) -> None:
        """Every step and every test batch takes a second; the run is stopped after its first."""
        clock[0] += 1
        if clock[0] == 1:
            send(signal.SIGINT)

    monkeypatch.setattr(
        train_module,
        "time",
        SimpleNamespace(perf_counter=lambda: clock[0], process_time=lambda: 2 * clock[0]),
    )
    at_moment(tick)
    with pytest.raises(Stopped):
        train_tiny(tmp_path / "run")
    run = train_tiny(tmp_path / "run")
    assert [row["train_seconds"] for row in run.history] == [3, 3]
    assert [row["train_cpu_seconds"] for row in run.history] == [6, 6]
    assert [row["eval_seconds"] for row in run.history] == [2, 2]
    assert [row["images_per_second"] for row in run.history] == [4, 4]
    assert (run.summary["train_seconds"], run.summary["eval_seconds"]) == (6, 4)
    assert run.summary["train_cpu_seconds"] == 12
    assert run.summary["time_to_accuracy_seconds"] == 6 + 2
    assert run.summary["images_per_second"] == 4


def test_a_run_continues_in_a_thread(
    train_tiny: TrainTiny, finished_run: Run, tmp_path: Path
) -> None:
    """Python allows signal handlers in the main thread only; a run elsewhere does without."""
    import threading

    thread = threading.Thread(target=train_tiny, args=(tmp_path / "run",))
    thread.start()
    thread.join()
    assert_equal_runs(Run(tmp_path / "run"), finished_run)


def test_the_previous_checkpoint_serves_when_the_last_is_damaged(
    train_tiny: TrainTiny,
    reference: Run,
    at_moment: Callable,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    at_moment(
        lambda now: send(signal.SIGINT) if now == 6 else None
    )  # one checkpoint after epoch 1, one within 2
    with pytest.raises(Stopped):
        train_tiny(tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / checkpoint.NEWEST
    newest.write_bytes(newest.read_bytes()[:-100])
    at_moment(lambda _: None)
    assert_equal_runs(train_tiny(tmp_path / "run", quiet=False), reference)
    out = capsys.readouterr().out
    assert (
        f"note: {newest} is damaged; continuing from {newest.with_name(checkpoint.PREVIOUS)}\n"
        in out
    )
    assert "in epoch 2 after 0 of its steps" in out


def test_a_metrics_line_without_its_checkpoint_goes(
    train_tiny: TrainTiny, reference: Run, at_moment: Callable, tmp_path: Path
) -> None:
    at_moment(lambda now: send(signal.SIGINT) if now == 6 else None)
    with pytest.raises(Stopped):
        train_tiny(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    at_moment(lambda _: None)
    assert_equal_runs(train_tiny(tmp_path / "run"), reference)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"seed": 1}, "seed 0 -> 1"),
        ({"split": "official"}, "protocol merged -> official"),
        ({"limit_classes": 2}, "classes 3 -> 2"),
    ],
)
def test_the_folder_of_another_run_is_refused(
    train_tiny: TrainTiny, finished_run: Run, options: dict, named: str
) -> None:
    with pytest.raises(UserError, match=rf"{named}.*choose another --run"):
        train_tiny(finished_run.folder, **options)


def test_a_longer_run_is_another_run(
    train_tiny: TrainTiny, finished_run: Run, narrow: Recipe
) -> None:
    with pytest.raises(UserError, match="epochs 2 -> 5"):
        train_tiny(finished_run.folder, replace(narrow, epochs=5))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"workers": -1}, "workers"),
        ({"workers": 1000}, "workers"),
        ({"limit_classes": 1}, "limit-classes"),
        ({"split": "random"}, "split"),
        ({"device": "tpu"}, "device"),
        ({"precision": "fp16"}, "fp16"),
        ({"test_every": 0}, "test-every must be at least 1"),
    ],
)
def test_an_impossible_run_is_refused_before_its_folder_is_made(
    train_tiny: TrainTiny, tmp_path: Path, options: dict, named: str
) -> None:
    with pytest.raises(UserError, match=named):
        train_tiny(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


# --- Everything that the target recipes are made of ------------------------------------------------------------------


def test_rich_runs_are_equal_in_every_bit(
    train_tiny: TrainTiny, rich_reference: Run, tmp_path: Path
) -> None:
    assert_equal_runs(train_tiny(tmp_path / "again", rich_reference.recipe), rich_reference)


def test_the_weights_saved_are_the_average_with_its_own_statistics(
    train_tiny: TrainTiny, rich: Recipe, tiny_dataset: Dataset, tmp_path: Path
) -> None:
    run = train_tiny(tmp_path / "run", rich)
    saved, _ = checkpoint.load(run.checkpoints)
    weights = load_weights(run.weights)[0].state_dict()
    assert torch.equal(weights["conv1.weight"], saved["average"]["module.conv1.weight"])
    assert not torch.equal(weights["conv1.weight"], saved["model"]["conv1.weight"])
    assert not torch.allclose(
        weights["bn1.running_mean"], saved["model"]["bn1.running_mean"], rtol=1e-3
    )
    rows = run.predictions["rows"]
    network = load_weights(run.weights)[0]
    with torch.no_grad():
        images = torch.from_numpy(tiny_dataset.images[rows])
        logits = network(
            ((images / 255 - torch.tensor(rich.mean)) / torch.tensor(rich.std)).permute(0, 3, 1, 2)
        )
    assert np.allclose(run.predictions["logits"], logits.numpy(), atol=2e-3)


def test_a_micro_batch_is_part_of_the_recipe(
    train_tiny: TrainTiny, narrow: Recipe, finished_run: Run, tmp_path: Path
) -> None:
    """Batch norm sees the pieces, so a cut run differs."""
    recipe = replace(narrow, micro_batch=2)
    cut = train_tiny(tmp_path / "cut", recipe)
    assert cut.recipe.micro_batch == 2
    assert cut.history[0]["train_loss"] != finished_run.history[0]["train_loss"]
    with pytest.raises(UserError, match="micro_batch 2 -> None"):
        train_tiny(tmp_path / "cut")
    assert_equal_runs(train_tiny(tmp_path / "again", recipe), cut)


def test_a_run_of_an_older_version_continues(
    train_tiny: TrainTiny, rich: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It kept the micro-batch beside the recipe, in run.json, and derived Muon's decay."""
    decay = rich.weight_decay * rich.max_learning_rate / 0.02 / (1 - rich.base_momentum)
    recipe = replace(rich, optimizer="muon", muon_weight_decay=decay, micro_batch=3)
    expected = train_tiny(tmp_path / "undisturbed", recipe)
    real, calls = train_module.train_step, itertools.count()

    def stopping(*arguments: object) -> None:
        real(*arguments)
        if next(calls) == 3:
            send(signal.SIGTERM)

    monkeypatch.setattr(train_module, "train_step", stopping)
    with pytest.raises(Stopped):
        train_tiny(tmp_path / "run", recipe)
    monkeypatch.undo()
    run = Run(tmp_path / "run")
    fields = json.loads((run.folder / "recipe.json").read_text())
    del fields["muon_weight_decay"], fields["micro_batch"]
    run.write("recipe.json", fields)
    run.write("run.json", run.identity | {"micro_batch": 3})
    state, _ = checkpoint.load(run.checkpoints)
    del state["run"]["muon_weight_decay"], state["epoch_cpu_seconds"]
    for _ in range(2):  # the newest, and the one before it
        checkpoint.save(run.checkpoints, state)
    assert run.recipe == recipe
    assert_equal_runs(train_tiny(run.folder, recipe), expected)
    assert run.recipe == recipe
    assert "micro_batch" not in run.identity


def test_tests_now_and_then_change_no_weight(
    train_tiny: TrainTiny, rich: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = replace(rich, epochs=4)
    always = train_tiny(tmp_path / "always", recipe)
    run = train_tiny(tmp_path / "seldom", recipe, test_every=3, quiet=False)
    assert ["test_top1" in row for row in run.history] == [False, False, True, True]
    assert [row["eval_seconds"] > 0 for row in run.history] == [False, False, True, True]
    assert capsys.readouterr().out.count("  test: average loss") == 2
    common = [
        name for name in always.history[0] if not name.startswith("test_") and "seconds" not in name
    ]
    common.remove("images_per_second")
    for ours, theirs in zip(run.history, always.history, strict=True):
        assert [ours[name] for name in common] == [theirs[name] for name in common]
    np.testing.assert_array_equal(run.predictions["logits"], always.predictions["logits"])
    assert run.summary["flip_tta_top1"] == always.summary["flip_tta_top1"]


def test_where_nobody_watches_a_line_a_minute_tells_how_far_it_is(
    train_tiny: TrainTiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(train_module, "LINE_SECONDS", 0)
    train_tiny(tmp_path / "run", quiet=False)
    text = capsys.readouterr().out
    line = r"^  epoch 1/2, step [123]/3: loss \d\.\d{4}, \d+ images/s, about \d+ min left$"
    assert len(re.findall(line, text, re.M)) == 3
    assert re.search(r"^  test: 0 of 1 batches$", text, re.M)
    assert re.search(r"^  test of mirror images: 0 of 1 batches$", text, re.M)


def test_a_run_out_of_memory_says_what_to_do(
    train_tiny: TrainTiny, narrow: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = train_module.train_step

    def exhausted(state: TrainState, recipe: Recipe, *arguments: object) -> None:
        if state.step == 1 and recipe.micro_batch is None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        real(state, recipe, *arguments)

    monkeypatch.setattr(train_module, "train_step", exhausted)
    with pytest.raises(
        UserError, match=r"out of memory on cpu with 5 images at once: a smaller --micro-batch"
    ):
        train_tiny(tmp_path / "run")
    assert train_tiny(
        tmp_path / "another", replace(narrow, micro_batch=3)
    ).finished  # what was advised, and works


def test_short_of_memory_nothing_is_passed_forward_whole(
    train_tiny: TrainTiny, rich: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch-norm statistics, which keep no outputs for gradients, take up to twice a micro-batch."""
    real, seen = train_module.new_state, []

    def watched(*arguments: object) -> TrainState:
        state = real(*arguments)
        state.tested.register_forward_pre_hook(
            lambda module, inputs: seen.append(len(inputs[0])) if module.bn1.training else None
        )
        return state

    monkeypatch.setattr(train_module, "new_state", watched)
    recipe = replace(rich, batch_size=12, drop_last=False, micro_batch=2)
    assert train_tiny(tmp_path / "run", recipe).finished
    assert set(seen) == {4}
    cuda = torch.device("cuda")
    assert [evaluation_batch_size(cuda, micro_batch) for micro_batch in (None, 1, 100, 300)] == [
        500,
        2,
        200,
        500,
    ]


def test_a_run_on_a_processor_says_what_it_will_cost(
    train_tiny: TrainTiny,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(train_module, "seconds_per_image", lambda *_: 600.0)
    train_tiny(tmp_path / "run", quiet=False)
    lines = capsys.readouterr().out.splitlines()
    # 2 epochs of 12 training images, three tests of 6 images at a third of the price: 30 x 10 minutes.
    told = [line for line in lines if "images/s: about" in line]
    assert told == [
        "this CPU trains 0 images/s: about 5.0 hours; a GPU is far faster, "
        "and --limit-classes, --epochs and --width make it less"
    ]
    assert lines.index(told[0]) < next(
        number for number, line in enumerate(lines) if line.startswith("epoch")
    )


def test_images_left_out_of_an_epoch_are_not_counted(
    train_tiny: TrainTiny, narrow: Recipe, tmp_path: Path
) -> None:
    run = train_tiny(tmp_path / "run", replace(narrow, drop_last=True))
    for row in run.history:
        assert row["images_per_second"] * row["train_seconds"] == pytest.approx(10, rel=0.2)
    assert run.summary["images_per_second"] * run.summary["train_seconds"] == pytest.approx(
        20, rel=0.2
    )


def test_the_mirrored_test_is_reported_apart(
    train_tiny: TrainTiny, finished_run: Run, tiny_dataset: Dataset
) -> None:
    network, recipe = load_weights(finished_run.weights)[0], finished_run.recipe
    forward = inference(network, recipe, choose("cpu", "fp32"))
    rows = finished_run.predictions["rows"]
    images = torch.from_numpy(tiny_dataset.images[rows])
    with torch.no_grad():
        logits = ((forward(images) + forward(images.flip(2))) / 2).numpy()
    expected = 100 * (logits.argmax(axis=1) == finished_run.predictions["labels"]).mean()
    assert finished_run.summary["flip_tta_top1"] == pytest.approx(expected)


@pytest.mark.slow
def test_a_compiled_run_trains_and_leaves_no_trace_of_its_warm_up(
    train_tiny: TrainTiny, finished_run: Run, tmp_path: Path
) -> None:
    """The compiled network computes what the eager one does, to rounding; its weights carry no prefix."""
    run = train_tiny(tmp_path / "run", compiled=True)
    assert run.identity["compiled"] is True
    assert run.history[0]["train_loss"] == pytest.approx(
        finished_run.history[0]["train_loss"], rel=1e-2
    )
    assert run.history[0]["learning_rate"] == finished_run.history[0]["learning_rate"]
    assert not any(
        name.startswith("_orig_mod") for name in load_weights(run.weights)[0].state_dict()
    )
    assert_equal_runs(train_tiny(tmp_path / "again", compiled=True), run)


def test_a_batch_larger_than_the_split_is_refused(
    train_tiny: TrainTiny, narrow: Recipe, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="batch-size 13 is more than the 12 training images"):
        train_tiny(tmp_path / "run", replace(narrow, batch_size=13))
    assert not (tmp_path / "run").exists()


def test_a_compiler_that_fails_is_refused_in_one_line(
    train_tiny: TrainTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise torch._dynamo.exc.TorchDynamoException("g++: no space\nand much more")

    monkeypatch.setattr(train_module, "warm_up", fail)
    with pytest.raises(
        UserError, match=r"^torch.compile fails here \(g\+\+: no space\): leave --compile out$"
    ):
        train_tiny(tmp_path / "run", compiled=True)


def test_more_graphs_than_the_compiler_keeps_are_refused(
    train_tiny: TrainTiny, narrow: Recipe, tmp_path: Path
) -> None:
    ramp = tuple((8 * size, 0.1) for size in range(2, 9))
    recipe = replace(narrow, epochs=20, ramp=ramp)
    with pytest.raises(UserError, match=r"--compile serves at most 8 shapes"):
        train_tiny(tmp_path / "run", recipe, compiled=True)
    assert not (tmp_path / "run").exists()


# --- A loss that is no number -----------------------------------------------------------------------------------------


def test_a_run_that_diverges_is_no_result(
    train_tiny: TrainTiny, narrow: Recipe, tmp_path: Path
) -> None:
    with pytest.raises(
        UserError, match=r"after epoch 1, step 3: .*not finite.*lower max-learning-rate"
    ):
        train_tiny(tmp_path / "run", replace(narrow, max_learning_rate=1e30))
    assert not Run(tmp_path / "run").finished
    assert checkpoint.load(tmp_path / "run" / "checkpoints") == (None, None)


@pytest.mark.parametrize("step", [0, 1, 2])
def test_the_checkpoint_from_before_bad_weights_stays_good(
    train_tiny: TrainTiny,
    finished_run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
) -> None:
    real = train_module.train_step

    def poisoned(state: train_module.TrainState, *arguments: object) -> None:
        if (state.epoch, state.step) == (2, step):
            torch.nn.init.constant_(state.model.fc.bias, float("nan"))
        real(state, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(train_module, "train_step", poisoned)
        with pytest.raises(UserError, match=r"epoch 2.* (not|a) finite"):
            train_tiny(tmp_path / "run")
    saved, _ = checkpoint.load(tmp_path / "run" / "checkpoints")
    assert (saved["epoch"], saved["step"]) == (2, 0)
    assert all(torch.isfinite(tensor).all() for tensor in saved["model"].values())
    assert_equal_runs(train_tiny(tmp_path / "run"), finished_run)


@pytest.mark.parametrize("stopped", [False, True])
def test_weights_that_are_not_finite_are_never_saved(
    train_tiny: TrainTiny,
    finished_run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stopped: bool,
) -> None:
    """The last update of an epoch went wrong: no loss tells, but the test images, or the weights when it is stopped."""
    real = train_module.train_step

    def poisoned(state: train_module.TrainState, *arguments: object) -> None:
        real(state, *arguments)
        if (state.epoch, state.step) == (2, 3):
            torch.nn.init.constant_(state.model.conv1.weight, float("nan"))
            if stopped:
                send(signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(train_module, "train_step", poisoned)
        with pytest.raises(UserError, match=r"not finite.*epoch 2|epoch 2, step 3.*not finite"):
            train_tiny(tmp_path / "run")
    saved, _ = checkpoint.load(tmp_path / "run" / "checkpoints")
    assert (saved["epoch"], saved["step"]) == (2, 0)
    assert_equal_runs(train_tiny(tmp_path / "run"), finished_run)


def test_what_only_clocks_depend_on_stands_in_the_record_and_in_no_checkpoint(
    finished_run: Run,
) -> None:
    about = finished_run.environment
    assert about["compile_cache"] in ("empty", "filled")
    assert about["earlier_runs"] >= 0
    saved, _ = checkpoint.load(finished_run.checkpoints)
    assert {*about} - {*saved["environment"]} == {"compile_cache", "earlier_runs"}
    assert saved["environment"]["split_sha256"] == about["split_sha256"]

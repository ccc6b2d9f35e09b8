"""Two processes that torchrun starts make one run."""

import inspect
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from tinylab.data.split import make_split
from tinylab.recipes import smoke
from tinylab.run.folder import Run
from tinylab.run.weights import load_weights
from tinylab.training.distributed import ALONE, join
from tinylab.training.train import train


def plain(classes: int) -> nn.Module:
    """A network without batch norm."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 5, stride=4), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 49, classes),
    )  # fmt: skip


@pytest.mark.slow
def test_two_processes_stop_continue_and_finish_one_run(
    sample_dataset, subprocess_environment, tmp_path
) -> None:
    """Stopped by a signal to all of them, as batch systems send it."""
    run = Run(tmp_path / "run")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        "-m", "tinylab", "train", "smoke", "--data", str(sample_dataset.folder),
        "--run-folder", str(run.folder), "--device", "cpu", "--precision", "fp32",
        "--epochs", "5", "--batch-size", "18", "--limit-classes", "3", "--workers", "0",
        "--micro-batch", "5", "--model", f"{tmp_path}/plain.py:plain",
    ]  # fmt: skip
    (tmp_path / "plain.py").write_text(f"from torch import nn\n\n{inspect.getsource(plain)}")
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    options = {"env": subprocess_environment, "start_new_session": True} | pipe
    process = subprocess.Popen(command, **options)
    while not (run.folder / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert output.count("stopping after this step") == 1, output  # the first process speaks
    assert not run.finished
    assert 0 < len(run.history) < 5

    process = subprocess.Popen(command, **options)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert output.count("continuing ") == 1
    assert (run.summary["stops"], len(run.history)) == (1, 5)
    assert run.environment["processes"] == 2

    # Every image is counted once, and the network that is saved is the one that was tested.
    rows, predictions = make_split(sample_dataset, "merged", 3).test, run.predictions
    np.testing.assert_array_equal(predictions["rows"], rows)
    np.testing.assert_array_equal(predictions["labels"], sample_dataset.labels[rows])
    assert {row["test_total"] for row in run.history} == {54}
    inputs = (torch.from_numpy(sample_dataset.images[rows]) / 255 - 0.442) / 0.278
    with torch.no_grad():
        logits = load_weights(run.weights, make=plain)[0](inputs.permute(0, 3, 1, 2))
    np.testing.assert_allclose(predictions["logits"].astype(np.float32), logits, atol=0.02)

    # Without batch norm, which sees each process's images, it is the training of one process.
    alone = train(
        replace(smoke(), epochs=5, batch_size=18), sample_dataset, folder=tmp_path / "alone",
        limit_classes=3, device="cpu", precision="fp32", workers=0, model=plain, quiet=True,
    )  # fmt: skip
    for ours, theirs in zip(run.history, alone.history, strict=True):
        assert ours["learning_rate"] == theirs["learning_rate"]
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-3)


def test_without_torchrun_a_process_is_alone(monkeypatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join(torch.device("cpu")) as ranks:
        assert ranks is ALONE
    assert (ALONE.any(True), ALONE.any(False), ALONE.gather("value")) == (True, False, ["value"])

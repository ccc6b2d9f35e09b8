"""Check that a change of the code moves no result.

    python dev/golden.py OLD        OLD: a commit that has the recipe `cpu`

Trains short narrow runs on the made-up data, once with the code of OLD and once with the working
copy, and compares weights, predictions and metrics in every bit. One thread and fp32, so that the
processor adds up in one order. Exit status 1 if anything differs.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

REPOSITORY = Path(__file__).resolve().parents[1]
NARROW = ("--width", "16", "--precision", "fp32", "--device", "cpu", "--data", "data")
RUNS = {
    "published": "published --epochs 2 --batch-size 60 --workers 0",
    "published, 2 workers": "published --epochs 2 --batch-size 60 --workers 2",
    "smoke": "smoke --epochs 2",
    "accurate": "accurate --epochs 2 --batch-size 60",
    "speedrun": "speedrun --epochs 3 --batch-size 60",
    "cpu": "cpu --epochs 4 --batch-size 60 --micro-batch 20",
    "cpu, killed after an epoch": "cpu --epochs 4 --batch-size 60 --micro-batch 20",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("old", help="the commit to compare with")
    old = parser.parse_args().old
    with tempfile.TemporaryDirectory(prefix="golden-") as temporary:
        folder, different = Path(temporary), False
        checkout = folder / "checkout"
        checkout.mkdir()
        archive = ["git", "-C", str(REPOSITORY), "archive", old]
        tar = subprocess.run(archive, capture_output=True, check=True).stdout
        subprocess.run(["tar", "x", "-C", str(checkout)], input=tar, check=True)
        sources = {"old": checkout / "src", "new": REPOSITORY / "src"}
        finish(tinylab(sources["old"], folder, "sample", "sample.zip"))
        prepare = ("prepare", "--source", "sample.zip", "--data", "data")
        finish(tinylab(sources["old"], folder, *prepare))

        for number, (name, arguments) in enumerate(RUNS.items()):
            digests = {}
            for which, source in sources.items():
                run = folder / f"{which}-{number}"
                command = ("train", *arguments.split(), *NARROW, "--run", str(run))
                if "killed" in name:
                    process = tinylab(source, folder, *command)
                    while process.poll() is None and not (run / "metrics.jsonl").exists():
                        time.sleep(0.02)
                    process.kill()
                    finish(process, -signal.SIGKILL)
                finish(tinylab(source, folder, *command))
                digests[which] = digest(run)
            parts = [
                part for part in digests["old"] if digests["old"][part] != digests["new"][part]
            ]
            different |= bool(parts)
            print(f"{name:28}{'differ: ' + ', '.join(parts) if parts else 'equal'}", flush=True)
    return int(different)


def tinylab(source: Path, folder: Path, *arguments: str) -> subprocess.Popen:
    """Start the command line of the code in `source`."""
    environment = os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tinylab", *arguments]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL)


def finish(process: subprocess.Popen, status: int = 0) -> None:
    """Wait for the process; raise if it ends with another status."""
    if process.wait() != status:
        raise SystemExit(f"{' '.join(process.args)} ended with status {process.returncode}")


def digest(run: Path) -> dict[str, str]:
    """Hash what a run computed; clocks are left out."""
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = [{key: row[key] for key in row if "second" not in key} for row in metrics]
    with np.load(run / "predictions.npz") as arrays:
        parts = {"weights": load_file(run / "model.safetensors"), "predictions": dict(arrays)}
    digests = {"metrics": hashlib.sha256(json.dumps(metrics, sort_keys=True).encode()).hexdigest()}
    for part, arrays in parts.items():
        content = hashlib.sha256()
        for name in sorted(arrays):
            content.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
            content.update(arrays[name].tobytes())
        digests[part] = content.hexdigest()
    return digests


if __name__ == "__main__":
    sys.exit(main())

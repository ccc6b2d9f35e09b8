"""Where a run computes, in which number format, and what else its numbers depend on."""

import contextlib
import datetime
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from tinylab.exceptions import UserError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Compute:
    """device: where tensors live. precision: "fp32", or the autocast format "bf16" or "fp16".
    reason: why."""

    device: torch.device
    precision: str
    reason: str

    def autocast(self) -> contextlib.AbstractContextManager:
        """Convolutions and matrix products in `precision`; weights, batch norm and the loss stay
        fp32."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=PRECISIONS[self.precision])

    def grad_scaler(self) -> torch.amp.GradScaler:
        """Scales the loss where gradients would underflow: for fp16 only, else it does nothing."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    def synchronise(self) -> None:
        """Waits for queued work, so that a clock read next is honest."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def __str__(self) -> str:
        return f"{device_name(self.device)}, {self.precision}: {self.reason}"


def choose(device: str = "auto", precision: str = "auto", *, compiled: bool = False) -> Compute:
    """The placement for `device` ("auto", "cpu", "cuda", "mps") and `precision` ("auto", "fp32",
    "bf16", "fp16").

    `compiled`: the step runs under torch.compile. Raises `UserError` for what this machine does not
    have, a compiler among it.
    """
    if device == "auto":
        device = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    if device not in ("cpu", "cuda", "mps"):
        raise UserError(f"unknown device '{device}'; there are: auto, cpu, cuda, mps")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "no CUDA device here; use --device auto or cpu (in Colab: Runtime > Change runtime "
            "type > T4 GPU)"
        )
    if device == "mps" and not torch.backends.mps.is_available():
        raise UserError("no Apple GPU here; use --device auto or cpu")
    if precision not in ("auto", *PRECISIONS):
        raise UserError(
            f"unknown precision '{precision}'; there are: auto, {', '.join(PRECISIONS)}"
        )
    if precision == "fp16" and device != "cuda":
        raise UserError("fp16 needs a CUDA GPU; use --precision auto, fp32 or bf16")
    if compiled:
        _require_compiler(device)
    chosen, reason = (
        _suitable_precision(device, compiled)
        if precision == "auto"
        else (precision, "as asked for")
    )
    return Compute(torch.device(device), chosen, reason)


def _suitable_precision(device: str, compiled: bool) -> tuple[str, str]:
    if device == "cuda":
        # Not torch.cuda.is_bf16_supported(): it counts emulation, which is slower than fp32 on a
        # T4.
        if torch.cuda.get_device_capability() >= (8, 0) and compiled:
            return "bf16", "native bf16, compiled"
        # Also on newer GPUs when eager: there is no cuDNN path for bf16 batch norm.
        return "fp16", "16-bit with loss scaling, fastest without compilation"
    if device == "cpu":
        if _cpu_has_bf16():
            return "bf16", "this processor computes bf16 natively"
        return "fp32", "no native 16-bit format here"
    return "fp32", "16-bit formats are not trusted on Apple GPUs yet"


def _require_compiler(device: str) -> None:
    """Raises `UserError` where torch.compile has nothing to compile with: C++ on a CPU, Triton
    (which needs C for its launchers) on CUDA."""
    if device == "mps":
        raise UserError("--compile is for CPUs and CUDA GPUs; leave it out")
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        raise UserError("--compile needs Triton, which is not installed here; leave it out")
    variable, names = (
        ("CXX", ("g++", "clang++", "cl"))
        if device == "cpu"
        else ("CC", ("gcc", "clang", "cc", "cl"))
    )
    wanted = (os.environ[variable],) if os.environ.get(variable) else names
    if not any(shutil.which(name.split()[0]) for name in wanted):
        raise UserError(
            f"--compile needs a compiler, and there is no {' or '.join(wanted)} here; leave it out"
        )


@contextlib.contextmanager
def fastest_convolutions(compute: Compute) -> Iterator[None]:
    """While entered, cuDNN measures which algorithm is fastest for each new shape (and torch's
    setting is as before afterwards). Training has a few shapes only."""
    if compute.device.type != "cuda":
        yield
        return
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _cpu_has_bf16() -> bool:
    """Whether the processor itself multiplies bf16 (Linux tells; elsewhere no is assumed) and
    oneDNN may use it."""
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    # oneDNN's own answer heeds ONEDNN_MAX_CPU_ISA, but counts AVX-512 that emulates bf16, slowly.
    return (
        bool(words & {"avx512_bf16", "amx_bf16", "bf16"})
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def device_name(device: torch.device) -> str:
    """The GPU's or processor's name as its driver or system gives it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return "Apple GPU"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"CPU ({models[0] if models else platform.processor() or platform.machine()})"


def describe_environment(compute: Compute) -> dict:
    """Return what a number depends on besides the recipe: device, versions, threads, commit."""
    cuda = compute.device.type == "cuda"
    versions = {}
    for package in ("torchvision", "albumentations", "numpy", "opencv-python-headless", "grad-cam"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
        versions.setdefault(package, None)
    return {
        "device": device_name(compute.device),
        "power_limit_watts": power_limit() if cuda else None,
        "precision": compute.precision,
        "precision_reason": compute.reason,
        "threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # its own type may be in no checkpoint
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "tf32_convolutions": torch.backends.cudnn.allow_tf32 if cuda else None,
        **versions,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def power_limit() -> float | None:
    """Return the first GPU's power limit in watts, as nvidia-smi says."""
    command = ["nvidia-smi", "--query-gpu=power.limit", "--format=csv,noheader,nounits", "-i", "0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return float(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def compile_cache() -> str:
    """Return "filled" if torch.compile finds code of earlier runs: then no clock is cold."""
    named = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    folders = [Path(named)] if named else Path(tempfile.gettempdir()).glob("torchinductor_*")
    filled = any(folder.is_dir() and any(folder.iterdir()) for folder in folders)
    return "filled" if filled else "empty"


def commit() -> str | None:
    """Return the commit of the code that runs, with "+" if its files differ from it.

    For code without its history: the variable TINYLAB_COMMIT.
    """
    source = str(Path(__file__).parents[1])

    def git(*arguments: str) -> str:
        command = ["git", "-C", source, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", source)
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("TINYLAB_COMMIT") or None
